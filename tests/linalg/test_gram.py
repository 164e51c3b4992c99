import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlm.linalg.gram import CHUNK_TOKENS, Gram, rms_normalise


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_gram_is_the_sum_of_outer_products():
    x = randn(3, 7, 5)
    gram = Gram(5)
    gram.add(x)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for token in x.reshape(-1, 5):
        expected += token[:, None] * token[None, :]
    assert torch.allclose(gram.matrix, expected, atol=1e-12)
    assert gram.tokens == 21


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(4)), st.integers(1, 60))
def test_tokens_come_in_any_order(order, tokens):
    parts = [randn(tokens, 6, seed=seed) for seed in range(4)]
    whole, summed = Gram(6), Gram(6)
    whole.add(torch.cat(parts))
    for index in order:
        summed.add(parts[index])
    assert torch.allclose(whole.matrix, summed.matrix, atol=1e-10)
    assert whole.tokens == summed.tokens


def test_gram_of_half_precision_activations_is_accumulated_without_losing_them():
    x = torch.full((3 * CHUNK_TOKENS, 2), 0.01, dtype=torch.bfloat16)
    gram = Gram(2)
    gram.add(x)
    assert gram.matrix[0, 0].item() == pytest.approx(x.shape[0] * x[0, 0].item() ** 2, rel=1e-6)
    assert gram.matrix.dtype == torch.float64


@pytest.mark.parametrize("width", [1, 300, 2100])
def test_half_of_a_gram_is_mirrored(width: int):
    """Few tokens at a time and many; whoever multiplies them rounds both sides of the diagonal otherwise."""
    x = torch.randn(400, width, generator=torch.Generator().manual_seed(0))
    gram = Gram(width)
    for part in x.split([15, 200, 185]):
        gram.add(part)
    assert torch.allclose(gram.matrix, gram.matrix.T, rtol=1e-5, atol=1e-4)
    assert torch.allclose(gram.matrix, (x.double().T @ x.double()).to(gram.matrix), rtol=1e-4, atol=1e-3)


def test_gram_refuses_another_width():
    with pytest.raises(ValueError, match="width 3"):
        Gram(4).add(torch.zeros(2, 3))


def test_rms_normalise_is_what_the_stock_norm_does_without_its_gain():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(4, 9, 16)
    assert torch.allclose(rms_normalise(x, 1e-5), LlamaRMSNorm(16, eps=1e-5)(x), atol=1e-6)
