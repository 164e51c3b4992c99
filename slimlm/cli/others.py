"""Small commands: `slimlm pack`, `unpack`, `models`, `methods` and `recipes`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from slimlm.cli.running import running
from slimlm.recipe import shipped_recipes

Source = Annotated[Path, typer.Argument(help="Directory to read.")]
Target = Annotated[Path, typer.Argument(help="Directory to make.")]


def pack_command(source: Source, output: Target) -> None:
    """Put a pruned checkpoint away without its zeros: a bit per weight, and the weights that are left.

    At 50% zeros in bf16 a matrix takes 0.56 of its room. `slimlm unpack` gives the same checkpoint back, bit by bit.
    """
    from slimlm.checkpoint.pack import pack

    _repack(pack, "packing", source, output)


def unpack_command(source: Source, output: Target) -> None:
    """Get the checkpoint back that `slimlm pack` put away."""
    from slimlm.checkpoint.pack import unpack

    _repack(unpack, "unpacking", source, output)


def _repack(
    how: Callable[[Path, Path, Callable[[int], None]], tuple[int, int]], stage: str, source: Path, output: Path
) -> None:
    from slimlm.checkpoint.reader import Checkpoint

    with running() as progress:
        progress.stage(stage, len(Checkpoint(source).tensors))
        before, after = how(source.resolve(), output.resolve(), progress.step)
    print(f"{before:,} bytes of weights -> {after:,} ({after / max(1, before):.2f} of them), written to {output}")


def models_command(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table in docs/models.md.")] = False,
) -> None:
    """List the architectures slimlm knows, by `model_type`, and what slicing can do with each.

    Every pruning method works on every one of them. What counts is `model_type` in config.json, not a model's name.
    """
    from slimlm.report.models import COLUMNS, model_rows, models_table

    if markdown:
        print(models_table(), end="")
        return
    _print_table(COLUMNS, model_rows())
    print("bundled: `--model llama` is a 6.5M-parameter Llama that ships with slimlm")


def methods_command(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table in docs/pruning.md.")] = False,
) -> None:
    """List the methods that `--method` takes: what each removes, by what, and what that buys.

    A recipe may replace what chooses (`curvature`, `mask`) and what makes up for it (`update`), one by one.
    """
    from slimlm.report.methods import methods_list, methods_table

    print(methods_table() if markdown else methods_list(), end="")


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    from slimlm.report.terminal import console

    table = Table(*columns, show_lines=True)
    for row in rows:
        table.add_row(*(cell.replace("`", "") for cell in row))
    console().print(table)


def recipes_command() -> None:
    """List the recipes that ship with slimlm; each reproduces a result."""
    for name, path in sorted(shipped_recipes().items()):
        print(f"{name}  {path}")
