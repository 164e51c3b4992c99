"""Perplexity on fixed windows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimlm.checkpoint.manifest import Side
from slimlm.errors import RunFailure

USELESS = 1.0  # nats a token


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


def counted(nll: Tensor, dtype: torch.dtype) -> LogLikelihood:
    """What that of each predicted token, [windows, time], comes to. dtype: of the model. Raises RunFailure as `count`
    does."""
    likelihood = LogLikelihood(dtype)
    likelihood.count(torch.stack([window.double().sum() for window in nll]), nll.shape[1])
    return likelihood


def of_no_use(rises: Mapping[str, float], name: str = "it") -> list[str]:
    """Why a compressed model is of no use, and what to change, in a line; none where it may be of use.

    name: of it. rises: of its log-perplexity over the dense model's, in nats a token, by text; the worst counts. A
    model of N parameters loses 406.4 / N^0.34 nats a token by its size (arXiv 2203.15556): from 100M on one with a
    tenth of them, trained alike, loses less than a nat more, which no compression here is small enough to make up for.
    Whatever is no better than a uniform guess is found, too: every trained model is further ahead of that.
    """
    text = max(rises, key=rises.__getitem__, default="")
    if not rises or rises[text] <= USELESS:
        return []
    return [
        f"WARNING: {name} is of no use so far: log-perplexity on {text} rose by {rises[text]:.2f} nats a token, and "
        "a dense model of a tenth of the size (from 100M on) loses less than 1: lower the sparsity, give more data or "
        "`slimlm recover`"
    ]


def _require_finite(nll: Tensor) -> None:
    """Raises RunFailure."""
    if not torch.isfinite(nll).all():
        raise RunFailure("the model's log-likelihood is NaN or Inf: its weights or dtype are broken")
