"""The refit of the head, from what stock models' final norms give."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimlm.fit.lm_head import EPOCHS
from slimlm.linalg.softmax import MapFit
from tests.conftest import CONFIGS, build_tiny, stream
from tests.helpers import inputs_of, ridge_by_hand, run, stock


def peaked(path: Path) -> Path:
    """A model that is sure of what it predicts, so that least squares on logits is not what matters."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = 256
    path = build_tiny(config, path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] *= 8
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def divergence(dense: Tensor, small: Tensor) -> float:
    """KL(dense || small), a token, of logits."""
    wanted, got = dense.double().log_softmax(-1), small.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.mark.parametrize(
    "settings", [{"method": "slice", "widths": "hidden=16"}, {"method": "slimlm", "sparsity": 0.7}]
)
def test_the_head_is_fitted_to_the_predictions_and_says_how_far_from_them_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict
):
    """Held-out divergences before and after: of the least-squares map in the metric of the head, and of the result."""
    path = peaked(tmp_path / "model")
    tokens = torch.randint(0, 256, (60, 32), generator=torch.Generator().manual_seed(1))
    fitted, step = [], MapFit.step
    monkeypatch.setattr(
        MapFit, "step", lambda fit, gradient, tokens, done: (fitted.append(tokens), step(fit, gradient, tokens, done))
    )
    _, outcome, _ = run(stream(path), tokens, tmp_path / "run", **settings)
    dense, small = map(stock, (path, tmp_path / "run" / "model"))
    notes = outcome.notes["refit"]["head"] if settings["method"] == "slice" else outcome.notes["head"]
    held = torch.arange(60) % 5 == 4
    assert sum(fitted) == EPOCHS * int((~held).sum()) * 32
    wanted = dense(tokens[held]).logits
    assert notes["kl"] == pytest.approx(divergence(wanted, small(tokens[held]).logits), rel=1e-3)
    (y,), (x,) = (inputs_of(model, tokens, ["lm_head"]) for model in (dense, small))
    head, gain = dense.lm_head.weight.double(), dense.model.norm.weight.double()
    if settings["method"] == "slice":
        prior = gain[:, None] * outcome.basis.double() * 2**0.5
    else:
        prior = torch.eye(32).double()
    onto, _ = ridge_by_hand(x, y, prior, metric=head.T @ head)
    least_squares = divergence(wanted, x[held] @ onto.T @ head.T)
    assert notes["kl_least_squares"] == pytest.approx(least_squares, rel=1e-3)
    assert notes["kl"] < 0.99 * least_squares
