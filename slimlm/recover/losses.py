"""What a student is trained by: token distributions in, sums over tokens out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from slimlm.checkpoint.kin import Kin
from slimlm.errors import RunFailure

TINY = torch.finfo(torch.float32).tiny


def text_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of a text's tokens 1.., [windows, time], summed: [] in fp32, in nats."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


@dataclass(frozen=True)
class StreamLoss:
    """How far the stream is from the teacher's in its basis, in squares of that, as a mean over the blocks but the last
    (what is behind that one, stock models do not say), summed over tokens.

    Terms for hidden states as in TinyBERT (arXiv 1909.10351), whose maps are learned; here it is the one that was cut
    by. weight: of them beside predictions. centred: where norms do not see the mean.
    """

    weight: float
    kin: Kin
    centred: bool

    def __call__(self, states: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """[] in fp32. states [windows, time, width], wanted [windows, time, hidden]: what enters each block."""
        if not min(len(states), len(wanted)):
            raise RunFailure("the model's own code does not give its hidden states: use --hidden-weight 0")
        pairs = list(enumerate(self.kin.blocks[:-1].tolist()))
        terms = [self._behind(states[index + 1], wanted[block + 1]) for index, block in pairs]
        return self.weight * torch.stack(terms).mean()

    def _behind(self, x: Tensor, wanted: Tensor) -> Tensor:
        target = self._seen(wanted.float()) @ self.kin.basis
        error = self._seen(x.float() - target)
        return (error.square().sum(-1) / target.square().sum(-1).clamp_min(TINY)).sum()

    def _seen(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x
