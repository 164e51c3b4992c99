"""Checks the shapes in the types of `slimlm.linalg` at every call, in tests only: slimlm does not need jaxtyping.

`Annotated[Tensor, "out in"]` is read as jaxtyping's `Float[Tensor, "out in"]`, and with `bool` or `int` behind the
shape as its `Bool` and `Integer`.
"""

import functools
import inspect
import operator
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from beartype import BeartypeConf, beartype
from jaxtyping import Bool, Float, Integer, jaxtyped

PACKAGE = "slimlm.linalg"
KINDS = {float: Float, bool: Bool, int: Integer}
check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float


class Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        check_functions(module)


class Finder(MetaPathFinder):
    """Finds the modules of PACKAGE, to be checked from the start: who imports a function gets the checked one."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.startswith(f"{PACKAGE}.") else None
        if spec is not None and spec.origin is not None:
            spec.loader = Loader(name, spec.origin)
        return spec


def check_linalg() -> None:
    """From here on, once: pytest and tests import conftest each under a name of its own."""
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    early = [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]
    assert not early, f"imported before its shapes could be checked: {early}"
    sys.meta_path.insert(0, Finder())


def check_functions(owner: ModuleType | type) -> None:
    """Check what a module's functions, or a class's methods, are given and give back."""
    home = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    for name, member in list(vars(owner).items()):
        if isinstance(member, property) and member.fget is not None:
            setattr(owner, name, property(checked(member.fget)))
        elif inspect.isfunction(member) and member.__module__ == home:
            setattr(owner, name, checked(member))
        elif isinstance(member, type) and member.__module__ == home and not getattr(member, "_is_protocol", False):
            check_functions(member)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, checking shapes; as it is where its types give none."""
    is_wrapper = hasattr(function, "__wrapped__")  # contextlib's: its types are those of what it wraps
    hints = {} if is_wrapper else get_type_hints(function, include_extras=True)
    shaped = {name: with_shapes(hint) for name, hint in hints.items()}
    if shaped == hints:
        return function
    function.__annotations__ = shaped
    return jaxtyped(typechecker=check)(function)


def with_shapes(hint: Any) -> Any:
    """The type with jaxtyping's in the place of Annotated ones; protocols, which cannot be checked, left out."""
    if get_origin(hint) is Annotated:
        tensor, shape, *kind = get_args(hint)
        return KINDS[kind[0] if kind else float][tensor, shape]
    if getattr(hint, "_is_protocol", False):
        return Any
    arguments = tuple(map(with_shapes, get_args(hint))) if get_origin(hint) in (Union, UnionType, tuple) else ()
    if not arguments:
        return hint
    return tuple[arguments] if get_origin(hint) is tuple else functools.reduce(operator.or_, arguments)
