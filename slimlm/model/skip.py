"""Modules that stay dense because the user says so (`--skip`), in every method."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import accumulate

from slimlm.errors import UserError, nearest
from slimlm.families import Family
from slimlm.model.block import Block
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every


def skip_modules(model: StreamedModel, patterns: Sequence[str]) -> None:
    """Leave linears as they are, by name or glob, and all that are inside of a module so named.

    Instead of any that were left before. Raises UserError for a pattern that fits none, and when nothing is left.
    """
    every(model, lambda block: _set(block, replace(block.family, skipped=())))
    model.skipped.clear()
    if not patterns:
        return
    used: set[str] = set()

    def leave(block: Block) -> None:
        linears = {name: f"{block.path}.{name}" for name in block.family.linears}
        chosen = [name for name, full in linears.items() if _fits(full, patterns, used)]
        model.skipped.update({linears[name]: block.matrix(name).numel() for name in chosen})
        _set(block, replace(block.family, skipped=tuple(chosen)))

    every(model, leave)
    head = model.family.head
    if _fits(head, patterns, used):
        model.skipped[head] = model.model.get_submodule(head).get_parameter("weight").numel()
    for pattern in patterns:
        if pattern not in used:
            known = {name.rpartition(".")[2] for name in (*model.matrices, *model.skipped)}
            example = f"{model.blocks[0].path}.{model.family.readers[0]}"
            raise UserError(
                f"--skip {pattern}: no linear of the model is called so, as one is {example}"
                f"{nearest(pattern.rpartition('.')[2].strip('*'), known)}"
            )
    if not model.matrices:
        raise UserError("--skip leaves nothing to compress")


@contextmanager
def skipping(model: StreamedModel, patterns: Sequence[str]) -> Iterator[None]:
    """Inside, these modules are left instead of those that were."""
    families, skipped = every(model, lambda block: block.family), dict(model.skipped)
    try:
        skip_modules(model, patterns)
        yield
    finally:
        every(model, lambda block: _set(block, families[block.index]))
        model.skipped.clear()
        model.skipped.update(skipped)


def _set(block: Block, family: Family) -> None:
    block.family = family
    vars(block.model).pop("matrices", None)  # which is what all methods prune


def _fits(name: str, patterns: Sequence[str], used: set[str]) -> bool:
    """Whether a module or one that it is in is named by a pattern; all such go to `used`."""
    parents = list(accumulate(name.split("."), "{}.{}".format))
    fitting = {pattern for pattern in patterns if any(fnmatchcase(parent, pattern) for parent in parents)}
    used |= fitting
    return bool(fitting)
