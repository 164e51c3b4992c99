"""What `slimlm inspect` found: a model in a few lines, and its matrices in tables that fit 80 columns."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from slimlm.inspection import SPARSITIES, Done, Inspection, MatrixFigures
from slimlm.report.summary import done_lines, measured_lines
from slimlm.report.table import figures_table, manifest_table
from slimlm.report.terminal import sentences
from slimlm.slice.candidates import Choice, Span

AXES = ("hidden", "mlp", "groups", "blocks")
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def inspection_shown(found: Inspection) -> list[Table | Text]:
    """For the terminal: what the model is, what was done to it, the widths it may have, and its matrices."""
    model = found.model
    widths = ", ".join(f"{axis} {getattr(model, axis)}" for axis in AXES if getattr(model, axis))
    shown: list[Table | Text] = [
        *sentences(
            f"{model.name}: {model.model_type}, {widths}",
            f"{model.parameters:,} parameters, {model.bytes:,} bytes of weights, most of them {model.dtype}",
        )
    ]
    if found.result is not None:
        shown += _done(found.result)
    if found.widths:
        shown += [Text("\nwhat a slice may choose from, at each sparsity:"), _widths_table(found.widths)]
    return [*shown, Text(), *matrices_tables(found.matrices)]


def _done(done: Done) -> Iterator[Table | Text]:
    yield from sentences(f"made of {done['made_of']} by {'; then '.join(done['steps'])}")
    yield manifest_table(done)
    how = (
        "transformers loads it with trust_remote_code=True"
        if done["needs_remote_code"]
        else "stock transformers loads it"
    )
    lines = done_lines(done)
    if done["measured"]:
        lines += measured_lines(done["measured"])
    yield from sentences(*lines, how, done["tried_in"])


def _widths_table(widths: Sequence[Choice]) -> Table:
    rows = []
    for one in widths:
        spans = [_span(getattr(one, axis)) for axis in AXES]
        rows.append([f"{one.sparsity:.0%}", f"{one.splits:,}", *spans, _short(one.parameters), _short(one.bytes)])
    return figures_table(("sparsity", "splits", *AXES, "parameters", "bytes"), rows)


def _span(ends: Span | None) -> str:
    return "-" if ends is None or not ends[1] else "-".join(map(str, dict.fromkeys(ends)))


def _short(ends: Span | None) -> str:
    if ends is None:
        return "-"
    size, letter = next(unit for unit in UNITS if ends[1] >= unit[0])
    return "-".join(dict.fromkeys(f"{end / size:.3g}" for end in ends)) + letter


def matrices_tables(matrices: Sequence[MatrixFigures]) -> list[Table]:
    """Of their weights; and where there was data, of what they see."""
    named = list(zip(_short_names([one.name for one in matrices]), matrices, strict=True))
    pruned = any(one.zeros for one in matrices)  # else both indices are the same
    columns = ["matrix", "shape", "zeros", "pq", *(["with\nzeros"] if pruned else []), "prunable", "alpha", "rank"]
    tables = [figures_table(columns, ([name, *_of_weights(one, pruned)] for name, one in named))]
    if any(one.predicted for one in matrices):
        columns = ["matrix", "outliers", *(f"{share:.0%}" for share in SPARSITIES)]
        tables.append(figures_table(columns, ([name, *_of_data(one)] for name, one in named)))
    return tables


def _short_names(names: Sequence[str]) -> list[str]:
    """Without what all of them begin with."""
    paths = [name.split(".") for name in names]
    shared = next((place for place, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), 0)
    return [".".join(path[shared:]) for path in paths]


def _of_weights(one: MatrixFigures, pruned: bool) -> list[str]:
    both = [f"{one.pq:.3f}", *([f"{one.pq_with_zeros:.3f}"] if pruned else [])]
    shape = "x".join(map(str, one.shape))
    return [shape, f"{one.zeros:.1%}", *both, f"{one.prunable:.1%}", f"{one.alpha:.2f}", f"{one.stable_rank:.1f}"]


def _of_data(one: MatrixFigures) -> list[str]:
    """An expert that no token reached has none."""
    if one.predicted is None or one.outliers is None:
        return ["-"] * (1 + len(SPARSITIES))
    return [f"{one.outliers:.2%}", *(f"{loss:.2%}" for loss in one.predicted)]
