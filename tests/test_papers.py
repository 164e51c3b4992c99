"""docs/papers.md names every paper that the code cites, and only functions that exist."""

import ast
import re
from pathlib import Path

import slimlm

PAGE = Path(__file__).parents[1] / "docs" / "papers.md"
FILES = sorted(Path(slimlm.__file__).parent.rglob("*.py"))
NUMBER = re.compile(r"\b\d\d(?:0[1-9]|1[0-2])\.\d{4,5}\b")  # of arXiv: year, month, number in it
PLACE = re.compile(r"`(\w+\.\w+)`")  # `module.function`


def test_every_paper_that_the_code_cites_is_named():
    cited = {number: path.name for path in FILES for number in NUMBER.findall(path.read_text(encoding="utf-8"))}
    named = set(NUMBER.findall(PAGE.read_text(encoding="utf-8")))
    assert cited
    assert {number: name for number, name in cited.items() if number not in named} == {}


def test_every_function_that_is_named_exists():
    named = set(PLACE.findall(PAGE.read_text(encoding="utf-8")))
    defined = {
        f"{path.stem}.{node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert named
    assert named - defined == set()
