"""What a student learns from, and what it is judged by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from slimlm.calibration import Windows
from slimlm.deal import seed_of
from slimlm.linalg.regression import HELD_EVERY
from slimlm.recipe import SELF

HELD = 32  # windows of each kind that are held out, at most, and one of HELD_EVERY where that is fewer
Tokens = Annotated[Tensor, "windows time"]
Numbers = Annotated[Tensor, "windows", torch.int64]


def held_of(count: int) -> int:
    """Of so many windows of a kind, those that are held out."""
    return min(HELD, count // HELD_EVERY)


@dataclass(frozen=True)
class Text:
    """tokens: [windows, time]. learned: the numbers of those to learn from, some of them several times, [learned].
    held: of those of each kind that judge, by its name, [held] each."""

    tokens: Tokens
    learned: Numbers
    held: dict[str, Numbers]

    @classmethod
    def of(cls, windows: Windows, times: int = 1) -> "Text":
        """Of every kind some are held out, evenly spread over it. times: that given text is learnt in a pass."""
        held, origins = dict[str, Tensor](), windows.of_each
        learned = torch.tensor([1 if origin == SELF else times for origin in origins])
        for origin in dict.fromkeys(origins):
            own = torch.tensor([index for index, other in enumerate(origins) if other == origin])
            count = held_of(len(own))
            if count:
                chosen = own[torch.arange(count) * len(own) // count]
                name = Path(origin).name
                held[origin if name in held else name] = chosen
                learned[chosen] = 0
        return cls(windows.tokens, torch.arange(len(origins)).repeat_interleave(learned), held)

    def of_step(self, step: int, size: int, seed: int) -> Numbers:
        """The windows of a step: the text again and again, each time in an order of its own."""
        count = len(self.learned)
        places = range(step * size, (step + 1) * size)
        orders = {
            again: torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, again)))
            for again in {place // count for place in places}
        }
        return self.learned[torch.stack([orders[place // count][place % count] for place in places])]
