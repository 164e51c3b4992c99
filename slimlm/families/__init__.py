"""Which architectures slimlm knows. A new one is a declaration and a line here."""

from slimlm.errors import UserError, nearest
from slimlm.families.family import Axis, Family, Norm
from slimlm.families.llama import LLAMA, MISTRAL, SLICED_LLAMA

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, SLICED_LLAMA)}


def family_of(model_type: str) -> Family:
    """The declaration for `config.model_type`. Raises UserError naming the supported ones."""
    if model_type not in FAMILIES:
        raise UserError(
            f"architecture {model_type!r} is not supported{nearest(model_type, FAMILIES)} "
            f"(supported model_type: {', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Axis", "Family", "Norm", "family_of"]
