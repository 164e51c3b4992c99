"""The families slimlm knows, as a table of the declarations."""

from slimlm.families import FAMILIES, Family

COLUMNS = ("model_type", "blocks", "slicing cuts", "a sliced one loads as", "remarks")


def model_rows() -> list[tuple[str, ...]]:
    """A row of COLUMNS for each family, but for those that slimlm itself makes."""
    return [_row(family) for name, family in sorted(FAMILIES.items()) if not name.startswith(("narrow_", "sliced_"))]


def models_table() -> str:
    """Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *model_rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _row(family: Family) -> tuple[str, ...]:
    norm = "LayerNorm" if family.centred else "RMSNorm"
    after = ", norms after writing" if any(norm.after for norm in family.norms) else ""
    layout = "parallel" if family.parallel else "sequential"
    if any("parallel" in changes for _, changes in family.variants):
        layout = "parallel or sequential"
    cuts = [
        *(["hidden_size"] if family.rotates else []),
        *(["experts' MLP" if family.experts else "MLP"] if family.mlp else []),
        *(["key/value groups"] if family.groups else []),
        "blocks",
    ]
    remarks = [f"hidden_size stays: {family.why_not}"] if family.why_not else []
    for conditions, changes in family.variants:
        where = ", ".join(f"`{name}={value}`" for name, value in conditions.items())
        if "why_not" in changes and len(conditions) == 1:
            remarks.append(f"hidden_size stays where {where}: {changes['why_not']}")
    if family.experts:
        remarks.append("experts are pruned and narrowed each on its own tokens; routers stay")
    return f"`{family.model_type}`", f"{layout}, {norm}{after}", ", ".join(cuts), _carrier(family), "; ".join(remarks)


def _carrier(family: Family) -> str:
    carrier = family.carrier
    if carrier is None:
        return "itself"
    once = "more than blocks is cut" if carrier.mlp else "heads and stream differ"
    where = "stock" if carrier.stock else "its code in the checkpoint"
    return f"`{carrier.model_type}`, {where}, once {once}"
