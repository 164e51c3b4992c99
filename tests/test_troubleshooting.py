"""docs/troubleshooting.md quotes what slimlm says, in words that stand in its source."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import slimlm

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
ROWS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
QUOTED = [said for row in ROWS for said in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
GAP = "…"
SHORTEST = 11  # letters that are quoted of a message, at least


@cache
def strings() -> list[str]:
    """Every string in the source that is no docstring, with a gap for each value that is put into it."""
    found = []
    for path in Path(slimlm.__file__).parent.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        documents = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in documents:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_said(message: str) -> bool:
    """Whether a string of the source has its words, in their order."""
    pattern = re.compile(".*".join(map(re.escape, filter(None, message.split(GAP)))))
    return any(pattern.search(text) for text in strings())


@pytest.mark.parametrize("message", QUOTED)
def test_what_is_quoted_is_said(message: str):
    assert is_said(message)
    assert len(re.findall(r"\w", message.replace(GAP, ""))) >= SHORTEST


def test_every_row_quotes_something():
    assert len(ROWS) > 50
    assert len(QUOTED) >= len(ROWS)
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("message", ["model directory … does exist", "does not exist … model directory"])
def test_other_words_are_found_out(message: str):
    assert not is_said(message)
