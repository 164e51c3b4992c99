"""Who has which batches, and sums over them that do not depend on how many ranks there are.

Batches are dealt out in LANES lanes of neighbouring ones. Each lane is summed by itself, and the lanes one after
another, whoever has them, so that 1, 2 and 4 ranks come to the same bits. Other numbers have one lane a rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from slimlm.ranks import Ranks

LANES = 4
T = TypeVar("T")
Like = tuple[Sequence[int], torch.dtype]  # shape and dtype


def seed_of(seed: int, number: int) -> int:
    """Of batch `number`'s draws, whoever makes them."""
    return (seed * 0x9E3779B1 + number) % 2**32  # torch's generators on CPUs look at no more bits


class Summed(Protocol):
    """Sums over tokens."""

    def tensors(self) -> list[Tensor]:
        """What they are held in, [...] each."""

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Hold these instead, [...] each."""


S = TypeVar("S", bound=Summed)


class Sum:
    """Of tensors like these, [...] each, one by one; the first are taken as they are."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.like, self.totals = like, list[Tensor]()

    def add(self, tensors: Sequence[Tensor | None]) -> None:
        """Use up some more, [...] each, where there is any; no two of them may share memory."""
        found = zip(self.totals or self.like, tensors, strict=True)
        if self.totals:
            self.totals = [one if more is None else one.add_(more) for one, more in found]
        else:
            self.totals = [torch.zeros_like(one, requires_grad=False) if more is None else more for one, more in found]

    def tensors(self) -> list[Tensor]:
        """The sums, [...] each."""
        self.add([None] * len(self.like))
        return self.totals

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Hold these instead, [...] each."""
        self.totals = list(tensors)


@dataclass(frozen=True)
class Deal:
    """`count` things in order, most often batches, dealt out to ranks in lanes of neighbouring ones."""

    ranks: Ranks
    count: int

    @cached_property
    def _lanes(self) -> int:
        return LANES if LANES % self.ranks.size == 0 else self.ranks.size

    def _start(self, lane: int) -> int:
        return lane * self.count // self._lanes

    def of(self, rank: int) -> range:
        """A rank's."""
        lanes = self._lanes_of(rank)
        return range(self._start(lanes.start), self._start(lanes.stop))

    def _lanes_of(self, rank: int) -> range:
        each = self._lanes // self.ranks.size
        return range(rank * each, (rank + 1) * each)

    @property
    def mine(self) -> range:
        """This rank's."""
        return self.of(self.ranks.rank)

    @property
    def lanes(self) -> list[range]:
        """Each lane's."""
        return [range(self._start(lane), self._start(lane + 1)) for lane in range(self._lanes)]

    @property
    def own_lanes(self) -> range:
        """This rank's lanes, by number."""
        return self._lanes_of(self.ranks.rank)

    def pick(self, values: Sequence[T]) -> list[T]:
        """Of what there is of all, this rank's."""
        return [values[index] for index in self.mine]

    def lane(self, number: int) -> int:
        """That of one of this rank's own, by its number among these."""
        index = self.mine.start + number
        return next(lane for lane, numbers in enumerate(self.lanes) if index < numbers.stop)

    def owner(self, index: int) -> int:
        """The rank that has one of all."""
        return next(rank for rank in range(self.ranks.size) if index in self.of(rank))


@dataclass
class Parts(Generic[S]):
    """A sum over this rank's batches, as the parts that it consists of: one a lane.

    whole: where parts are so large that there is only one a rank, at the cost of the fixed order. again: whether the
    batches come more than once; else the first rank adds up lanes as they are done.
    """

    deal: Deal
    make: Callable[[], S]
    whole: bool = False
    again: bool = False
    parts: dict[int, S] = field(default_factory=dict)

    def at(self, number: int) -> S:
        """What to add batch `number` of this rank's to; they come in order."""
        lane = 0 if self.whole else self.deal.lane(number)
        if lane not in self.parts:
            if not self.again:
                self._settle()
            self.parts[lane] = self.make()
        return self.parts[lane]

    def _settle(self) -> None:
        """Lanes go to those before them, where these are known."""
        while self.deal.ranks.first and len(self.parts) > 1:
            first, second, *_ = sorted(self.parts)
            total, done = self.parts[first], self.parts.pop(second)
            total.replace([a.add_(b) for a, b in zip(total.tensors(), done.tensors(), strict=True)])

    def taken(self) -> list[S]:
        """The parts, in order, which are not kept here."""
        self._settle()
        parts = [part for _, part in sorted(self.parts.items())]
        self.parts.clear()
        return parts

    def total(self, owner: int = 0) -> S | None:
        """All ranks' parts added up, lane after lane, at the owner; None elsewhere, and where nobody has any."""
        ranks, mine = self.deal.ranks, self.taken()
        if ranks.size == 1:
            return mine[0] if mine else None
        shapes = ranks.gather([(tuple(t.shape), t.dtype) for t in mine[0].tensors()] if mine else None)
        holders = [rank for rank, shape in enumerate(shapes) if shape is not None]
        if not holders:
            return None
        own, like = [part.tensors() for part in mine], shapes[holders[0]]
        assert like is not None
        sums = [self._sum(holders, [tensors[n] for tensors in own], like[n], owner) for n in range(len(like))]
        if ranks.rank != owner:
            return None
        found = mine[0] if mine else self.make()
        found.replace(sums)
        return found

    def _sum(self, holders: Sequence[int], own: list[Tensor], like: Like, owner: int) -> Tensor:
        """What there is goes from one holder to the next, each of which adds its own parts, and from the last to the
        owner; of more ranks than lanes in the order that is fastest."""
        ranks = self.deal.ranks
        if ranks.size > LANES:
            mine = own[0] if own else torch.zeros(like[0], dtype=like[1], device=ranks.device)
            return ranks.added(mine, owner)
        so_far: Tensor | None = None
        if ranks.rank in holders:
            so_far = own[0]
            for part in own[1:] if ranks.rank == holders[0] else ():
                so_far += part
        for before, after in pairwise(holders):
            if ranks.rank not in (before, after):
                continue
            arrived = ranks.sent(so_far, like, before, after)
            if ranks.rank == after:
                for part in own:
                    arrived += part.to(arrived.device)  # counts of tokens are on the CPU
                so_far = arrived
        return ranks.sent(so_far, like, holders[-1], owner)

    def shared(self) -> S | None:
        """The same for all, from the last, with whom the sum arrives."""
        ranks, last = self.deal.ranks, self.deal.ranks.size - 1
        found = self.total(last)
        if ranks.size > 1 and ranks.agreed(found is not None, last):
            found = found or self.make()
            tensors = found.tensors()
            ranks.share(tensors, last)
            found.replace(tensors)
        return found
