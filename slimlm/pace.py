"""How far all of the work is and how long the rest may take, from what each stage of it is expected to cost."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Pace:
    """Stages of the work, part after part, and where it stands. Those that nobody expected count for nothing, but where
    none was expected the stage at hand is all there is.

    clock: seconds. parts: how many there are; part: the one at hand. stage, total, done: the stage at hand, its steps,
    and those of them that are done.
    """

    clock: Callable[[], float] = time.monotonic
    parts: int = 0
    part: int = 0
    stage: str = ""
    total: int = 1
    done: int = 0
    _expected: list[tuple[int, str, float]] = field(default_factory=list)  # part, stage, cost
    _place: int = 0  # of the stage at hand among them, or of the one to come where nobody expected it
    _own: float = 0.0  # what it costs
    _first: int = 0  # of its steps, those that were done before it began
    _worked: float = 0.0  # in stages that are over, by this process
    _start: float = field(init=False)  # of what is expected
    _began: float = field(init=False)  # the stage

    def __post_init__(self) -> None:
        self._start = self._began = self.clock()

    def expect(self, parts: Sequence[Mapping[str, float]]) -> None:
        """This is to come, stages and what each costs; the time of what was before counts for nothing."""
        self._expected = [(part, *known) for part, stages in enumerate(parts) for known in stages.items()]
        self.parts, self.part, self._place, self._own, self._worked = len(parts), 0, 0, 0.0, 0.0
        self._start = self.clock()

    def begin(self, stage: str, total: int, first: int = 0) -> None:
        """A stage, of which `first` steps are done already."""
        self._worked += self._own * self._new
        behind = self._place + (1 if self._own else 0)
        found = [n for n, (*known, _) in enumerate(self._expected) if n >= behind and known == [self.part, stage]]
        self._place, self._own = (found[0], self._expected[found[0]][2]) if found else (behind, 0.0)
        self.stage, self.total, self.done, self._first = stage, max(1, total), first, first
        self._began = self.clock()

    @property
    def share(self) -> float:
        """Of all work, what is done."""
        costs = [cost for *_, cost in self._expected]
        if not costs:
            return self.done / self.total
        return min(1.0, (sum(costs[: self._place]) + self._own * self.done / self.total) / sum(costs))

    @property
    def left(self) -> float | None:
        """Seconds that the rest may take: of the stage at hand at its own pace, of later ones at that of all; None
        where nothing tells."""
        now, rest = self.clock(), 1 - self.done / self.total
        own = (now - self._began) / self._new * rest if self._new else None
        if not self._expected:
            return own
        worked = self._worked + self._own * self._new
        if not worked:
            return None
        pace = (now - self._start) / worked
        later = sum(cost for *_, cost in self._expected[self._place + (1 if self._own else 0) :])
        return pace * later + (pace * self._own * rest if own is None else own if self._own else 0.0)

    @property
    def _new(self) -> float:
        """Of the stage at hand, the share that was done since it began."""
        return (self.done - self._first) / self.total
