"""Which architectures slimlm knows. A new one is a declaration and a line here."""

from typing import TYPE_CHECKING

from slimlm.errors import UserError, nearest
from slimlm.families.family import Axis, Carrier, Experts, Family, Norm
from slimlm.families.layernorm import BLOOM, FALCON, GPT2, GPT_NEOX, NARROW, OPT, PHI, SLICED, STABLELM, STARCODER2
from slimlm.families.llama import GEMMA, GRANITE, LLAMA, MISTRAL, PHI3, QWEN2, QWEN3, SLICED_LLAMA, SMOLLM3
from slimlm.families.moe import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from slimlm.families.postnorm import GEMMA2, GEMMA3_TEXT, OLMO2

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LLAMAS = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GRANITE, SMOLLM3, GEMMA, SLICED_LLAMA)
_LAYERNORM = (PHI, STARCODER2, STABLELM, GPT_NEOX, GPT2, OPT, FALCON, BLOOM)
_OTHERS = (GEMMA2, GEMMA3_TEXT, OLMO2, MIXTRAL, QWEN2_MOE, QWEN3_MOE)
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (*_LLAMAS, *_LAYERNORM, *_OTHERS, *NARROW, *SLICED)
}


def family_of(config: "PretrainedConfig") -> Family:
    """The declaration for a model of this config. Raises UserError naming the supported ones."""
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise UserError(
            f"architecture {model_type!r} is not supported{nearest(model_type, FAMILIES)} "
            "(`slimlm models` lists those that are)"
        )
    return FAMILIES[model_type].of(config)


__all__ = ["FAMILIES", "Axis", "Carrier", "Experts", "Family", "Norm", "family_of"]
