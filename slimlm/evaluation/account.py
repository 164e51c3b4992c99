"""From samples to figures: every number that `slimlm eval` shows comes from here, out of what was measured of each
token, question and continuation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimlm.evaluation.generation import Continuation, generation_pair, habits
from slimlm.evaluation.harness import task_scores
from slimlm.evaluation.pairs import clusters_of_tokens, divergence_figures, text_pair
from slimlm.evaluation.perplexity import counted
from slimlm.evaluation.questions import lopsided, lost_questions, task_pairs
from slimlm.evaluation.text import TestWindows
from slimlm.evaluation.tokens import FIGURES

LN2 = 0.6931471805599453


@dataclass
class Samples:
    """What was measured of a model.

    facts: name, path, sizes, and how it was measured, as JSON holds them. figures: by text, [windows, figures, time],
    as `measure_tokens` gives them. found: of lm-eval, as `kept_of` keeps it; None without tasks. written: of every
    prompt; None where nothing was.
    """

    facts: dict[str, Any]
    figures: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, Any] | None = None
    written: list[Continuation] | None = None

    @property
    def has_dense(self) -> bool:
        """Whether the dense model's figures stand beside."""
        return all(figures.shape[1] > 1 for figures in self.figures.values())


def entry_of(samples: Samples, texts: Sequence[TestWindows]) -> dict[str, Any]:
    """The figures of one model by itself."""
    dtype = getattr(torch, samples.facts["dtype"])
    figures = samples.figures
    entry = {**samples.facts, "texts": {text.name: _text(figures[text.name], text, dtype) for text in texts}}
    entry["tasks"] = {} if samples.found is None else task_scores(samples.found["results"])
    entry["warnings"] = [] if samples.found is None else lopsided(samples.found)
    if samples.found is not None:
        entry["task_versions"] = samples.found["versions"]
        entry["task_samples"] = {task: counts["effective"] for task, counts in samples.found["n-samples"].items()}
    entry["generation"] = None
    if samples.written is not None:
        entry["generation"] = {way: asdict(found) for way, found in habits(samples.written).items()}
    return entry


def _text(figures: Tensor, text: TestWindows, dtype: torch.dtype) -> dict[str, Any]:
    nll = figures[:, 0]
    size = int(text.lengths[:, 1:].sum())
    likelihood = counted(nll, dtype)
    side: dict[str, Any] = {**likelihood.describe()}
    del side["dtype"]
    return {**side, "bits_per_byte": likelihood.nll / LN2 / size if size else None}


def dense_figures(samples: Samples) -> dict[str, Tensor]:
    """What was measured of the dense model beside another one, as if by itself: [windows, 1, time] by text."""
    return {name: figures[:, 1:2] for name, figures in samples.figures.items()}


def pair_of(own: Samples, dense: Samples, texts: Sequence[TestWindows], fragile: int) -> dict[str, Any]:
    """What changed from the dense model to this one. fragile: so many of the documents that it lost are named."""
    pair: dict[str, Any] = {"model": own.facts["name"], "against": dense.facts["name"]}
    pair["texts"] = {text.name: _text_pair(own.figures[text.name], text) for text in texts}
    tasks = own.found is not None and dense.found is not None
    pair["tasks"] = task_pairs(own.found or {}, dense.found or {}) if tasks else {}
    written = own.written is not None and dense.written is not None
    pair["generation"] = generation_pair(own.written or [], dense.written or []) if written else None
    if fragile:
        pair["fragile"] = {
            "texts": {text.name: _lost_windows(own.figures[text.name], text, fragile) for text in texts},
            "tasks": lost_questions(own.found or {}, dense.found or {}, fragile) if tasks else {},
        }
    return pair


def _text_pair(figures: Tensor, text: TestWindows) -> dict[str, Any]:
    clusters = clusters_of_tokens(text.documents[:, 1:])
    found = text_pair(figures[:, 0], figures[:, 1], clusters)
    if figures.shape[1] == len(FIGURES):
        found |= divergence_figures(figures[:, 2], figures[:, 3], clusters)
    return found


def _lost_windows(figures: Tensor, text: TestWindows, count: int) -> list[dict[str, Any]]:
    """The windows whose log-perplexity rose most, worst first, in nats a token."""
    rises = (figures[:, 0].double() - figures[:, 1].double()).mean(1)
    order = [place for place in rises.argsort(descending=True, stable=True)[:count].tolist() if rises[place] > 0]
    documents = text.documents[:, 0].tolist()
    return [{"window": place, "document": documents[place], "change": float(rises[place])} for place in order]


def accounts(
    models: Sequence[Samples], dense: Samples | None, texts: Sequence[TestWindows], fragile: int = 0
) -> dict[str, Any]:
    """Entries of all models, the dense one last; of each what changed against it; and what they wrote, the dense one
    first."""
    everyone = [*models, *([] if dense is None else [dense])]
    return {
        "models": [entry_of(one, texts) for one in everyone],
        "pairs": [] if dense is None else [pair_of(one, dense, texts, fragile) for one in models],
        "written": [
            {"model": one.facts["name"], "texts": list(map(asdict, one.written))}
            for one in everyone[::-1]
            if one.written
        ],
    }
