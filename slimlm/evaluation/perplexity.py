"""Perplexity on fixed windows."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.checkpoint.manifest import Side
from slimlm.deal import Deal
from slimlm.errors import RunFailure
from slimlm.linalg.likelihood import window_nll
from slimlm.ranks import ALONE, Ranks


@dataclass
class LogLikelihood:
    """Summed negative log-likelihood, in nats, over predicted tokens, with the windows' own means for an error bar.

    dtype: what the model computed in.
    """

    dtype: torch.dtype
    nll: float = 0.0
    tokens: int = 0
    window_means: list[float] = field(default_factory=list)

    def count(self, nll: Tensor, predicted: int) -> None:
        """nll: [batch], each window's sum over its `predicted` tokens. Raises RunFailure when one is not finite."""
        _require_finite(nll)
        self.nll += float(nll.sum())
        self.tokens += nll.shape[0] * predicted
        self.window_means += (nll / predicted).tolist()

    @property
    def mean(self) -> float:
        """Log-perplexity, in nats a token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean; of 700 at most, beyond which there is no such floating-point number."""
        return math.exp(min(self.mean, 700.0))

    @property
    def stderr(self) -> float:
        """Standard error of the mean log-perplexity, from the spread over windows."""
        count = len(self.window_means)
        return (
            float(torch.tensor(self.window_means, dtype=torch.float64).std()) / math.sqrt(count) if count > 1 else 0.0
        )

    def describe(self) -> Side:
        """What a manifest says of it."""
        return {
            "perplexity": self.perplexity,
            "log_perplexity": self.mean,
            "log_perplexity_stderr": self.stderr,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@torch.no_grad()
def measure_perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int,
    advance: Callable[[int], None] = lambda done: None,
    ranks: Ranks = ALONE,
) -> LogLikelihood:
    """Log-likelihood of windows: [n, time] under a transformers causal LM, of which each rank has one and takes some
    batches; for all, the same number as of one. Raises RunFailure when it is not finite."""
    batches = windows.split(batch_size)
    deal = Deal(ranks, len(batches))
    own = [torch.empty(0, dtype=torch.float64)]
    for batch in deal.pick(batches):
        tokens = batch.to(model.device)
        own.append(window_nll(model(input_ids=tokens, use_cache=False).logits[:, :-1], tokens[:, 1:]).cpu())
        _require_finite(own[-1])
        advance(batch.shape[0])
    ranks.note("windows", sum(map(len, own)))
    return counted(LogLikelihood(model.dtype), ranks.joined(torch.cat(own)), windows, batch_size)


def counted(likelihood: LogLikelihood, found: Tensor, windows: Tensor, batch_size: int) -> LogLikelihood:
    """The likelihood of windows: [n, time], with what was found of each, fp64 [n] on the CPU, added up batch by batch.
    Raises RunFailure as `count` does."""
    for nll in found.split(batch_size):
        likelihood.count(nll, windows.shape[1] - 1)
    return likelihood


def _require_finite(nll: Tensor) -> None:
    """Raises RunFailure."""
    if not torch.isfinite(nll).all():
        raise RunFailure("the model's log-likelihood is NaN or Inf: its weights or dtype are broken")
