"""Tables for the terminal."""

from typing import Any, Literal

from rich.table import Table

from slimlm.checkpoint.manifest import Manifest
from slimlm.evaluation.harness import Score


def comparison_table(models: list[dict[str, Any]]) -> Table:
    """Figures down, models across; with two models (compressed, dense), dense first and the change last.

    models: entries as `evaluate` returns them.
    """
    columns = models[::-1]
    table = Table()
    table.add_column("")
    for label in ["dense", "compressed"] if len(columns) == 2 else [columns[0]["name"]]:
        table.add_column(label, justify="right")
    if len(columns) == 2:
        table.add_column("change", justify="right")
    for label, cells, change in _rows(columns):
        table.add_row(label, *cells, *([change] if len(columns) == 2 else []))
    return table


def sides_of(manifest: Manifest) -> list[dict[str, Any]]:
    """Both models of a manifest, compressed and dense, as `comparison_table` takes them."""
    sides: tuple[Literal["compressed"], Literal["dense"]] = ("compressed", "dense")
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


def _rows(columns: list[dict[str, Any]]) -> list[tuple[str, list[str], str]]:
    rows = [
        _ratio_row("parameters", [column["parameters"] for column in columns], "{:,}"),
        _ratio_row("bytes of weights", [column["bytes"] for column in columns], "{:,}"),
    ]
    if all("perplexity" in column for column in columns):
        rows.append(_ratio_row("perplexity", [column["perplexity"] for column in columns], "{:.2f}"))
    for task, metrics in columns[0].get("tasks", {}).items():
        for metric in metrics:
            rows.append(_task_row(task, metric, [column["tasks"][task][metric] for column in columns]))
    return rows


def _ratio_row(label: str, values: list[float], form: str) -> tuple[str, list[str], str]:
    return (
        label,
        [form.format(value) for value in values],
        f"{100 * (values[-1] / values[0] - 1):+.1f}%".replace("-0.0%", "+0.0%"),
    )


def _task_row(task: str, metric: str, scores: list[Score]) -> tuple[str, list[str], str]:
    cells = [
        f"{score['value']:.4f}" + (f" ± {score['stderr']:.4f}" if score["stderr"] is not None else "")
        for score in scores
    ]
    return f"{task} {metric}", cells, f"{scores[-1]['value'] - scores[0]['value']:+.4f}"
