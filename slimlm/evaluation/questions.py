"""What lm-eval found of each question: scores, answers, and what of them changed from one model to another.

`found` is what `lm_eval.simple_evaluate` returns, or the part of it that `kept_of` keeps.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from slimlm.evaluation.harness import task_scores
from slimlm.evaluation.pairs import LOPSIDED, clusters_of_questions, commonest, question_pair
from slimlm.plain import Json

Found = Mapping[str, Any]
Sample = Mapping[str, Any]
KEPT = ("results", "group_subtasks", "higher_is_better", "versions", "n-samples", "samples")
SAME = 1e-9  # mean of the questions' values and task's score, where the score is that mean


def kept_of(found: Found) -> dict[str, Any]:
    """What any figure needs, of all that lm-eval returns."""
    return {name: found.get(name, {}) for name in KEPT}


def task_pairs(found: Found, dense: Found) -> dict[str, dict[str, dict[str, Json]]]:
    """By task and metric: the change, its paired error and flips, and the percentage of the dense model's score that
    is left, if more is better. Without an error where a score is no mean over questions."""
    own, before = task_scores(found["results"]), task_scores(dense["results"])
    pairs: dict[str, dict[str, dict[str, Json]]] = {}
    for task, metrics in own.items():
        pairs[task] = {}
        for metric, score in metrics.items():
            value, old = score["value"], before[task][metric]["value"]
            pair = _paired(found, dense, task, metric, (value, old)) or {"change": value - old, "stderr": None}
            name, _, _ = metric.partition(",")
            is_share = bool(old) and found["higher_is_better"].get(task, {}).get(name) is not False
            pairs[task][metric] = {**pair, "percent_of_dense": 100 * (value / old) if is_share else None}
    return pairs


def _paired(found: Found, dense: Found, task: str, metric: str, scores: tuple[float, float]) -> dict[str, Json] | None:
    leaves = _leaves(found, task)
    parts = [_values(one, leaf, metric) for leaf in leaves for one in (found, dense)]
    if not parts or any(part is None for part in parts):
        return None
    each = [(parts[n] or [], parts[n + 1] or []) for n in range(0, len(parts), 2)]
    pooled = [[value for pair in each for value in pair[side]] for side in (0, 1)]
    documents = [sample["doc"] for leaf in leaves for sample in _of_filter(found, leaf, metric)]
    if all(_is_mean(values, score) for values, score in zip(pooled, scores, strict=True)):
        return question_pair(pooled[0], pooled[1], clusters_of_questions(documents))
    if not all(_is_mean([sum(p[side]) / len(p[side]) for p in each], scores[side]) for side in (0, 1)):
        return None
    errors = [_error(question_pair(*pair, torch.arange(len(pair[0])))["stderr"]) for pair in each]
    return {"change": scores[0] - scores[1], "stderr": math.hypot(*errors) / len(each)}


def _error(found: Json) -> float:
    return found if isinstance(found, float) else 0.0


def _is_mean(values: Sequence[float], score: float) -> bool:
    return bool(values) and abs(sum(values) / len(values) - score) <= SAME * max(1, abs(score))


def _leaves(found: Found, task: str) -> list[str]:
    """The tasks that a group consists of; a task itself."""
    parts = found["group_subtasks"].get(task) or []
    return [leaf for part in parts for leaf in _leaves(found, part)] if parts else [task]


def _of_filter(found: Found, task: str, metric: str) -> list[Sample]:
    """A task's samples, as one of its filters leaves them: that of the metric."""
    _, _, kind = metric.partition(",")
    return [sample for sample in found["samples"].get(task, []) if sample["filter"] == (kind or "none")]


def _values(found: Found, task: str, metric: str) -> list[float] | None:
    name, _, _ = metric.partition(",")
    values = [sample.get(name) for sample in _of_filter(found, task, metric)]
    numbers = [float(value) for value in values if isinstance(value, (bool, int, float))]
    return numbers if numbers and len(numbers) == len(values) else None


def lopsided(found: Found) -> list[str]:
    """A line for each task where one answer takes more than LOPSIDED of the questions, though it is right less
    often."""
    lines = []
    for task, samples in found["samples"].items():
        answers = [answer for answer in map(answer_of, samples) if answer is not None]
        best, share = commonest(answers)
        _, right = commonest([str(sample["target"]) for sample in samples])
        if share > LOPSIDED >= right and len(answers) > 1:
            lines.append(f"{task}: {share:.0%} of the questions get one answer, {best!r}: its score says little")
    return lines


def answer_of(sample: Sample) -> Hashable:
    """The number of the choice that is likeliest, or the text that was written; None where neither is."""
    answers = sample["filtered_resps"]
    scores = _log_likelihoods(answers)
    if len(scores) > 1:
        return max(range(len(scores)), key=scores.__getitem__)
    return answers[0].strip() if len(answers) == 1 and isinstance(answers[0], str) else None


def _log_likelihoods(answers: Iterable[Json]) -> list[float]:
    """Of choices; none where a model was asked something else."""
    scores = []
    for one in answers:
        if not (isinstance(one, Sequence) and len(one) == 2 and isinstance(one[0], float)):
            return []
        scores.append(one[0])
    return scores


def lost_questions(found: Found, dense: Found, count: int) -> dict[str, list[dict[str, Json]]]:
    """By task, the `count` questions that the dense model has right and this one wrong, the worst first: those whose
    right choice lost most log-likelihood against the best wrong one, in nats."""
    lost: dict[str, list[dict[str, Json]]] = defaultdict(list)
    for task, samples in found["samples"].items():
        before = {(sample["doc_id"], sample["filter"]): sample for sample in dense["samples"].get(task, [])}
        for sample in samples:
            old = before[sample["doc_id"], sample["filter"]]
            metric = next((name for name in sample["metrics"] if _is_lost(sample.get(name), old.get(name))), None)
            if metric is not None:
                lost[task].append(_lost(sample, old, metric))
    return {task: sorted(found, key=_loss)[:count] for task, found in lost.items()}


def _is_lost(own: Json, before: Json) -> bool:
    return isinstance(own, (int, float)) and isinstance(before, (int, float)) and (own, before) == (0, 1)


def _loss(question: Mapping[str, Any]) -> tuple[float, int]:
    margin = question["margin_change"]
    return (0.0 if margin is None else margin), question["document"]


def _lost(sample: Sample, old: Sample, metric: str) -> dict[str, Json]:
    margins = [_margin(one) for one in (sample, old)]
    own, before = margins
    return {
        "document": sample["doc_id"],
        "metric": metric,
        "margin_change": None if own is None or before is None else own - before,
        "question": str(sample["arguments"][0][0]),
        "target": str(sample["target"]),
        "answer": str(answer_of(sample)),
    }


def _margin(sample: Sample) -> float | None:
    """Log-likelihood of the right choice over that of the best wrong one."""
    scores, target = _log_likelihoods(sample["filtered_resps"]), sample["target"]
    if not isinstance(target, int) or not 0 <= target < len(scores) or len(scores) < 2:
        return None
    return scores[target] - max(score for number, score in enumerate(scores) if number != target)
