"""What a run does unasked where the model's size allows it: text of the model's own, and refinement of its blocks."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from slimlm.calibration import SAMPLING_BATCH, remembered, start_token
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.device import memory_size
from slimlm.evaluation.text import DEFAULT_WINDOW
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every
from slimlm.ranks import Ranks
from slimlm.recipe import AnyStep
from slimlm.started import local_size

OWN_SHARE = 0.5  # of calibration windows
EPOCHS = 4  # of refinement
BYTES = 32  # of each weight of a block that is refined: in fp32, with what Adam and the gradients take
NOT_WRITTEN = "the model writes no calibration text beside the given"


class Unasked(NamedTuple):
    """By setting, that a model does not write calibration text, or is not refined, unless it is told to, and why; ""
    where nothing is in the way."""

    self_share: str
    refine: str

    def decided(self, step: AnyStep) -> AnyStep:
        """The step with what it does not say: both for what aims at the dense model."""
        found = {"self_share": OWN_SHARE, "refine": EPOCHS}
        allowed = {name: found[name] if step.repairs and not getattr(self, name) else 0 for name in self._unsaid(step)}
        return step.model_copy(update=allowed)

    def said(self, step: AnyStep) -> list[str]:
        """What is left out of a step, not yet decided, and why."""
        whys = (getattr(self, name) for name in self._unsaid(step) if step.repairs)
        return [why for why in whys if why]

    def _unsaid(self, step: AnyStep) -> list[str]:
        return [name for name in self._fields if name not in step.unread and vars(step).get(name, 0) is None]


def unasked(step: AnyStep, model: StreamedModel, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> Unasked:
    """What there is memory for on these machines, whatever else they do: a run that is resumed does what it did."""
    size = memory_size(model.device)
    if model.device.type == "cpu":
        size //= local_size()
    cache = len(model.blocks) * remembered(model.config, SAMPLING_BATCH, step.max_seq_length or DEFAULT_WINDOW)
    whole = model.checkpoint.bytes_on_disk() + cache * model.checkpoint.main_dtype.itemsize
    block = BYTES * max(every(model, lambda block: parameter_count(block.module)))
    if model.head_is_tied:  # the last block is refined by what it says
        block += model.dtype.itemsize * parameter_count(model.model.get_submodule(model.family.head))
    written, refined = (
        f"{what}: it would take {needed / 1e9:,.1f} GB, more than half of {size / 1e9:,.1f} GB"
        if 2 * needed > size
        else ""
        for what, needed in ((NOT_WRITTEN, whole), ("blocks are not refined", block))
    )
    if start_token(tokenizer) is None:
        written = f"{NOT_WRITTEN}: the tokenizer has no token to begin with"
    return Unasked(*map(max, zip(*ranks.gather((written, refined)), strict=True)))
