"""The basis of the residual stream, from statistics worked out on the stock model."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.deal import seed_of
from slimlm.linalg.draws import draw
from slimlm.linalg.pca import principal_basis
from slimlm.slice import run as slicing
from slimlm.slice.basis import MASSIVE
from slimlm.statistics.sweep import Losses, gradient_covariance
from tests.conftest import random_tokens, stream
from tests.helpers import inputs_of, run_at, stock, walks_of

NORMS = [f"model.layers.{block}.{norm}_layernorm" for block in range(3) for norm in ("input", "post_attention")]


def gram_by_hand(path: Path, tokens: Tensor) -> Tensor:
    """Of the stream that every norm gets, each token divided by its root mean square."""
    streams = [x.flatten(0, 1) for x in inputs_of(stock(path), tokens, [*NORMS, "model.norm"])]
    normalised = [x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() for x in streams]
    return sum(x.T @ x for x in normalised)


@pytest.mark.parametrize("weighting", ["none", "loss"])
def test_the_basis_is_of_the_stream_weighed_by_what_the_loss_feels(tiny_llama: Path, tmp_path: Path, weighting: str):
    """Eigenvectors of G, or of G + G^1/4 C G^1/4 with both of unit trace; largest first."""
    path, tokens = tiny_llama, random_tokens(12, 24)
    model, batches = stream(path), list(tokens.split(4))
    found = slicing._new_basis(run_at(model, batches, tmp_path / "basis", widths="hidden=16", weighting=weighting))
    gram = gram_by_hand(path, tokens)
    beside = run_at(model, batches, tmp_path / "gradients", widths="hidden=16")
    covariance = gradient_covariance(model, Losses(batches, 0), walks_of(beside))
    energies, vectors = torch.linalg.eigh(gram)
    root = vectors @ torch.diag(energies.clamp_min(0) ** 0.25) @ vectors.T
    felt = root @ covariance @ root
    plain, weighed = gram / gram.trace(), gram / gram.trace() + felt / felt.trace()
    expected, other = (weighed, plain) if weighting == "loss" else (plain, weighed)
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(32).double(), atol=1e-9)
    along = found.vectors.T @ expected @ found.vectors
    assert torch.allclose(along, torch.diag(along.diagonal()), atol=1e-5 * float(expected.trace()))
    assert (along.diagonal().diff() <= 1e-6).all()
    elsewhere = found.vectors.T @ other @ found.vectors
    assert (elsewhere - torch.diag(elsewhere.diagonal())).abs().max() > 1e-3


def test_a_blocks_influence_is_how_far_it_turns_the_stream(tiny_llama: Path, tmp_path: Path):
    tokens = random_tokens(6, 24)
    batches = list(tokens.split(4))
    run = run_at(stream(tiny_llama), batches, tmp_path / "basis", widths="hidden=16", weighting="none")
    found = slicing._new_basis(run)
    edges = inputs_of(stock(tiny_llama), tokens, [*NORMS[::2], "model.norm"])
    for block, (before, after) in enumerate(pairwise(edges)):
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert float(found.influence[block]) == pytest.approx(1 - float(cosine.mean()), abs=1e-6)


def losses_by_hand(model: PreTrainedModel, tokens: Tensor, labels: Tensor, place: int, moved: Tensor) -> Tensor:
    """Summed loss of each copy of a window [time], its stream moved by moved: [copies, time, hidden] where one of the
    norms reads it and whatever else does."""
    layer = model.model.layers[place // 2] if place < 6 else model.model.norm
    if place % 2:  # behind attention

        def hook(module, args, output):
            return output[0] + moved, *output[1:]

        handle = layer.self_attn.register_forward_hook(hook)
    else:
        handle = layer.register_forward_pre_hook(lambda module, args: (args[0] + moved, *args[1:]))
    with torch.no_grad():
        logits = model(tokens.expand(len(moved), -1)).logits
    handle.remove()
    return -logits.log_softmax(-1).gather(2, labels.expand(len(moved), -1)[..., None]).sum((1, 2))


def test_the_gradient_covariance_is_how_the_loss_answers_when_the_stream_is_moved(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Squared slopes of the loss of labels that the model draws, along a direction in units of the stream's size."""
    monkeypatch.setattr("slimlm.device.product_dtype", lambda device, dtype: dtype)
    tokens, step, precise = random_tokens(3, 6), 1e-4, stock(tiny_llama).double()
    run = run_at(stream(tiny_llama), list(tokens.split(2)), tmp_path / "run", widths="hidden=16")
    found = gradient_covariance(run.model, Losses(run.batches, 3), walks_of(run))
    model, generator = stock(tiny_llama), torch.Generator()
    drawn = []
    for number, batch in enumerate(tokens.split(2)):
        logits = model(batch).logits.flatten(0, 1)
        generator.manual_seed(seed_of(3, number))
        drawn.append(draw(logits, torch.ones(len(logits), 1), generator).view_as(batch))
    labels = torch.cat(drawn)
    places = inputs_of(model, tokens, [*NORMS, "model.norm"])
    for seed in range(2):
        direction = torch.randn(32, generator=torch.Generator().manual_seed(seed)).double()
        expected = 0.0
        for place, states in enumerate(places):
            for window, size in enumerate(states.square().mean(-1).sqrt()):
                moved = step * torch.diag(size)[..., None] * direction  # a copy for each token that moves
                up, down = (
                    losses_by_hand(precise, tokens[window], labels[window], place, sign * moved) for sign in (1, -1)
                )
                expected += float(((up - down) / (2 * step)).square().sum())
        assert float(direction @ found @ direction) == pytest.approx(expected, rel=2e-3)
    assert not list((tmp_path / "run" / "work").glob("scratch-*"))


def test_the_gradient_covariance_hardly_changes_with_the_rounding_of_products(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokens = random_tokens(16, 24)

    def covariance(dtype: torch.dtype) -> Tensor:
        monkeypatch.setattr("slimlm.device.product_dtype", lambda *_: dtype)
        run = run_at(stream(tiny_llama), list(tokens.split(4)), tmp_path / str(dtype), widths="hidden=16")
        return gradient_covariance(run.model, Losses(run.batches, 0, labels="text"), walks_of(run))

    plain, rounded = map(covariance, (torch.float32, torch.bfloat16))
    assert 0 < (rounded - plain).norm() < 0.01 * plain.norm()


def plant_massive_activations(path: Path) -> Tensor:
    """Give one token, and nothing else, a huge norm in two directions, which every reader looks at: [hidden]."""
    tensors, sink = load_file(path / "model.safetensors"), torch.zeros(32)
    sink[:2] = torch.tensor([900.0, -700.0])
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensor[:, :2] = 0
            tensor[0] += sink
        elif "o_proj" in name or "down_proj" in name:
            tensor[:2] = 0
        elif tensor.ndim == 2 and "lm_head" not in name:
            tensor[:, :2] *= 3
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return sink.double()


@pytest.mark.parametrize("weighting", ["none", "loss"])
def test_massive_activations_keep_their_directions(tiny_llama: Path, tmp_path: Path, weighting: str):
    """A sink of a single token, which the Gram alone would drop."""
    sink = plant_massive_activations(tiny_llama)
    tokens = random_tokens(20, 24).clamp_min(1)
    tokens[8, 0] = 0
    model, batches = stream(tiny_llama), list(tokens.split(4))
    run = run_at(model, batches, tmp_path / "run", widths="hidden=16", weighting=weighting)
    statistics = slicing._statistics(run, "statistics")
    assert statistics.massive.tokens == 7  # that token at every norm
    assert MASSIVE * 20 < 900

    def lost(directions: Tensor) -> float:
        return float((directions @ (directions.T @ sink) - sink).norm() / sink.norm())

    assert lost(principal_basis(statistics.gram.matrix)[0][:, :16]) > 0.5
    basis = slicing._new_basis(run)
    assert 1 <= basis.notes["massive_activations"]["directions"] <= 2
    assert lost(basis.vectors[:, :16]) < 1e-2
