"""What a run does unasked where the model's size allows it: text of the model's own, and refinement of its blocks."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from slimlm.calibration import MOST_CACHED, start_token
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.device import memory_size
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every
from slimlm.recipe import AnyStep

OWN_SHARE = 0.5  # of calibration windows
EPOCHS = 4  # of refinement
COPIES = 8  # of a block in fp32, with what Adam and the gradients take
SHARE = 0.5  # of all memory, which either may take


class Unasked(NamedTuple):
    """Why a model does not write calibration text, or is not refined, unless it is told to; "" where nothing is in the
    way."""

    why_not_written: str
    why_not_refined: str

    def decided(self, step: AnyStep) -> AnyStep:
        """The step with what it does not say: both for what aims at the dense model."""
        found = {
            "self_share": OWN_SHARE if step.repairs and not self.why_not_written else 0.0,
            "refine": EPOCHS if step.repairs and not self.why_not_refined else 0,
        }
        return step.model_copy(update={name: value for name, value in found.items() if vars(step).get(name, 0) is None})

    def said(self, step: AnyStep) -> list[str]:
        """What is left out of a step, not yet decided."""
        if not step.repairs:
            return []
        left = {
            "the model writes no calibration text beside the given": (self.why_not_written, "self_share"),
            "blocks are not refined": (self.why_not_refined, "refine"),
        }
        return [f"{what}: {why}" for what, (why, name) in left.items() if why and vars(step)[name] is None]


def unasked(model: StreamedModel, tokenizer: PreTrainedTokenizerBase) -> Unasked:
    """What there is memory for on this machine, whatever else it does: a run that is resumed does what it did."""
    size = memory_size(model.device)
    whole = model.checkpoint.bytes_on_disk() + MOST_CACHED * model.checkpoint.main_dtype.itemsize
    block = COPIES * 4 * max(every(model, lambda block: parameter_count(block.module)))
    not_written, not_refined = (
        f"it would take {needed / 1e9:,.0f} GB, more than half of {size / 1e9:,.0f} GB" if needed > SHARE * size else ""
        for needed in (whole, block)
    )
    if start_token(tokenizer) is None:
        not_written = "the tokenizer has no token to begin with"
    return Unasked(not_written, not_refined)
