"""Functions as they are written: who owns them, what their types name and what their docstrings say."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

DIMENSION = r"(?:\.\.\.|[\w'][\w' ]*(?: ?[*/+-] ?[\w']+)*)"
SHAPE = re.compile(rf"(?<!\w)\[{DIMENSION}(?:, {DIMENSION})*\]|\bscalars?\b|\bany shape\b")
RAISES = re.compile(r"\braises?\b", re.IGNORECASE)
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """One `def`, and who it belongs to: classes and functions around it, outermost first."""

    path: Path
    node: FunctionNode
    owners: tuple[ast.AST, ...]

    @property
    def place(self) -> str:
        return f"{self.path}:{self.node.lineno} {self.node.name}"

    @property
    def lines(self) -> int:
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @cached_property
    def arguments(self) -> list[ast.arg]:
        """All but a method's `self` or `cls`."""
        given = self.node.args
        first = [*given.posonlyargs, *given.args]
        is_static = any(getattr(decorator, "id", "") == "staticmethod" for decorator in self.node.decorator_list)
        if self.owners and isinstance(self.owners[-1], ast.ClassDef) and not is_static:
            first = first[1:]
        return [*first, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]

    @cached_property
    def own(self) -> list[ast.AST]:
        """What stands in it, functions inside it left out."""
        return list(_within(self.node))

    @property
    def is_public(self) -> bool:
        names = [*self.path.with_suffix("").parts, *(getattr(owner, "name", "") for owner in self.owners)]
        is_nested = any(isinstance(owner, FunctionNode) for owner in self.owners)
        hidden = any(name.startswith("_") for name in (*names, self.node.name) if name != "__init__")
        return not is_nested and not hidden and self.node.name != "__init__"

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    @cached_property
    def annotations(self) -> list[ast.expr]:
        return [*filter(None, [self.node.returns, *(argument.annotation for argument in self.arguments)])]

    @property
    def has_tensors(self) -> bool:
        return any("Tensor" in mentioned(annotation) for annotation in self.annotations)

    @property
    def gives_shapes(self) -> bool:
        """In its docstring, or in every type that is a tensor's."""
        return bool(SHAPE.search(self.doc)) or not self.has_bare_tensors

    @property
    def has_bare_tensors(self) -> bool:
        """Whether a tensor stands in its types without its shape."""
        return any(map(_has_bare_tensor, self.annotations))

    @cached_property
    def raised(self) -> set[str]:
        """Names of the errors in its own `raise` statements; of a bare one, none."""
        errors = [node.exc for node in self.own if isinstance(node, ast.Raise) and node.exc is not None]
        called = [error.func if isinstance(error, ast.Call) else error for error in errors]
        return {getattr(error, "id", getattr(error, "attr", "")) for error in called}

    @property
    def says_what_it_raises(self) -> bool:
        is_named = any(name in self.doc for name in self.raised) or not any(name[:1].isupper() for name in self.raised)
        return bool(RAISES.search(self.doc)) and is_named


def functions_of(path: Path, node: ast.AST, owners: tuple[ast.AST, ...] = ()) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield Function(path, child, owners)
        is_owner = isinstance(child, FunctionNode | ast.ClassDef)
        yield from functions_of(path, child, (*owners, child) if is_owner else owners)


def _within(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, FunctionNode):
            yield from _within(child)


def mentioned(annotation: ast.expr) -> set[str]:
    """Names in an annotation, those in forward references too."""
    names = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(re.findall(r"\w+", node.value))
        names |= named(node)
    return names


def _has_bare_tensor(annotation: ast.AST) -> bool:
    """Whether a tensor stands in an annotation without its shape."""
    if isinstance(annotation, ast.Subscript) and "Annotated" in named(annotation.value):
        return False
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return "Tensor" in annotation.value and "Annotated" not in annotation.value
    return "Tensor" in named(annotation) or any(map(_has_bare_tensor, ast.iter_child_nodes(annotation)))


def named(node: ast.AST) -> set[str]:
    """The names that a node itself brings in."""
    found = [getattr(node, field, None) for field in ("id", "attr", "arg")]
    if isinstance(node, ast.alias | FunctionNode):
        found.append(node.name.rpartition(".")[2])
    return {name for name in found if isinstance(name, str)}
