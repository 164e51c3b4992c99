"""Imports go one way: a room may import only rooms below it."""

import ast
import sys
from pathlib import Path

import pytest

import slimlm
from tests.house_functions import mentioned, named

ROOT = Path(slimlm.__file__).parent
ORDER = [
    {"errors", "imports", "plain", "shown", "started"},
    {"linalg", "families", "device", "modeling"},
    {"ranks", "attention"},
    {"meeting"},
    {"deal"},
    {"pace"},
    {"progress"},
    {"display"},
    {"recipe", "checkpoint"},
    {"calibration"},
    {"settings"},
    {"model"},
    {"statistics"},
    {"fit"},
    {"run", "evaluation"},
    {"slice", "prune", "recover"},
    {"method"},
    {"methods"},
    {"resolve", "unasked", "models"},
    {"windows", "work"},
    {"check"},
    {"manifest", "inspection"},
    {"measure"},
    {"compression"},
    {"stages"},
    {"prober", "api", "few"},
    {"probe"},
    {"forecast"},
    {"report"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__main__.py" and path.parent != ROOT / "recipes")


def modules(path: Path) -> set[str]:
    """Every module a file imports, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(path: Path) -> set[str]:
    """The rooms a file imports from."""
    return {name.split(".")[1] for name in modules(path) if name.startswith("slimlm.")} - {"__version__"}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_imports_a_room_above_it(path: Path):
    here = room(path)
    if here == "__init__":
        return
    above = {other for other in imports(path) if other != here and LEVEL[other] >= LEVEL[here]}
    assert above == set()


def test_neither_wing_knows_the_other_and_what_they_share_knows_neither():
    for below, others in (("slice", {"prune"}), ("prune", {"slice"}), ("fit", {"slice", "prune"})):
        files = [path for path in FILES if room(path) == below]
        assert files
        assert not [path for path in files if imports(path) & others]


def handles_a_run(tree: ast.AST) -> bool:
    """Whether a function in it has an argument of the type Run, or anything makes one."""
    arguments = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation]
    made = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any("Run" in mentioned(node) for node in arguments) or any("Run" in named(node) for node in made)


def test_only_what_carries_out_a_method_takes_a_run():
    found = {str(path.relative_to(ROOT)) for path in FILES if handles_a_run(ast.parse(path.read_text()))}
    assert {"slice/run.py", "prune/run.py", "compression.py"} <= found
    assert found <= {
        "slice/run.py",
        "prune/run.py",
        "recover/run.py",
        "method.py",
        "methods.py",
        "compression.py",
        "api.py",
    }


@pytest.mark.parametrize(
    ("line", "handles"),
    [
        ("def plan(model: Model, run: Run): pass", True),
        ("def plan(run: 'Run | None' = None): pass", True),
        ("def plan(*, runs: list[run.Run]): pass", True),
        ("outcome = carry_out(Run(recipe))", True),
        ("def plan() -> Run: pass", False),
        ("def plan(failure: RunFailure): pass", False),
    ],
)
def test_a_run_is_found(line: str, handles: bool):
    assert handles_a_run(ast.parse(line)) == handles


def test_linalg_imports_torch_only():
    for path in (ROOT / "linalg").glob("*.py"):
        outside = {name.split(".")[0] for name in modules(path)} - sys.stdlib_module_names - {"slimlm"}
        assert outside <= {"torch"}, path
        assert imports(path) <= {"linalg"}, path


def test_only_the_command_line_prints_and_only_reports_know_a_console():
    for path in FILES:
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        called = {call.id for call in calls if isinstance(call, ast.Name)}
        called |= {f".{call.attr}" for call in calls if isinstance(call, ast.Attribute)}
        assert room(path) == "cli" or "print" not in called, path
        assert room(path) in ("cli", "report") or not called & {"Console", ".Console", ".print", ".print_json"}, path


def test_only_one_file_imports_transformers_semi_private_loading_code():
    for path in FILES:
        text = path.read_text()
        if path.name != "hf_internals.py":
            assert "core_model_loading" not in text, path
            # A modelling file travels alone, and has to name the head of GPT-NeoX as files do.
            assert "conversion_mapping" not in text or path.name == "modeling_narrow.py", path
