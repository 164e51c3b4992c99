"""Attention as fast as CPUs do it, of one query and of windows, and the same as PyTorch's."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimlm.attention import LONGEST, NAME, attend_fast, attending_fast, attention
from slimlm.calibration.decoding import reserve
from slimlm.linalg import attention as products
from tests.conftest import random_tokens
from tests.families.configs import SETTINGS, family_config

Given = tuple[Tensor, Tensor, Tensor]


def stock(query: Tensor, key: Tensor, value: Tensor, **settings: object) -> Tensor:
    """PyTorch's, [batch, queries, heads, size]."""
    share = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    found: Tensor = scaled_dot_product_attention(query, keys, values, **settings)  # type: ignore[arg-type]
    return found.transpose(1, 2)


def given(time: int, dtype: torch.dtype = torch.float32, batch: int = 3, spread: float = 1.0) -> Given:
    """Six heads, two groups, values narrower than keys."""
    torch.manual_seed(0)
    query, key = torch.randn(batch, 6, time, 8) * spread, torch.randn(batch, 2, time, 8)
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_(), torch.randn(
        batch, 2, time, 4).to(dtype).requires_grad_()  # fmt: skip


def with_gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Given) -> list[Tensor]:
    """What comes out, and the gradients of all that went in."""
    out = attend(*inputs)
    torch.manual_seed(1)
    slopes = torch.randn(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, slopes)]


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    found, _ = attention(nn.Module(), query, key, value, None, scaling=0.3, dropout=0.0)
    return found


def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same in whatever dtype, and however long."""
    found = products.causal(query.unflatten(1, (key.shape[1], -1)), key, value, 0.3)
    return found.flatten(1, 2).transpose(1, 2)


def calls_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of queries that PyTorch's function was asked for since."""
    seen = list[int]()
    before = scaled_dot_product_attention

    def counted(query: Tensor, *args: object, **settings: object) -> Tensor:
        seen.append(query.shape[2])
        found: Tensor = before(query, *args, **settings)  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return seen


@pytest.mark.parametrize("masked", [None, "bool", "added"])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("cached", [1, 170, 1 << 20])
def test_one_query_attends_as_pytorch_does(
    masked: str | None, scaling: float | None, cached: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "CACHED", cached)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 4)
    mask = torch.rand(3, 1, 1, 5) < 0.7
    mask[..., 0] = True
    added = torch.zeros(3, 1, 1, 5).masked_fill(~mask, -1e9)
    masks = {None: None, "bool": mask, "added": added}[masked]
    found, _ = attention(nn.Module(), query, key, value, masks, scaling=scaling, dropout=0.0)
    torch.testing.assert_close(found, stock(query, key, value, attn_mask=masks, scale=scaling))


@pytest.mark.parametrize("time", [2, 63, 64, 65, 150])
@pytest.mark.parametrize("scores", [1, 20000, 1 << 22])
def test_windows_and_their_gradients_are_as_pytorch_has_them(time: int, scores: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "SCORES", scores)
    inputs = given(time)
    found = with_gradients(by_products, inputs)
    expected = with_gradients(lambda *all_of: stock(*all_of, is_causal=True, scale=0.3), inputs)
    for mine, own in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", [1.0, 5.0, 100.0])
def test_in_bf16_they_are_off_by_a_few_roundings(spread: float):
    """Scores in the hundreds, as biased keys give them, would be off by whole numbers in bf16."""
    inputs = given(150, torch.bfloat16, spread=spread)
    found = with_gradients(ours, inputs)
    exact = tuple(one.detach().double().requires_grad_() for one in inputs)
    expected = with_gradients(lambda *all_of: stock(*all_of, is_causal=True, scale=0.3), exact)  # type: ignore[arg-type]
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - true).norm() < 3 * torch.finfo(torch.bfloat16).eps * true.norm()


def test_under_autocast_products_are_in_its_dtype():
    inputs = given(70)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(ours, inputs)
    rounded = with_gradients(ours, tuple(one.bfloat16() for one in inputs))  # type: ignore[arg-type]
    assert found[0].dtype == torch.bfloat16
    assert [one.dtype for one in found[1:]] == 3 * [torch.float32]
    torch.testing.assert_close(found[0], rounded[0])


def test_a_gradient_inside_autocast_is_what_it_is_outside():
    inputs = given(70, spread=20.0)
    expected = with_gradients(by_products, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(by_products, inputs)
    for mine, own in zip(found, expected, strict=True):
        assert torch.equal(mine, own)


def test_what_is_long_or_not_in_bf16_is_pytorchs(monkeypatch: pytest.MonkeyPatch):
    asked = calls_of_pytorch(monkeypatch)
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    attention(module, *given(5), None)
    for time in (6, LONGEST, LONGEST + 1):
        attention(module, *given(time, torch.bfloat16), None)
    assert asked == [5, LONGEST + 1]


def test_what_is_not_on_a_cpu_is_pytorchs(monkeypatch: pytest.MonkeyPatch):
    """A streamed model does not say itself where it computes."""
    asked = calls_of_pytorch(monkeypatch)
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    for time in (1, 5):
        attention(module, *(one.to("meta") for one in given(time, torch.bfloat16)), None)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "settings",
    [{"is_causal": False}, {"position_bias": torch.zeros(1, 6, 5, 5, dtype=torch.bfloat16)}, {"dropout": 0.5}],
)
def test_what_only_pytorchs_function_knows_goes_to_it(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    asked = calls_of_pytorch(monkeypatch)
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    attention(module, *given(5, torch.bfloat16), None, **settings)
    attention(module, *given(5, torch.bfloat16), torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert asked == [5, 5]


def logits_and_gradients(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """In fp32: of the loss, by all parameters that it depends on."""
    found = model(input_ids=tokens, labels=tokens, use_cache=False)
    wanted = [one for one in model.parameters() if one.requires_grad]
    gradients = torch.autograd.grad(found.loss, wanted, allow_unused=True)
    return [found.logits, *(one for one in gradients if one is not None)]


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_family_learns_what_it_learned(name: str, monkeypatch: pytest.MonkeyPatch):
    """In fp32, in which it shows."""
    monkeypatch.setattr("slimlm.attention._pays", lambda query: query.shape[2] > 1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name)).float().eval()
    tokens = random_tokens(2, 70)
    expected = logits_and_gradients(model, tokens)
    before = model.config._attn_implementation
    with attending_fast(model):
        found = logits_and_gradients(model, tokens)
    assert model.config._attn_implementation == before
    for mine, own in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_family_writes_what_it_wrote(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name)).float().eval()
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        attend_fast(model)
        cache, logits = None, []
        known = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        for column in tokens.split(1, 1):
            out = model(input_ids=column, use_cache=True, **{known: cache})
            if cache is None:
                reserve(out[known], tokens.shape[1])
            cache = out[known]
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-3, atol=1e-4)


def test_a_qwen_is_one_that_takes_it(monkeypatch: pytest.MonkeyPatch):
    model = AutoModelForCausalLM.from_config(family_config("qwen2"))
    attend_fast(model)
    assert model.config._attn_implementation == NAME
    asked = calls_of_pytorch(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        logits_and_gradients(model, random_tokens(2, 20))
    assert not asked
