"""Some tiny runs give what they gave when they were recorded (`python eval/golden.py --record`)."""

from pathlib import Path

import pytest

from tests.golden.cases import STORED, Case
from tests.golden.run import conditions
from tests.golden.stored import found_of, stored

CLOSE = 1e-4  # what another processor's sums may change of logits


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cases share models and data."""
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("case", STORED, ids=lambda case: case.name)
def test_a_run_gives_what_it_gave_when_it_was_recorded(case: Case, place: Path):
    """The same logits on any machine, and the same bytes where the recorded versions, processor and threads are."""
    logits, hashes = found_of(case, place)
    all_logits, recorded = stored()
    assert (logits - all_logits[case.name]).abs().max() < CLOSE
    if conditions() == recorded["conditions"]:
        expected = recorded["cases"][case.name]
        assert [name for name in {**hashes, **expected} if hashes.get(name) != expected.get(name)] == []
