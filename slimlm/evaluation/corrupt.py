"""Text as people mistype it: what a model says of it changes before what it says of clean text does.

Every function makes the same of the same text and seed, and changes about one word in ten.
"""

import random
import re
from collections.abc import Callable

RATE = 0.1  # of the words
WORD = re.compile(r"[^\W\d_]{2,}")


def _words_changed(text: str, chance: random.Random, change: Callable[[str, random.Random], str]) -> str:
    return WORD.sub(lambda found: change(found[0], chance) if chance.random() < RATE else found[0], text)


def typos(text: str, seed: int) -> str:
    """Two neighbouring letters of a word in the wrong order."""

    def swap(word: str, chance: random.Random) -> str:
        place = chance.randrange(len(word) - 1)
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

    return _words_changed(text, random.Random(f"typos {seed}"), swap)


def drop(text: str, seed: int) -> str:
    """A letter of a word left out."""

    def without_one(word: str, chance: random.Random) -> str:
        place = chance.randrange(len(word))
        return word[:place] + word[place + 1 :]

    return _words_changed(text, random.Random(f"drop {seed}"), without_one)


def case(text: str, seed: int) -> str:
    """A word in capitals; one that was in capitals, in small letters."""
    return _words_changed(text, random.Random(f"case {seed}"), lambda word, _: word.swapcase())


CORRUPTIONS: dict[str, Callable[[str, int], str]] = {"typos": typos, "drop": drop, "case": case}
