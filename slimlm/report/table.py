"""Tables for the terminal."""

from collections.abc import Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from slimlm.checkpoint.manifest import Manifest

Row = tuple[str, Sequence[str]]  # a label, and a cell for each column; a label alone begins a section


def comparison_table(columns: Sequence[str], rows: Sequence[Row]) -> Table:
    """Figures down, models across; labels are folded before a figure is cut."""
    table = Table("", *columns, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.columns[0].overflow = "fold"
    for label, cells in rows:
        if not cells:
            table.add_section()
        table.add_row(label, *cells)
    return table


def manifest_table(manifest: Manifest) -> Table:
    """What a run did to a model: dense, compressed, and what changed."""
    sides = sides_of(manifest)
    rows = size_rows([side["parameters"] for side in sides], [side["bytes"] for side in sides])
    if manifest["measured"]:
        rows.append(ratio_row("perplexity", [side["perplexity"] for side in sides], "{:.2f}"))
    return comparison_table(("dense", "compressed", "change"), rows)


def size_rows(parameters: Sequence[int], sizes: Sequence[int]) -> list[Row]:
    """Parameters and bytes of one model, or of the dense and another one."""
    return [ratio_row("parameters", parameters, "{:,}"), ratio_row("bytes of weights", sizes, "{:,}")]


def ratio_row(label: str, values: Sequence[float], form: str) -> Row:
    """Of one model, or of the dense and another one and by how much it differs."""
    cells = [form.format(value) for value in values]
    return label, cells if len(values) == 1 else [*cells, percent(values[1] / values[0] - 1)]


def percent(share: float) -> str:
    """With its sign."""
    return f"{100 * share:+.1f}%".replace("-0.0%", "+0.0%")


def sides_of(manifest: Manifest) -> list[dict[str, Any]]:
    """Both models of a manifest, dense and compressed."""
    sides: tuple[Literal["dense"], Literal["compressed"]] = ("dense", "compressed")
    return [
        {
            "name": side,
            "parameters": manifest["parameters"][side],
            "bytes": manifest["bytes"][side],
            **(manifest["measured"][side] if manifest["measured"] else {}),
        }
        for side in sides
    ]


def inspection_table(rows: list[dict[str, Any]], sparsities: tuple[float, ...]) -> Table:
    """Matrices down, figures across; rows: as `slimlm inspect` writes them to JSON."""
    seen = any(row["predicted"] is not None for row in rows)
    pruned = any(row["zeros"] for row in rows)  # else both indices are the same
    names = ["matrix", "shape", "zeros", "pq", *(["with zeros"] if pruned else []), "prunable", "alpha", "rank"]
    table = Table(*names, *(["outliers", *(f"{sparsity:.0%}" for sparsity in sparsities)] if seen else []))
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].no_wrap = True
    paths = [row["name"].split(".") for row in rows]
    shared = next((place for place, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), 0)
    for row, path in zip(rows, paths, strict=True):
        cells = [".".join(path[shared:]), "x".join(map(str, row["shape"])), f"{row['zeros']:.1%}"]
        cells += [f"{row['pq']:.3f}", *([f"{row['pq_with_zeros']:.3f}"] if pruned else [])]
        cells += [f"{row['prunable']:.1%}", f"{row['alpha']:.2f}", f"{row['stable_rank']:.1f}"]
        if row["predicted"] is not None:
            cells += [f"{row['outliers']:.2%}", *(f"{loss:.2%}" for loss in row["predicted"])]
        elif seen:  # an expert that no token reached
            cells += ["-"] * (1 + len(sparsities))
        table.add_row(*cells)
    return table
