"""Finds hand-written loops over a model's blocks: all but one belong into the one walk.

A loop over what is there for every block (`model.blocks`, their anatomies and kinds) or over their numbers, directly or
by a name they were given. One over what belongs to one block (`model.anatomy[index].inputs`) is none, nor is one over
what a function called `walk` yields.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

WALK = Path("model/walk.py")
KNOW_NO_MODEL = ("linalg", "modeling")  # blocks of a matrix; classes that travel without slimlm
BY_BLOCK = {"blocks", "_blocks", "anatomy", "kinds"}  # attributes of a model, its widths or its outcome
NAMES = {"blocks", "anatomies"}  # variables that are by block whoever made them
KEEPS = {"enumerate", "reversed", "sorted", "list", "tuple", "set", "zip", "islice"}
LOOPS_ITSELF = {"map", "filter", "takewhile", "dropwhile", "starmap"}
VIEWS = {"items", "keys", "values"}
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Loop:
    """is_statement: `for` or `while`, not a comprehension. loads: reads a block's weights, or calls what does."""

    path: Path
    line: int
    is_statement: bool
    loads: bool

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"


def block_loops(trees: Mapping[Path, ast.Module]) -> list[Loop]:
    """Every hand-written loop over blocks, one a line, in a package's files by their paths within it."""
    loaders = _loaders(trees.values())
    found: dict[tuple[Path, int], Loop] = {}
    for path, tree in trees.items():
        if path == WALK or path.parts[0] in KNOW_NO_MODEL:
            continue
        for node, names in _in_scopes(tree):
            if _goes_through_blocks(node, names):
                line: int = node.lineno  # type: ignore[attr-defined]
                is_statement = isinstance(node, ast.For | ast.While)
                found.setdefault((path, line), Loop(path, line, is_statement, _loads(node, loaders)))
    return sorted(found.values(), key=lambda loop: (loop.path, loop.line))


def _in_scopes(tree: ast.Module) -> Iterator[tuple[ast.AST, set[str]]]:
    """Every node with the names that mean blocks in the outermost function around it."""

    def visit(node: ast.AST, names: set[str]) -> Iterator[tuple[ast.AST, set[str]]]:
        yield node, names
        for child in ast.iter_child_nodes(node):
            is_outermost = isinstance(child, FunctionNode) and names is NAMES
            yield from visit(child, _given_names(child) if is_outermost else names)

    return visit(tree, NAMES)


def _given_names(function: ast.AST) -> set[str]:
    names, before = set(NAMES), 0
    while len(names) > before:
        before = len(names)
        for node in ast.walk(function):
            for target, value in _assignments(node):
                if isinstance(target, ast.Name) and (_is_each(value, names) or _is_number(value, names)):
                    names.add(target.id)
    return names


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Single targets and what they are given; of a tuple for a tuple, each."""
    if isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        yield node.target, node.value
    for target in node.targets if isinstance(node, ast.Assign) else ():
        value = node.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            yield from zip(target.elts, value.elts, strict=True)
        else:
            yield target, value


def _goes_through_blocks(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.For):
        return _is_each(node.iter, names) or _is_handed_blocks(node.iter, names)
    if isinstance(node, ast.While):
        return any(_is_number(part, names) for part in ast.walk(node.test))
    if isinstance(node, Comprehension):
        iters = [generator.iter for generator in node.generators]
        return any(_is_each(source, names) or _is_handed_blocks(source, names) for source in iters)
    return isinstance(node, ast.Call) and _name(node.func) in LOOPS_ITSELF and _is_each(node, names)


def _is_handed_blocks(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression is a call that gets the blocks themselves, such as of a generator that wraps them."""
    if not isinstance(node, ast.Call) or _name(node.func) == "walk":
        return False
    return any(isinstance(item, ast.Attribute | ast.Subscript) and _is_each(item, names) for item in node.args)


def _is_each(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is the blocks, something for each of them, or their numbers."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute):
        return node.attr in BY_BLOCK and _name(node.value) != "family"  # whose `blocks` is a path
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Slice) and _is_each(node.value, names)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in VIEWS:
            return _is_each(node.func.value, names)
        if _name(node.func) == "range":
            return any(_is_number(item, names) for item in node.args)
        return _name(node.func) in KEEPS | LOOPS_ITSELF and any(_is_each(item, names) for item in node.args)
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.Starred | ast.NamedExpr):
        return any(_is_each(part, names) for part in ast.iter_child_nodes(node))
    return isinstance(node, ast.IfExp) and (_is_each(node.body, names) or _is_each(node.orelse, names))


def _is_number(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is how many blocks there are, or computed from that."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Call) and _name(node.func) == "len":
        return any(_is_each(item, names) for item in node.args)
    if isinstance(node, ast.Call):
        return _name(node.func) in ("min", "max") and any(_is_number(item, names) for item in node.args)
    return isinstance(node, ast.BinOp) and (_is_number(node.left, names) or _is_number(node.right, names))


def _name(node: ast.AST) -> str:
    """The last name of `a.b.c`."""
    return getattr(node, "id", getattr(node, "attr", ""))


def _loaders(trees: Iterable[ast.Module]) -> set[str]:
    """Names of functions that load weights, if through others; a name that two functions have is left out."""
    functions: dict[str, list[ast.AST]] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, FunctionNode):
                functions.setdefault(node.name, []).append(node)
    bodies = {name: found[0] for name, found in functions.items() if len(found) == 1}
    loaders: set[str] = set()
    while more := {name for name, body in bodies.items() if name not in loaders and _loads(body, loaders)}:
        loaders |= more
    return loaders


def _loads(node: ast.AST, loaders: set[str]) -> bool:
    called = [inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    return any(_name(function) in loaders or _loads_itself(function) for function in called)


def _loads_itself(function: ast.expr) -> bool:
    if not isinstance(function, ast.Attribute):
        return False
    return function.attr == "loaded" or (function.attr == "block" and _name(function.value) != "family")
