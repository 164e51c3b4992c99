"""What a run does unasked where the model's size allows it: text of the model's own, and refinement of its blocks."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from slimlm.calibration import cached, sampling_batch, start_token
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
COPIES = 8  # of a block in fp32, with what Adam and the gradients take
SHARE = 0.5  # of all memory, which either may take


class Unasked(NamedTuple):
    """By setting, why a model does not write calibration text, or is not refined, unless it is told to; "" where it may
    be."""

    self_share: str
    refine: str

    def decided(self, step: AnyStep) -> AnyStep:
        """The step with what it does not say: both for what aims at the dense model."""
        found = {"self_share": OWN_SHARE, "refine": EPOCHS}
        allowed = {name: found[name] if step.repairs and not getattr(self, name) else 0 for name in self._unsaid(step)}
        return step.model_copy(update=allowed)

    def said(self, step: AnyStep) -> list[str]:
        """What is left out of a step, not yet decided."""
        left = {
            "self_share": "the model writes no calibration text beside the given",
            "refine": "blocks are not refined",
        }
        unsaid = self._unsaid(step) if step.repairs else []
        return [f"{left[name]}: {why}" for name in unsaid if (why := getattr(self, name))]

    def _unsaid(self, step: AnyStep) -> list[str]:
        return [name for name in self._fields if name not in step.unread and vars(step).get(name, 0) is None]


def unasked(step: AnyStep, model: StreamedModel, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> Unasked:
    """What there is memory for on these machines, whatever else they do: a run that is resumed does what it did."""
    size = memory_size(model.device)
    if model.device.type == "cpu":
        size //= local_size()
    length = step.max_seq_length or DEFAULT_WINDOW  # at most
    config, checkpoint = model.config, model.checkpoint
    remembered = sampling_batch(config, length) * length * config.num_hidden_layers * cached(config)
    whole = checkpoint.bytes_on_disk() + remembered * checkpoint.main_dtype.itemsize
    block = COPIES * 4 * max(every(model, lambda block: parameter_count(block.module)))
    not_written, not_refined = (
        f"it would take {needed / 1e9:,.1f} GB, more than half of {size / 1e9:,.1f} GB" if needed > SHARE * size else ""
        for needed in (whole, block)
    )
    if start_token(tokenizer) is None:
        not_written = "the tokenizer has no token to begin with"
    return Unasked(*map(max, zip(*ranks.gather((not_written, not_refined)), strict=True)))
