import difflib

import pytest

from slimlm.evaluation.corrupt import CORRUPTIONS, RATE
from slimlm.evaluation.sources import python_reference

TEXT = "\n\n".join(python_reference()[:20])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_about_one_word_in_ten_changes_the_same_ones_every_time(name: str):
    corrupt = CORRUPTIONS[name]
    changed = corrupt(TEXT, 0)
    assert changed == corrupt(TEXT, 0) != corrupt(TEXT, 1)
    before, after = TEXT.split(" "), changed.split(" ")
    assert len(before) == len(after)
    share = sum(a != b for a, b in zip(before, after, strict=True)) / len(before)
    assert 0.5 * RATE < share < 1.5 * RATE


def test_typos_swap_neighbours():
    for a, b in zip(TEXT.split(), CORRUPTIONS["typos"](TEXT, 0).split(), strict=True):
        assert sorted(a) == sorted(b)


def test_drop_leaves_out_single_letters():
    changed = CORRUPTIONS["drop"](TEXT, 0)
    steps = difflib.SequenceMatcher(None, TEXT[:3000], changed[: 3000 - 40], autojunk=False).get_opcodes()[:-1]
    assert {kind for kind, *_ in steps} <= {"equal", "delete"}
    assert len(changed) < len(TEXT)


def test_case_changes_nothing_else():
    assert CORRUPTIONS["case"](TEXT, 0).lower() == TEXT.lower()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_letters_of_any_alphabet_and_no_letters_at_all(name: str):
    assert CORRUPTIONS[name]("12 34 -- !", 0) == "12 34 -- !"
    assert isinstance(CORRUPTIONS[name]("Ünïcode слова 漢字 " * 50, 0), str)
