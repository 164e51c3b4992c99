from hypothesis import given
from hypothesis import strategies as st

from slimlm.pace import Pace


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


STAGES = st.lists(
    st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 5)), min_size=1, max_size=4), min_size=1, max_size=3
)


def run(pace: Pace, clock: Clock, parts: list[list[tuple[float, int]]], second: float):
    """Every step takes `second` for a unit of its cost; yields behind each."""
    pace.expect([{f"stage {n}": cost for n, (cost, _) in enumerate(stages)} for stages in parts])
    for number, stages in enumerate(parts):
        pace.part = number
        for n, (cost, steps) in enumerate(stages):
            pace.begin(f"stage {n}", steps)
            for _ in range(steps):
                clock.now += second * cost / steps
                pace.done += 1
                yield


@given(STAGES, st.floats(0.5, 100))
def test_where_costs_are_right_so_are_the_share_and_the_time_left(parts, second):
    clock = Clock()
    pace = Pace(clock)
    clock.now = 1000.0  # before the work counts for nothing
    total = sum(cost for stages in parts for cost, _ in stages)
    for _ in run(pace, clock, parts, second):
        passed = (clock.now - 1000.0) / second
        assert abs(pace.share - passed / total) < 1e-6
        assert pace.left is not None
        assert abs(pace.left - (total - passed) * second) < 1e-6 * total * second
    assert pace.share > 1 - 1e-9


def test_a_stage_whose_cost_was_wrong_is_told_by_its_own_pace():
    clock = Clock()
    pace = Pace(clock)
    pace.expect([{"short": 1.0, "long": 1.0}])
    pace.begin("short", 1)
    clock.now, pace.done = 10.0, 1
    pace.begin("long", 10)
    assert pace.left == 10.0  # as the one before
    clock.now, pace.done = 40.0, 1
    assert pace.left == 270.0  # 30 s a step


def test_what_was_done_before_tells_nothing_of_the_pace():
    clock = Clock()
    pace = Pace(clock)
    pace.expect([{"skipped": 5.0, "resumed": 4.0, "later": 1.0}])
    pace.begin("resumed", 4, first=2)
    assert pace.share == 0.7
    assert pace.left is None
    clock.now, pace.done = 30.0, 3
    assert pace.share == 0.8
    assert pace.left == 30.0 + 30.0  # a step, and as much for a unit of later work


def test_an_unexpected_stage_stands_between_its_neighbours():
    clock = Clock()
    pace = Pace(clock)
    pace.expect([{"one": 1.0, "two": 1.0}])
    pace.begin("one", 1)
    clock.now, pace.done = 10.0, 1
    pace.begin("between", 7)
    assert pace.share == 0.5
    assert pace.left == 10.0
    pace.begin("two", 1)
    pace.done = 1
    assert pace.share == 1.0


def test_without_expectations_the_stage_at_hand_is_all_there_is():
    clock = Clock()
    pace = Pace(clock)
    pace.begin("packing", 4)
    assert (pace.share, pace.left) == (0.0, None)
    clock.now, pace.done = 2.0, 1
    assert (pace.share, pace.left) == (0.25, 6.0)
