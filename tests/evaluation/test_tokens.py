import pytest
import torch
from transformers import AutoModelForCausalLM

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.errors import RunFailure
from slimlm.evaluation.tokens import FIGURES, measure_tokens
from slimlm.linalg import likelihood
from slimlm.linalg.likelihood import token_figures
from tests.conftest import CONFIGS, build_tiny, random_tokens


def straight_loop(logits: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[batch, figures, time], one position after another, fp64."""
    found = torch.zeros(targets.shape[0], len(FIGURES), targets.shape[1], dtype=torch.float64)
    for row in range(targets.shape[0]):
        for time in range(targets.shape[1]):
            p, q = (one[row, time].double().softmax(-1) for one in (dense, logits))
            found[row, 0, time] = -q[targets[row, time]].log()
            found[row, 1, time] = -p[targets[row, time]].log()
            found[row, 2, time] = sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))
            found[row, 3, time] = p.argmax() == q.argmax()
    return found


@pytest.mark.parametrize("chunk", [1, 60, 1 << 20])
def test_figures_of_tokens_are_those_of_a_straight_loop(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(likelihood, "CACHED", chunk)
    generator = torch.Generator().manual_seed(0)
    logits, dense = (3 * torch.randn(3, 7, 11, generator=generator) for _ in range(2))
    targets = torch.randint(11, (3, 7), generator=generator)
    found = token_figures(logits, targets, dense)
    assert torch.allclose(found.double(), straight_loop(logits, dense, targets), rtol=1e-4, atol=1e-6)
    assert torch.equal(token_figures(logits, targets)[:, 0], found[:, 0])


def test_a_model_beside_itself_has_no_divergence():
    logits = torch.randn(2, 5, 9)
    logits[..., 3] = -torch.inf  # a token that a model never says
    figures = token_figures(logits, torch.zeros(2, 5, dtype=torch.int64), logits)
    assert figures[:, 2].abs().max() == 0
    assert figures[:, 3].min() == 1


def test_of_one_model_and_of_two_it_is_the_same_number(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"]).eval()
    other = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"]).eval()
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(0.5)
    tokens = random_tokens(5, 16)
    both = measure_tokens(other, model, tokens, 2)
    assert both.shape == (5, len(FIGURES), 15)
    assert torch.equal(both[:, :1], measure_tokens(other, None, tokens, 2))
    assert torch.equal(both[:, 1:2], measure_tokens(model, None, tokens, 2))
    assert both[:, 2].min() > 0


def test_nan_is_an_error(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(build_tiny(CONFIGS["llama"], tmp_path / "model")).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RunFailure, match="NaN"):
        measure_tokens(model, None, random_tokens(2, 8), 2)
