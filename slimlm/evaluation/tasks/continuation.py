"""Questions for the task python_reference_continuation.

lm-eval loads this file by path, so it imports nothing of slimlm. A passage is PASSAGE_WORDS consecutive words of a
topic and its true continuation the CONTINUATION_WORDS after them; the three wrong continuations are true ones of
other topics. Everything is derived from the text and a fixed seed.
"""

import pydoc_data.topics
import random
from typing import Any

SEED = 20241022
QUESTIONS = 500
PASSAGE_WORDS = 48
CONTINUATION_WORDS = 12
CHOICES = 4
MAX_WORD = 24  # table rules are longer


def build(**unused: str) -> dict[str, Any]:
    """The task's dataset: split `test` with passage, four continuations, and the index of the true one."""
    from datasets import Dataset

    return {"test": Dataset.from_list(questions())}


def questions() -> list[dict[str, Any]]:
    """Up to QUESTIONS questions, in a fixed order for a given Python version."""
    chooser = random.Random(SEED)
    spans = _spans()
    chooser.shuffle(spans)
    return [_question(span, spans, chooser) for span in spans[:QUESTIONS]]


def _spans() -> list[tuple[str, str, str]]:
    """(topic, passage, continuation), without overlap."""
    step = PASSAGE_WORDS + CONTINUATION_WORDS
    found = []
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        words = [word for word in text.split() if len(word) <= MAX_WORD]
        for start in range(0, len(words) - step + 1, step):
            middle = start + PASSAGE_WORDS
            found.append((topic, " ".join(words[start:middle]), " ".join(words[middle : start + step])))
    return found


def _question(span: tuple[str, str, str], spans: list[tuple[str, str, str]], chooser: random.Random) -> dict[str, Any]:
    topic, passage, truth = span
    options = [truth]
    while len(options) < CHOICES:
        other_topic, _, other = chooser.choice(spans)
        if other_topic != topic and other not in options:
            options.append(other)
    chooser.shuffle(options)
    return {
        "passage": passage,
        "continuations": [f" {option}" for option in options],
        "answer": options.index(truth),
    }
