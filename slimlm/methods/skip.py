"""Modules that stay dense because the user says so (`--skip`), in every method."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import accumulate

from slimlm.errors import UserError, nearest
from slimlm.matrices import matrix
from slimlm.walk import StreamedModel


def skip_modules(model: StreamedModel, patterns: Sequence[str]) -> None:
    """Leave linears as they are, by name or glob, and all that are inside of a module so named.

    Instead of any that were left before. Raises UserError for a pattern that fits none, and when nothing is left.
    """
    for index, anatomy in enumerate(model.anatomy):
        model.anatomy[index] = replace(anatomy, skipped=())
    model.skipped.clear()
    vars(model).pop("matrices", None)  # which is what all methods prune
    if not patterns:
        return
    used: set[str] = set()
    for index, anatomy in enumerate(model.anatomy):
        part = model.family.block(index)
        chosen = [name for name in anatomy.linears if _fits(f"{part}.{name}", patterns, used)]
        model.anatomy[index] = replace(anatomy, skipped=tuple(chosen))
        model.skipped |= {f"{part}.{name}": matrix(model.blocks[index], name).numel() for name in chosen}
    head = model.family.head
    if _fits(head, patterns, used):
        model.skipped[head] = model.model.get_submodule(head).get_parameter("weight").numel()
    for pattern in patterns:
        if pattern not in used:
            known = {name.rpartition(".")[2] for name in (*model.matrices, *model.skipped)}
            example = f"{model.family.block(0)}.{model.family.readers[0]}"
            raise UserError(
                f"--skip {pattern}: no linear of the model is called so, as one is {example}"
                f"{nearest(pattern.rpartition('.')[2].strip('*'), known)}"
            )
    if not model.matrices:
        raise UserError("--skip leaves nothing to compress")


@contextmanager
def skipping(model: StreamedModel, patterns: Sequence[str]) -> Iterator[None]:
    """Inside, these modules are left instead of those that were."""
    anatomy, skipped = list(model.anatomy), dict(model.skipped)
    try:
        skip_modules(model, patterns)
        yield
    finally:
        model.anatomy[:] = anatomy
        model.skipped.clear()
        model.skipped |= skipped
        vars(model).pop("matrices", None)


def _fits(name: str, patterns: Sequence[str], used: set[str]) -> bool:
    """Whether a module or one that it is in is named by a pattern; all such go to `used`."""
    parents = list(accumulate(name.split("."), "{}.{}".format))
    fitting = {pattern for pattern in patterns if any(fnmatchcase(parent, pattern) for parent in parents)}
    used |= fitting
    return bool(fitting)
