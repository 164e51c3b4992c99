import math

import pytest

from slimlm.evaluation.questions import answer_of, lopsided, lost_questions, task_pairs


def sample(number: int, scores: list[float], target: int, passage: str = "", **more) -> dict:
    right = float(max(range(len(scores)), key=scores.__getitem__) == target)
    return {
        "doc_id": number, "doc": {"passage": passage}, "target": target, "arguments": [("question", "answer")],
        "filtered_resps": [(score, False) for score in scores], "filter": "none", "metrics": ["acc"], "acc": right,
        **more,
    }  # fmt: skip


def found(**tasks: list[dict]) -> dict:
    results = {
        name: {"acc,none": sum(one["acc"] for one in samples) / len(samples), "acc_stderr,none": 0.1, "alias": name}
        for name, samples in tasks.items()
    }
    return {
        "results": results, "group_subtasks": {}, "samples": tasks, "versions": {}, "n-samples": {},
        "higher_is_better": {name: {"acc": True} for name in tasks},
    }  # fmt: skip


RIGHT, WRONG = [0.0, -3.0], [-3.0, 0.0]


def answered(*right: bool) -> list[dict]:
    return [sample(number, RIGHT if one else WRONG, 0) for number, one in enumerate(right)]


def test_a_pair_of_scores():
    own, dense = found(a=answered(True, False, False, True)), found(a=answered(True, True, False, False))
    pair = task_pairs(own, dense)["a"]["acc"]
    assert (pair["change"], pair["lost"], pair["won"]) == (0, 0.25, 0.25)
    assert pair["percent_of_dense"] == 100
    assert pair["stderr"] == pytest.approx(math.sqrt(2 / 3) / 2)


def test_questions_about_one_passage_widen_the_error():
    def of(values: list[bool], passages: list[str]) -> dict:
        samples = answered(*values)
        for one, passage in zip(samples, passages, strict=True):
            one["doc"] = {"passage": passage * 200}
        return found(a=samples)

    own, dense = [False, False, True, True], [True, True, True, True]
    apart = task_pairs(of(own, list("abcd")), of(dense, list("abcd")))["a"]["acc"]
    together = task_pairs(of(own, list("aabb")), of(dense, list("aabb")))["a"]["acc"]
    assert together["clusters"] == 2
    assert together["stderr"] > apart["stderr"]


def test_a_group_that_counts_every_question_is_pooled():
    own = found(a=answered(True, False), b=answered(True, True, False, False))
    dense = found(a=answered(True, True), b=answered(True, True, True, False))
    for one, score in ((own, 3 / 6), (dense, 5 / 6)):
        one["results"]["group"] = {"acc,none": score}
        one["group_subtasks"] = {"group": ["a", "b"]}
    pair = task_pairs(own, dense)["group"]["acc"]
    assert pair["flips"] == pytest.approx(2 / 6)
    assert pair["clusters"] == 6


def test_a_group_that_counts_every_task_adds_up_their_errors():
    own = found(a=answered(True, False), b=answered(True, True, False, False))
    dense = found(a=answered(True, True), b=answered(True, True, True, False))
    for one, score in ((own, 0.5), (dense, (1 + 0.75) / 2)):
        one["results"]["group"] = {"acc,none": score}
        one["group_subtasks"] = {"group": ["a", "b"]}
    pairs = task_pairs(own, dense)
    errors = [pairs[name]["acc"]["stderr"] for name in ("a", "b")]
    assert pairs["group"]["acc"]["stderr"] == pytest.approx(math.hypot(*errors) / 2)


def test_a_score_that_is_no_mean_has_no_error():
    own, dense = found(a=answered(True, False)), found(a=answered(True, True))
    own["results"]["a"]["acc,none"] = 0.7  # as of an F1 over all questions
    pair = task_pairs(own, dense)["a"]["acc"]
    assert pair["stderr"] is None
    assert pair["change"] == pytest.approx(-0.3)


def test_one_answer_for_all_questions_is_said():
    always = [sample(number, [0.0, -1.0], number % 2) for number in range(20)]
    (line,) = lopsided(found(a=always))
    assert line.startswith("a: 100% of the questions get one answer, 0")


def test_it_is_not_where_that_answer_is_right():
    assert lopsided(found(a=[sample(number, [0.0, -1.0], 0) for number in range(20)])) == []


def test_answers():
    assert answer_of(sample(0, [-2.0, -1.0, -5.0], 0)) == 1
    assert answer_of({"filtered_resps": [" 42 "]}) == "42"
    assert answer_of({"filtered_resps": [(-12.0, True)]}) is None


def test_lost_questions_come_worst_first():
    dense = found(a=[sample(n, [0.0, -1.0], 0) for n in range(4)])
    own = found(a=[sample(0, [-2.0, 0.0], 0), sample(1, [0.0, -1.0], 0), sample(2, [-9.0, 0.0], 0), *answered(True)])
    own["samples"]["a"][3]["doc_id"] = 3
    lost = lost_questions(own, dense, 5)["a"]
    assert [(one["document"], one["margin_change"]) for one in lost] == [(2, -10.0), (0, -3.0)]
    assert len(lost_questions(own, dense, 1)["a"]) == 1


def test_metrics_that_are_no_numbers_are_left_alone():
    """As ifeval's and some perplexities are."""
    own, dense = ([{**one, "acc": [True, False], "ppl": (1.0, 2)} for one in answered(True)] for _ in range(2))
    for samples in (own, dense):
        samples[0]["metrics"] = ["acc", "ppl"]
    results = {"a": {"acc,none": 0.5, "ppl,none": 3.0}}
    pair = [{**found(b=answered(True)), "results": results, "samples": {"a": samples}} for samples in (own, dense)]
    assert lost_questions(pair[0], pair[1], 3) == {}
    assert task_pairs(pair[0], pair[1])["a"]["acc"]["stderr"] is None


def test_what_is_better_when_it_is_less_has_no_percentage():
    one = found(a=answered(True, False))
    one["higher_is_better"] = {"a": {"acc": False}}
    assert task_pairs(one, one)["a"]["acc"]["percent_of_dense"] is None


def test_what_was_not_right_before_is_not_lost():
    assert lost_questions(found(a=answered(False)), found(a=answered(False)), 5) == {}
