"""Small commands: `slimlm pack`, `unpack`, `models`, `methods` and `recipes`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from slimlm.cli.options import JSON_HELP, sentence
from slimlm.cli.running import ready_to_tell, running, tell

Source = Annotated[Path, typer.Argument(help="Directory to read.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help=sentence(JSON_HELP))]
Target = Annotated[Path, typer.Argument(help="Directory to make.")]


def pack_command(source: Source, output: Target, json_path: JsonFile = None) -> None:
    """Put a pruned checkpoint away without its zeros: a bit per weight, and the weights that are left.

    At 50% zeros in bf16 a matrix takes 0.56 of its room. `slimlm unpack` gives the same checkpoint back, bit by bit.
    """
    from slimlm.checkpoint.pack import pack

    _repack(pack, "packing", source, output, json_path)


def unpack_command(source: Source, output: Target, json_path: JsonFile = None) -> None:
    """Get the checkpoint back that `slimlm pack` put away."""
    from slimlm.checkpoint.pack import unpack

    _repack(unpack, "unpacking", source, output, json_path)


def _repack(
    how: Callable[[Path, Path, Callable[[int], None]], tuple[int, int]],
    stage: str,
    source: Path,
    output: Path,
    json_path: Path | None,
) -> None:
    ready_to_tell(json_path)
    from slimlm.checkpoint.reader import Checkpoint

    source, target = source.resolve(), output.resolve()
    with running() as progress:
        progress.stage(stage, len(Checkpoint(source).tensors))
        before, after = how(source, target, progress.step)
    data = {"source": str(source), "output_dir": str(target), "bytes_before": before, "bytes_after": after}
    line = f"{before:,} bytes of weights -> {after:,} ({after / max(1, before):.2f} of them), written to {output}"
    tell(data, json_path, lambda: print(line))


def models_command(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table in docs/models.md.")] = False,
    json_path: JsonFile = None,
) -> None:
    """List the architectures slimlm knows, by `model_type`, and what slicing can do with each.

    Every pruning method works on every one of them. What counts is `model_type` in config.json, not a model's name.
    """
    ready_to_tell(json_path)
    from slimlm.report.models import known_models, models_shown, models_table
    from slimlm.report.terminal import show

    tell(known_models(), json_path, lambda: print(models_table(), end="") if markdown else show(models_shown()))


def methods_command(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table in docs/pruning.md.")] = False,
    json_path: JsonFile = None,
) -> None:
    """List the methods that `--method` takes: what each removes, by what, and what that buys.

    A recipe may replace what chooses (`curvature`, `mask`) and what makes up for it (`update`), one by one.
    """
    ready_to_tell(json_path)
    from slimlm.report.methods import known_methods, methods_shown, methods_table
    from slimlm.report.terminal import show

    tell(known_methods(), json_path, lambda: print(methods_table(), end="") if markdown else show(methods_shown()))


def recipes_command(json_path: JsonFile = None) -> None:
    """List the recipes that ship with slimlm; each reproduces a result."""
    ready_to_tell(json_path)
    from slimlm.report.recipes import known_recipes, recipes_shown
    from slimlm.report.terminal import show

    tell(known_recipes(), json_path, lambda: show(recipes_shown()))
