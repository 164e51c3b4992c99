"""Statistics of two models on the same documents: differences with their own standard errors, flips, divergences.

What both models find hard cancels out of a difference of pairs, so that its standard error is a fraction of that of
either score. Documents that belong together (questions about one passage, tokens of one text) are a cluster, and count
as one draw (arXiv 2411.00640). How often an answer changes its correctness is as telling as the
score, which wins and losses cancel out of (arXiv 2407.09141).
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from slimlm.plain import Json

FEWEST = 30  # documents of a text for them to be its clusters; of fewer, windows are
LONG = 100  # characters of a field that two questions share for them to be about one passage
MOST = 700.0  # nats, beyond which there is no such floating-point number
LOPSIDED = 0.9  # of a task's questions, above which one answer is suspicious


@dataclass(frozen=True)
class Mean:
    """Of values, with its standard error; None where there is one cluster only, which tells nothing. clusters: how
    many."""

    value: float
    stderr: float | None
    clusters: int


def clustered_mean(values: Annotated[Tensor, "n"], clusters: Annotated[Tensor, "n", int]) -> Mean:
    """The mean, and the error it has where the values of a cluster are not independent: the square root of
    `g / (g - 1) sum_g (sum_i in g (v_i - mean))^2 / n^2`. clusters: the number of each value's."""
    values = values.double()
    mean = values.mean()
    numbers, index = clusters.unique(return_inverse=True)
    residuals = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, index, values - mean)
    count = len(numbers)
    if count < 2:
        return Mean(float(mean), None, count)
    variance = residuals.square().sum() * count / (count - 1) / len(values) ** 2
    return Mean(float(mean), math.sqrt(float(variance)), count)


class Clusters(NamedTuple):
    """What a text's clusters are, and the number of each token's."""

    kind: str
    numbers: Annotated[Tensor, "windows time", int]


def clusters_of_tokens(documents: Annotated[Tensor, "windows time", int]) -> Clusters:
    """documents: the number of each token's."""
    if len(documents.unique()) >= FEWEST:
        return Clusters("documents", documents)
    return Clusters("windows", torch.arange(len(documents))[:, None].expand_as(documents))


def clusters_of_questions(documents: Sequence[Json]) -> Tensor:
    """The number of each question's cluster: [n]. Those that share a text of LONG characters in some field are about
    one passage; what nearly all share is none, but an instruction."""
    leader: dict[Hashable, int] = {}
    numbers = list(range(len(documents)))
    passages = Counter(passage for document in documents for passage in _long_fields(document))

    def root(number: int) -> int:
        while numbers[number] != number:
            number = numbers[number]
        return number

    for number, document in enumerate(documents):
        for passage in _long_fields(document):
            if passages[passage] <= LOPSIDED * len(documents):
                numbers[root(number)] = root(leader.setdefault(passage, number))
    return torch.tensor([root(number) for number in range(len(documents))])


def _long_fields(document: Json) -> list[tuple[str, str]]:
    fields = document.items() if isinstance(document, Mapping) else ()
    return [(name, text) for name, text in fields if isinstance(text, str) and len(text) >= LONG]


def text_pair(
    nll: Annotated[Tensor, "windows time"], dense: Annotated[Tensor, "windows time"], clusters: Clusters
) -> dict[str, Json]:
    """The change of log-perplexity, in nats a token, as JSON holds it."""
    mean = clustered_mean((nll.double() - dense.double()).flatten(), clusters.numbers.flatten())
    return {
        "log_perplexity_change": mean.value,
        "stderr": mean.stderr,
        "perplexity_ratio": math.exp(min(mean.value, MOST)),
        "clusters": {"of": clusters.kind, "count": mean.clusters},
    }


def divergence_figures(
    kl: Annotated[Tensor, "windows time"], same_top: Annotated[Tensor, "windows time"], clusters: Clusters
) -> dict[str, Json]:
    """KL(dense || compressed) of next-token distributions, in nats, and how often both find the same token likeliest,
    as JSON holds it."""
    mean, agreement = (clustered_mean(one.flatten(), clusters.numbers.flatten()) for one in (kl, same_top))
    ordered = kl.double().flatten().sort().values
    return {
        "kl": {
            "mean": mean.value,
            "stderr": mean.stderr,
            "median": float(ordered[(len(ordered) - 1) // 2]),
            "p99.9": float(ordered[math.ceil(0.999 * len(ordered)) - 1]),
        },
        "same_top": {"value": agreement.value, "stderr": agreement.stderr},
    }


def question_pair(
    values: Sequence[float], dense: Sequence[float], clusters: Annotated[Tensor, "n", int]
) -> dict[str, Json]:
    """The change of a task's score; where every question is right or wrong, also flips: the shares that were lost and
    won. As JSON holds it."""
    own, before = torch.tensor(values, dtype=torch.float64), torch.tensor(dense, dtype=torch.float64)
    mean = clustered_mean(own - before, clusters)
    found: dict[str, Json] = {"change": mean.value, "stderr": mean.stderr, "clusters": mean.clusters}
    if set(values) | set(dense) <= {0.0, 1.0}:
        lost, won = float((own < before).double().mean()), float((own > before).double().mean())
        found |= {"flips": lost + won, "lost": lost, "won": won}
    return found


def commonest(answers: Sequence[Hashable]) -> tuple[Hashable, float]:
    """The commonest of the answers, and its share; None and 0 of no answers."""
    (best, count), *_ = Counter(answers).most_common(1) or [(None, 0)]
    return best, count / max(1, len(answers))
