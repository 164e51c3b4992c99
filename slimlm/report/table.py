"""Tables for the terminal."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from slimlm.checkpoint.manifest import Manifest
from slimlm.inspection import Done

Row = tuple[str, Sequence[str]]  # a label, and a cell for each column; a label alone begins a section


class _Label:
    """A name that is broken behind an underscore where its column is too narrow for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __rich_console__(self, screen: Console, options: ConsoleOptions) -> Iterator[Text]:
        lines = [""]
        for part in re.findall("[^_]+_*|_+", self.name):
            if len(lines[-1] + part) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(filter(None, lines)), overflow="fold")

    def __rich_measure__(self, screen: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, len(self.name))


def comparison_table(columns: Sequence[str], rows: Sequence[Row]) -> Table:
    """Figures down, models across; labels are broken before a figure is cut."""
    table = Table("", *columns, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for label, cells in rows:
        if not cells:
            table.add_section()
        table.add_row(_Label(label), *cells)
    return table


def figures_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Many columns, close together, of which the first may be folded and no other."""
    table = Table(*columns, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        table.add_row(*row)
    return table


def manifest_table(manifest: Manifest | Done) -> Table:
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


def sides_of(manifest: Manifest | Done) -> list[dict[str, Any]]:
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
