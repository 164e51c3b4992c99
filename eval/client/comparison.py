"""What the programs that run in clients' environments have in common: what they are asked, and how they answer.

It needs numpy, and nothing of slimlm.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy import ndarray

TOLERANCE = 1e-3  # of float32 logits of magnitude 10 or so


@dataclass(frozen=True)
class Case:
    """A model, and what transformers 5 makes of it in float32, as reference.py writes it."""

    model: Path
    scratch: Path  # for what a client makes of the model
    dense: Path | None  # scratch folder of the model to compare speeds with
    tools: Path | None  # folder of the client's source
    pythons: list[Path]  # other environments' interpreters
    prompts: list[list[int]]
    logits: list[ndarray]  # of each prompt, [time, vocabulary]
    greedy: list[int]  # tokens that follow the first prompt
    ends: list[int]  # tokens at which a client may stop
    texts: list[str]
    tokens: list[list[int]]  # of each text, without special tokens
    windows: ndarray  # tokens of a longer text, [windows, time]


def case_of() -> Case:
    """What the command line asks for. From here on `import slimlm` fails."""
    sys.modules["slimlm"] = None  # type: ignore[assignment]
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--tools", type=Path)
    parser.add_argument("--pythons", type=Path, nargs="*", default=[])
    asked = vars(parser.parse_args())
    with numpy.load(asked.pop("reference"), allow_pickle=False) as found:
        facts = json.loads(str(found["facts"]))
        logits = [found[f"logits{index}"] for index in range(len(facts["prompts"]))]
        return Case(**asked, **facts, logits=logits, windows=found["windows"])


def trusts(model: Path) -> bool:
    """Whether the checkpoint brings code of its own."""
    return "auto_map" in json.loads((model / "config.json").read_text())


def answer(facts: dict[str, Any]) -> None:
    """The last line of a program's output, the one that counts; `passes` is among the facts."""
    print(json.dumps(facts), flush=True)


def compared(case: Case, logits: Sequence[Any], greedy: Sequence[int]) -> dict[str, Any]:
    """How far a client's logits (of all places of every prompt, or the last ones) and tokens are from the reference."""
    gap = max(difference(theirs, ours) for theirs, ours in zip(logits, case.logits, strict=True))
    wanted, got = (until(case.ends, tokens) for tokens in (case.greedy, greedy))
    pairs = zip(wanted, got, strict=False)
    equal = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(wanted), len(got)))
    return {"passes": gap <= TOLERANCE and wanted == got, "difference": gap, "equal": equal, "of": len(wanted)}


def difference(theirs: Any, ours: ndarray) -> float:
    """Largest; a client's logits may be of more words than there are."""
    theirs = numpy.asarray(theirs, dtype=numpy.float32)[:, : ours.shape[1]]
    return float(numpy.nan_to_num(numpy.abs(theirs - ours[-len(theirs) :]), nan=numpy.inf).max())


def until(ends: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """The tokens before the first of `ends`."""
    return [int(token) for token in tokens[: next((n for n, token in enumerate(tokens) if token in ends), None)]]


def tokenized(case: Case, encode: Callable[[str], Sequence[int]]) -> str:
    """What the client's own tokenizer does to the texts, in words."""
    try:
        found = [[int(token) for token in encode(text)] for text in case.texts]
    except Exception as error:  # its failure is a result
        return f"{type(error).__name__}: {error}".splitlines()[0]
    other = [text for text, theirs, ours in zip(case.texts, found, case.tokens, strict=True) if theirs != ours]
    return f"other ids: {other[0]!r}" if other else "same"
