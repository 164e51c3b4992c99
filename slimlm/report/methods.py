"""The methods slimlm knows, as a table of their rows."""

from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from slimlm.methods import METHODS
from slimlm.recipe import ROWS, CurvatureName, Row

ARXIV = "https://arxiv.org/abs/"
COLUMNS = ("`--method`", "what goes", "curvature", "mask", "update", "what gets faster", "data", "paper")
CURVATURES: dict[CurvatureName, str] = {
    "none": "none",
    "diagonal": "norms of the inputs",
    "gram": "Gram of the inputs",
    "gram+fisher": "Gram of the inputs, gradients row by row",
    "fisher": "gradients, row by row",
    "block-fisher": "gradients, in blocks of 64 neighbours",
}
MASKS: dict[str, str] = {
    "magnitude": "smallest of the matrix",
    "wanda": "smallest times norm in the row",
    "obs": "cheapest",
    "columns": "cheapest in blocks of 128 columns",
    "greedy": "one after another, greedily; rows compete",
    "taylor": "smallest times gradient",
    "random": "any",
}
UPDATES: dict[str, str] = {
    "none": "none",
    "left-to-right": "columns to the right make up",
    "summed": "single steps, summed",
    "joint": "exact",
}
OF_ZEROS = "2:4 kernels, by `--pattern 2:4`; nothing in a stock checkpoint"
SLICED = (
    "directions, neurons, key/value groups, blocks",
    "Gram of the stream, gradients",
    "least variance and loss, of all splits that give the sparsity",
    "exact, towards the dense model",
    "everything: a smaller dense model",
    "text; none for a rotated model with `--no-refit`",
)
RECOVERED = ("nothing", "none", "that there is", "AdamW, towards the dense model", "nothing more", "text")
ROTATED = ("nothing", "Gram of the stream, gradients", "none", "none", "nothing", "text")


class KnownMethod(TypedDict):
    """A method: what goes of a model, what of the loss it looks at, what it chooses by, what makes up for what goes,
    what gets faster, and what data it needs."""

    name: str
    summary: str
    goes: str
    curvature: str
    mask: str
    update: str
    faster: str
    data: str
    paper: str


class Methods(TypedDict):
    """Every one of the table."""

    methods: list[KnownMethod]


def known_methods() -> Methods:
    """As `slimlm methods --json` has them."""
    return {"methods": [_known(row) for row in method_rows()]}


def _known(row: tuple[str, ...]) -> KnownMethod:
    name, goes, curvature, mask, update, faster, data, _ = (cell.replace("`", "") for cell in row)
    return {
        "name": name,
        "summary": METHODS[name].summary,
        "goes": goes,
        "curvature": curvature,
        "mask": mask,
        "update": update,
        "faster": faster,
        "data": data,
        "paper": METHODS[name].paper,
    }


def method_rows() -> list[tuple[str, ...]]:
    """A row of COLUMNS for each method."""
    return [_row(name) for name in METHODS]


def methods_shown() -> list[Text | Padding]:
    """A few lines for each, as wide as the terminal."""
    shown: list[Text | Padding] = []
    for one, cells in zip(known_methods()["methods"], method_rows(), strict=True):
        told = Table.grid(padding=(0, 1))
        for label, cell in zip(COLUMNS[1:], (*cells[1:-1], one["paper"]), strict=True):
            told.add_row(f"{label}:", cell.replace("`", ""))
        shown += [Text(f"{one['name']}: {one['summary']}"), Padding(told, (0, 0, 0, 4), expand=False)]
    return shown


def methods_table() -> str:
    """Markdown."""
    rows = [(*cells, f"[{number}]({ARXIV}{number})") for *cells, number in method_rows()]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _row(name: str) -> tuple[str, ...]:
    cells = _zeros(ROWS[name]) if name in ROWS else {"slice": SLICED, "rotate": ROTATED, "recover": RECOVERED}[name]
    return f"`{name}`", *cells, METHODS[name].paper.removeprefix(ARXIV)


def _zeros(row: Row) -> tuple[str, ...]:
    """The cells of a pruner, between its name and its paper."""
    chosen = MASKS[row.mask] + (" of the whole model" if row.allocation == "global" else "")
    chosen += f", then {row.swaps} rounds of swaps" if row.swaps else ""
    update = UPDATES[row.update] + (", towards the dense model" if row.refits else "")
    data = "none" if row.curvature == "none" else "text"
    return "single weights", CURVATURES[row.curvature], chosen, update, OF_ZEROS, data
