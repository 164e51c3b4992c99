"""What slicing fits its weights to, written out on stock models: dense and sliced side by side."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slimlm.families import Norm
from slimlm.fit.beside_dense import BlockPair, Writing
from slimlm.linalg.ridge import GUESS
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.families.configs import family_config
from tests.helpers import READERS, WRITERS, behind, inputs_of, noted, ridge_by_hand, run, stock, uneven


@pytest.mark.parametrize("name", ["llama-biased", "granite"])
def test_every_linear_is_the_least_squares_fit_for_what_the_sliced_model_brings_it(tmp_path: Path, name: str):
    """Readers to what they saw, in the metric of their weights; writers to where the dense stream is behind them,
    relative to its size, without their bias, and times what the model multiplies them by."""
    config = CONFIGS[name] if name in CONFIGS else family_config(name)
    path, tokens = uneven(build_tiny(config, tmp_path / "model")), random_tokens(60, 16)
    _, outcome, _ = run(stream(path), tokens, tmp_path / "run", method="slice", widths="hidden=24")
    dense, small = map(stock, (path, tmp_path / "run" / "model"))
    basis, scale = outcome.basis.double(), getattr(config, "residual_multiplier", 1.0)
    strengths: dict[str, float] = {}
    for block in range(3):
        part = f"model.layers.{block}"
        for norm, readers in READERS.items():
            names = [f"{part}.{reader}" for reader in readers]
            (x,), (y,) = (inputs_of(model, tokens, names[:1]) for model in (small, dense))
            weights = [dense.get_submodule(name).weight.double() for name in names]
            gain = dense.get_submodule(f"{part}.{norm}").weight.double()
            prior = gain[:, None] * basis * (32 / 24) ** 0.5
            metric = sum(weight.T @ weight for weight in weights)
            guess = strengths.get(f"{block - 1}.{norm}", GUESS)
            onto, strengths[f"{block}.{norm}"] = ridge_by_hand(x, y, prior, None, metric, guess)
            for name, weight in zip(names, weights, strict=True):
                found = small.get_submodule(name).weight.double()
                assert torch.allclose(found, weight @ onto, rtol=1e-3, atol=1e-3 * float(found.std())), name

            writer = WRITERS[norm]
            linear, was = small.get_submodule(f"{part}.{writer}"), dense.get_submodule(f"{part}.{writer}")
            x, before = inputs_of(small, tokens, [f"{part}.{writer}", f"{part}.{norm}"])
            (after,) = inputs_of(dense, tokens, [behind(block, norm)])
            wanted = (after @ basis - before) / scale - (0 if linear.bias is None else linear.bias.double())
            guess = strengths.get(f"{block - 1}.{writer}", GUESS)
            prior = basis.T @ was.weight.double()
            expected, strength = ridge_by_hand(x, wanted, prior, 1 / after.square().mean(-1), None, guess)
            strengths[f"{block}.{writer}"] = strength
            found = linear.weight.double()
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(found.std())), writer
            if was.bias is not None:
                assert torch.allclose(linear.bias.double(), was.bias.double() @ basis, atol=1e-6)
    assert outcome.notes["refit"]["ridge"] == noted(strengths)


@pytest.mark.parametrize("step", [{"method": "slice", "widths": "hidden=24"}, {"method": "slimlm", "sparsity": 0.5}])
def test_attention_of_a_dense_block_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: dict[str, object]):
    """For what is behind it, and for what comes out of the block."""
    seen, plain = list[int](), BlockPair.in_order

    def counted(self: BlockPair) -> Iterator[Norm | Writing]:
        writer = self.dense.module.get_submodule("self_attn.o_proj")
        handle = writer.register_forward_hook(lambda *_: seen.append(self.dense.index))
        yield from plain(self)
        handle.remove()

    monkeypatch.setattr(BlockPair, "in_order", counted)
    model = stream(build_tiny(CONFIGS["llama-biased"], tmp_path / "model"))
    run(model, random_tokens(60, 16), tmp_path / "run", 4, **step)
    assert seen == [index for index in range(3) for _ in range(60 // 4)]
