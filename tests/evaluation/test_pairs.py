import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimlm.evaluation.pairs import (
    Clusters,
    clustered_mean,
    clusters_of_questions,
    clusters_of_tokens,
    commonest,
    divergence_figures,
    question_pair,
    text_pair,
)


def bootstrap(values: torch.Tensor, clusters: torch.Tensor, draws: int = 4000) -> float:
    """The spread of the mean when whole clusters are drawn with replacement."""
    groups = [values[clusters == number] for number in clusters.unique()]
    generator = torch.Generator().manual_seed(0)
    sums, sizes = torch.stack([group.sum() for group in groups]), torch.tensor([len(group) for group in groups])
    picked = torch.randint(len(groups), (draws, len(groups)), generator=generator)
    return float((sums[picked].sum(1) / sizes[picked].sum(1)).std())


def clustered(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values that share much within a cluster; clusters of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 20, (120,), generator=generator)
    clusters = torch.arange(120).repeat_interleave(sizes)
    shared = torch.randn(120, generator=generator, dtype=torch.float64)[clusters]
    return shared + torch.randn(len(clusters), generator=generator, dtype=torch.float64), clusters


@pytest.mark.parametrize("seed", range(3))
def test_the_standard_error_is_that_of_a_bootstrap_over_documents(seed: int):
    values, clusters = clustered(seed)
    mean = clustered_mean(values, clusters)
    assert mean.stderr == pytest.approx(bootstrap(values, clusters), rel=0.08)
    naive = float(values.std() / math.sqrt(len(values)))
    assert mean.stderr > 2 * naive  # as if every value told something new
    assert mean.value == pytest.approx(float(values.mean()))
    assert mean.clusters == 120


def test_of_clusters_of_one_it_is_the_textbooks():
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = clustered_mean(values, torch.arange(50))
    assert mean.stderr == pytest.approx(float(values.std() / math.sqrt(50)), rel=1e-12)


def test_one_cluster_has_no_error():
    assert clustered_mean(torch.tensor([1.0, 3.0]), torch.zeros(2)).stderr is None


def test_the_difference_of_pairs_has_a_smaller_error_than_either_score():
    """What both models find hard cancels out."""
    generator = torch.Generator().manual_seed(0)
    hard = 3 * torch.randn(60, 20, generator=generator)
    clusters = Clusters("windows", torch.arange(60)[:, None].expand(60, 20))
    pair = text_pair(hard + 0.1 + 0.01 * torch.randn(60, 20, generator=generator), hard, clusters)
    assert pair["log_perplexity_change"] == pytest.approx(0.1, abs=1e-3)
    assert pair["stderr"] < 0.001
    assert pair["clusters"] == {"of": "windows", "count": 60}


def test_documents_are_the_clusters_of_a_text_that_has_many():
    many = torch.arange(40).repeat_interleave(5).view(10, 20)
    assert clusters_of_tokens(many)[0] == "documents"
    kind, clusters = clusters_of_tokens(torch.zeros(10, 20, dtype=torch.int64))
    assert kind == "windows"
    assert torch.equal(clusters[:, 0], torch.arange(10))
    assert torch.equal(clusters, clusters[:, :1].expand(10, 20))


def test_questions_about_one_passage_are_a_cluster():
    passage, other = "a long passage " * 10, "another long one " * 10
    documents = [
        {"passage": passage, "question": "a"},
        {"passage": "short", "question": "b"},
        {"passage": other, "question": "c"},
        {"passage": passage, "question": "d"},
        {"passage": "short", "question": "e"},
        {"passage": other, "note": passage},  # the same words in another field are no passage of both
        "no fields at all",
    ]
    clusters = clusters_of_questions(documents).tolist()
    assert clusters[0] == clusters[3]
    assert clusters[2] == clusters[5]
    assert len(set(clusters)) == 5


def test_an_instruction_that_all_questions_carry_is_no_passage():
    documents = [{"instruction": "x" * 200, "passage": str(number) * 120} for number in range(8)]
    assert len(clusters_of_questions(documents).unique()) == 8


def test_chains_of_shared_passages_are_one_cluster():
    a, b = "x" * 120, "y" * 120
    documents = [{"p": a}, {"q": b}, {"p": a, "q": b}]
    assert len(clusters_of_questions(documents).unique()) == 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_flips_are_those_of_a_straight_loop(answers: list[tuple[bool, bool]]):
    own, dense = ([float(pair[side]) for pair in answers] for side in (0, 1))
    pair = question_pair(own, dense, torch.arange(len(answers)))
    lost = sum(b and not a for a, b in answers) / len(answers)
    won = sum(a and not b for a, b in answers) / len(answers)
    assert (pair["lost"], pair["won"]) == (pytest.approx(lost), pytest.approx(won))
    assert pair["flips"] == pytest.approx(lost + won)
    assert pair["change"] == pytest.approx(won - lost)


def test_scores_that_are_not_right_or_wrong_have_no_flips():
    assert "flips" not in question_pair([0.5, 1.0], [0.25, 1.0], torch.arange(2))


def test_quantiles_of_divergences_are_values_that_occur():
    kl = torch.arange(2000).float().view(20, 100)
    clusters = Clusters("windows", torch.arange(20)[:, None].expand(20, 100))
    figures = divergence_figures(kl, torch.ones(20, 100), clusters)
    assert figures["kl"]["median"] == 999
    assert figures["kl"]["p99.9"] == 1997
    assert figures["kl"]["mean"] == pytest.approx(999.5)
    assert figures["same_top"] == {"value": 1.0, "stderr": 0.0}


def test_the_commonest_answer_and_its_share():
    assert commonest([1, 2, 1, 1]) == (1, 0.75)
    assert commonest([]) == (None, 0.0)
