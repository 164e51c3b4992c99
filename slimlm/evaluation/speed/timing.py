"""Times of models that take turns: medians, and how far apart the rounds lie.

Knows no model: whatever can say how long a prompt and the tokens after it took.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from slimlm.model.decoding import Clock, Taken

FEWEST = 5  # rounds whose extremes hold a median 15 times in 16
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class Runner(Protocol):
    """A model that is ready to run."""

    def run(self, prompts: Tensor, new_tokens: int) -> Taken:
        """prompts: [batch, time]. Greedy, `new_tokens` of each, whatever they are."""


@dataclass(frozen=True)
class Spread:
    """Of several rounds: the median, and between what the middle half of them lies."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def share(self) -> float:
        """Half of the distance between both ends, as a share of the median."""
        return (self.high - self.low) / 2 / self.median


@dataclass(frozen=True)
class BatchSpeed:
    """Of one model at one batch size. prefill, decode: tokens per second, of all sequences together. first_token:
    seconds. step: seconds that each further token of all the sequences takes. memory: bytes at the peak. rounds: what
    it is made of."""

    batch_size: int
    prefill: Spread
    first_token: Spread
    decode: Spread
    step: Spread
    memory: int | None
    rounds: tuple[Taken, ...]


def interleaved(
    runners: Sequence[Runner],
    prompts: Tensor,
    new_tokens: int,
    rounds: int,
    step: Callable[[], None] = lambda: None,
) -> list[list[Taken]]:
    """Of each runner what every round took, prompts: [batch, time].

    All of them run once before anything counts, and then one after the other, round by round: what slows the machine
    down for a while meets all of them.
    """
    for runner in runners:
        runner.run(prompts, new_tokens)
        step()
    taken: list[list[Taken]] = [[] for _ in runners]
    for _ in range(rounds):
        for runner, own in zip(runners, taken, strict=True):
            own.append(runner.run(prompts, new_tokens))
            step()
    return taken


def speed_of(batch_size: int, prompt_tokens: int, rounds: Sequence[Taken]) -> BatchSpeed:
    """What rounds come to. The first of the new tokens is the prompt's; the others are decoded."""
    steps = [one.step for one in rounds]
    memories = [one.memory for one in rounds if one.memory is not None]
    return BatchSpeed(
        batch_size,
        Spread.of([batch_size * prompt_tokens / one.first for one in rounds]),
        Spread.of([one.first for one in rounds]),
        Spread.of([batch_size / step for step in steps]),
        Spread.of(steps),
        max(memories, default=None),
        tuple(rounds),
    )


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as another: of the medians. low, high: between what the rounds' own ratios have their
    median with 19 chances in 20 or nearly, as far as so many rounds can say."""

    of_medians: float
    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """Whether rounds agree about which of the two is faster."""
        return not self.low <= 1 <= self.high


def prefill_ratio(model: BatchSpeed, dense: BatchSpeed) -> Ratio:
    """How many times as fast a prompt is read."""
    own = [other.first / one.first for one, other in zip(model.rounds, dense.rounds, strict=True)]
    return _ratio(model.prefill.median / dense.prefill.median, own)


def decode_ratio(model: BatchSpeed, dense: BatchSpeed) -> Ratio:
    """How many times as fast the tokens after the first come."""
    own = [other.step / one.step for one, other in zip(model.rounds, dense.rounds, strict=True)]
    return _ratio(model.decode.median / dense.decode.median, own)


def _ratio(of_medians: float, own: Sequence[float]) -> Ratio:
    """Bounds are two of the rounds' own ratios, whatever their distribution; fewer than FEWEST say nothing."""
    if len(own) < FEWEST:
        return Ratio(of_medians, 0.0, math.inf)
    outside = max(0, int((len(own) - 1.96 * math.sqrt(len(own))) / 2))
    ordered = sorted(own)
    return Ratio(of_medians, ordered[outside], ordered[-1 - outside])
