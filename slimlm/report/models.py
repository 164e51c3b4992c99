"""The families slimlm knows, as a table of the declarations."""

from collections.abc import Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.families import FAMILIES, Family

COLUMNS = ("model_type", "blocks", "slicing cuts", "a sliced one loads as", "remarks")
SHOWN = ("model_type", "order", "norm", "hidden", "mlp", "groups", "a slice loads as")
HIDDEN, GROUPS = "hidden_size", "key/value groups"


class KnownModel(TypedDict):
    """An architecture. order: of attention and MLP in a block; norms_after: whether what blocks write is normalised.
    cuts: what slicing cuts. carrier: the model_type of a slice once `once`, null where it stays the model's own; stock:
    whether transformers has that class, so that no code travels with a slice."""

    model_type: str
    order: Literal["sequential", "parallel", "parallel or sequential"]
    norm: Literal["RMSNorm", "LayerNorm"]
    norms_after: bool
    cuts: list[str]
    carrier: str | None
    stock: bool
    once: str | None
    remarks: list[str]


class Models(TypedDict):
    """bundled: what `--model` takes that ships with slimlm."""

    models: list[KnownModel]
    bundled: list[str]


def known_models() -> Models:
    """Each family but for those that slimlm itself makes."""
    families = [family for name, family in sorted(FAMILIES.items()) if not name.startswith(("narrow_", "sliced_"))]
    return {"models": list(map(_known, families)), "bundled": sorted(BUNDLED)}


def models_table() -> str:
    """Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_row, known_models()["models"])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def models_shown() -> list[Table | Padding | Text]:
    """For the terminal: a table, and below it each remark with those that it is about."""
    known = known_models()
    table = Table(*SHOWN, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for one in known["models"]:
        cuts = one["cuts"]
        order = "either" if " or " in one["order"] else one["order"]
        mlp = next(("experts'" if "experts" in cut else "yes" for cut in cuts if "MLP" in cut), "no")
        cells = ["yes" if HIDDEN in cuts else "no", mlp, "yes" if GROUPS in cuts else "no"]
        table.add_row(one["model_type"], order, one["norm"], *cells, _loads_as(one))
    remarks = dict.fromkeys(remark for one in known["models"] for remark in one["remarks"])
    told = [(remark, [one["model_type"] for one in known["models"] if remark in one["remarks"]]) for remark in remarks]
    return [
        table,
        Text("hidden, mlp, groups: whether slicing cuts these, beside blocks; pruning works on all of them"),
        Text("*: with its code in the checkpoint; others need no code"),
        *(
            Padding(f"{', '.join(names)}: {remark.replace('`', '')}", (0, 0, 0, 2), expand=False)
            for remark, names in told
        ),
        Text(f"bundled: `--model {known['bundled'][0]}` is a 6.5M-parameter Llama that ships with slimlm"),
    ]


def _known(family: Family) -> KnownModel:
    either = any("parallel" in changes for _, changes in family.variants)
    cuts = [
        *([HIDDEN] if family.rotates else []),
        *(["experts' MLP" if family.experts else "MLP"] if family.mlp else []),
        *([GROUPS] if family.groups else []),
        "blocks",
    ]
    carrier = family.carrier
    once = None if carrier is None else "more than blocks is cut" if carrier.mlp else "heads and stream differ"
    return {
        "model_type": family.model_type,
        "order": "parallel or sequential" if either else "parallel" if family.parallel else "sequential",
        "norm": "LayerNorm" if family.centred else "RMSNorm",
        "norms_after": any(norm.after for norm in family.norms),
        "cuts": cuts,
        "carrier": carrier.model_type if carrier else None,
        "stock": carrier is None or carrier.stock,
        "once": once,
        "remarks": _remarks(family),
    }


def _remarks(family: Family) -> list[str]:
    remarks = [f"hidden_size stays: {family.why_not}"] if family.why_not else []
    for conditions, changes in family.variants:
        where = ", ".join(f"`{name}={value}`" for name, value in conditions.items())
        if "why_not" in changes and len(conditions) == 1:
            remarks.append(f"hidden_size stays where {where}: {changes['why_not']}")
    if family.experts:
        remarks.append("experts are pruned and narrowed each on its own tokens; routers stay")
    return remarks


def _row(one: KnownModel) -> Sequence[str]:
    """Of COLUMNS."""
    loads, where = "itself", "stock" if one["stock"] else "its code in the checkpoint"
    if one["carrier"]:
        loads = f"`{one['carrier']}`, {where}, once {one['once']}"
    blocks = f"{one['order']}, {one['norm']}{', norms after writing' if one['norms_after'] else ''}"
    return f"`{one['model_type']}`", blocks, ", ".join(one["cuts"]), loads, "; ".join(one["remarks"])


def _loads_as(one: KnownModel) -> str:
    """In few words."""
    return f"{one['carrier']}{'' if one['stock'] else ' *'}" if one["carrier"] else "itself"
