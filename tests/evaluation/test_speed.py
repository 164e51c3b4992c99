"""Speed: whose turn it is, what rounds come to, and what is counted. No test asserts on real time."""

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from typer.testing import CliRunner

import slimlm
from slimlm.cli import app
from slimlm.errors import UserError
from slimlm.evaluation.speed import contenders
from slimlm.evaluation.speed.contenders import refuse_too_many, sources
from slimlm.evaluation.speed.judging import is_fast
from slimlm.evaluation.speed.stock import StockRunner, flops_per_token, zeros_in
from slimlm.evaluation.speed.timing import Spread, decode_ratio, interleaved, prefill_ratio, speed_of
from slimlm.model.decoding import Taken, greedy, settle
from slimlm.progress import Progress
from slimlm.settings import BenchSettings
from tests.conftest import SIZES, build_tiny, random_tokens

QUICK: dict[str, Any] = {"batch_sizes": (1, 2), "prompt_tokens": 4, "new_tokens": 3, "rounds": 1}


class Noted:
    """A runner that says when it ran, and takes as long as it is told."""

    def __init__(self, name: str, log: list[str], seconds: Iterator[float]) -> None:
        self.name, self.log, self.seconds = name, log, seconds

    def run(self, prompts: torch.Tensor, new_tokens: int) -> Taken:
        self.log.append(self.name)
        first = next(self.seconds)
        return Taken(first, (first / 4,) * (new_tokens - 1), 7)


class Lines(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def test_models_take_turns_after_a_run_that_does_not_count():
    log: list[str] = []
    runners = [Noted(name, log, iter([99.0, *(float(one) for one in range(1, 4))])) for name in "abd"]
    taken = interleaved(runners, random_tokens(2, 5), 3, rounds=3)
    assert "".join(log) == "abd" * 4
    assert [[one.first for one in own] for own in taken] == [[1.0, 2.0, 3.0]] * 3


def test_rounds_come_to_medians_and_their_middle_half():
    rounds = [Taken(second, (second / 10, second / 10, 100.0), 50) for second in (1.0, 4.0, 2.0, 8.0, 16.0)]
    found = speed_of(batch_size=3, prompt_tokens=8, rounds=rounds)
    assert found.first_token == Spread(4.0, 2.0, 8.0)
    assert found.prefill == Spread(6.0, 3.0, 12.0)
    assert found.step == Spread(0.4, 0.2, 0.8)  # the step that something interrupted does not count
    assert found.decode == Spread(7.5, 3.75, 15.0)
    assert found.memory == 50
    assert found.step.share == pytest.approx(0.75)
    assert speed_of(1, 8, [replace(one, memory=None) for one in rounds]).memory is None


def test_ratios_are_of_medians_and_their_range_is_of_rounds():
    """A machine that slows down for two rounds slows both down: each round's own ratio stays."""
    slow = [1.0, 1.0, 5.0, 5.0, 1.0]
    model = speed_of(1, 10, [Taken(one, (one,)) for one in slow])
    dense = speed_of(1, 10, [Taken(2 * one, (3 * one,)) for one in slow])
    assert prefill_ratio(model, dense).of_medians == pytest.approx(2)
    ratio = decode_ratio(model, dense)
    assert (ratio.of_medians, ratio.low, ratio.high) == pytest.approx((3, 3, 3))
    assert ratio.is_sure


@pytest.mark.parametrize(
    ("own", "low", "high"),
    [
        ([2.0, 3.0], 0, math.inf),  # too few to disagree
        ([2.0, 0.5, 3.0, 1.0], 0, math.inf),
        ([2.0, 0.5, 3.0, 1.0, 2.5], 0.5, 3),
        ([float(one) for one in range(1, 10)], 2, 8),
        ([float(one) for one in range(1, 21)], 6, 15),  # 95.9% of medians of 20, by the binomial distribution
    ],
)
def test_bounds_of_a_ratio_are_those_of_a_median(own: list[float], low: float, high: float):
    dense = speed_of(1, 1, [Taken(1.0, (1.0,)) for _ in own])
    ratio = decode_ratio(speed_of(1, 1, [Taken(1.0, (1 / one,)) for one in own]), dense)
    assert (ratio.low, ratio.high) == pytest.approx((low, high))
    assert ratio.is_sure == (low > 1)


def test_it_writes_what_generate_writes_and_reads_the_clock_once_a_token(tiny: Path):
    model, prompts = loaded(tiny), random_tokens(3, 9)
    ticks = count()
    found = greedy(model, prompts, 6, lambda: float(next(ticks)))
    expected = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, min_new_tokens=6, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(found.tokens, expected[:, 9:])
    assert found.taken == Taken(1.0, (1.0,) * 5)
    assert next(ticks) == 7


def test_memory_is_weights_keys_and_values(tiny_llama: Path):
    runner = StockRunner(loaded(tiny_llama))
    time, width, blocks = 9 + 6 - 1, SIZES["num_key_value_heads"] * SIZES["head_dim"], SIZES["num_hidden_layers"]
    parameters = sum(one.numel() for one in runner.model.parameters())
    buffers = sum(one.numel() for one in runner.model.buffers())
    cached = 3 * time * width * blocks * 2
    assert runner.run(random_tokens(3, 9), 6).memory == 4 * (parameters + buffers + cached)


def test_operations_are_those_counted_by_hand(tiny_llama: Path):
    batch, time = 2, 16
    hidden, inner, blocks, vocabulary = 32, 48, 3, 4096
    heads, kept, size = SIZES["num_attention_heads"], SIZES["num_key_value_heads"], SIZES["head_dim"]
    linears = hidden * size * (2 * heads + 2 * kept) + 3 * hidden * inner
    attention = 2 * heads * size * time  # of a token: scores, and what they weigh
    expected = 2 * (blocks * (linears + attention) + vocabulary * hidden / time)  # the head sees the last token
    assert flops_per_token(loaded(tiny_llama), random_tokens(batch, time)) == expected


def test_operations_of_experts_are_those_that_tokens_are_routed_to():
    config = MixtralConfig(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2})
    model, time = AutoModelForCausalLM.from_config(config).eval(), 16
    attention = 32 * 8 * (2 * 4 + 2 * 2) + 2 * 4 * 8 * time
    expected = 2 * (3 * (attention + 32 * 4 + 2 * 3 * 32 * 48) + 4096 * 32 / time)
    assert flops_per_token(model, random_tokens(2, time)) == expected


def test_nothing_is_predicted_of_a_mixture(tmp_path: Path):
    path = str(build_tiny(MixtralConfig(**{**SIZES, "num_local_experts": 4}), tmp_path / "mixtral"))
    found = slimlm.bench(path, against=path, **QUICK)
    assert [one.predicted for one in found.models] == [(None, None)]
    assert found.models[0].verdict


def test_weights_leave_the_mapped_file_and_stay_what_they_were(tiny_llama: Path):
    model, prompts = loaded(tiny_llama), random_tokens(1, 5)
    before = model(prompts).logits
    settle(model)
    assert {one.data_ptr() % 64 for one in model.parameters()} == {0}
    assert torch.equal(model(prompts).logits, before)


def test_zeros_are_counted_in_linears():
    model = nn.Sequential(nn.Linear(4, 2), nn.Embedding(3, 3), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[1].weight.zero_()
    assert zeros_in(model) == 4 / 20
    assert zeros_in(nn.Embedding(3, 3)) == 0


def test_the_command_compares_and_keeps_what_it_finds(tmp_path: Path):
    words = ["bench", "llama", "llama", "--against", "llama", "--json", str(tmp_path / "speed.json"), "--rounds", "1"]
    words += ["--batch-sizes", "2,1", "--prompt-tokens", "4", "--new-tokens", "3"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "batch of 2" in done.output
    assert "as fast as dense" in done.output
    data = json.loads((tmp_path / "speed.json").read_text())
    assert [one["name"] for one in data["models"]] == ["llama", "llama"]
    assert [batch["batch_size"] for batch in data["dense"]["batches"]] == [1, 2]
    for one in (*data["models"], data["dense"]):
        assert one["flops"] == data["dense"]["flops"] > 0
        assert [len(batch["rounds"]) for batch in one["batches"]] == [1, 1]
        assert [len(batch["rounds"][0]["steps"]) for batch in one["batches"]] == [2, 2]
        assert [prediction["batch_size"] for prediction in one["predicted"]] == [1, 2]
    assert data["versions"]["torch"] == torch.__version__


def test_without_a_dense_model_there_is_nothing_to_judge(tiny_llama: Path):
    found = slimlm.bench(str(tiny_llama), **{**QUICK, "batch_sizes": "1"})
    assert found.dense is None
    (one,) = found.models
    assert (one.verdict, one.predicted) == ((), (None,))


def test_a_dense_models_own_time_is_what_its_prediction_gives_back(tiny_llama: Path):
    dense = slimlm.bench(str(tiny_llama), against=str(tiny_llama), **QUICK).dense
    assert dense is not None
    for batch, prediction in zip(dense.batches, dense.predicted, strict=True):
        assert prediction is not None
        assert prediction.seconds == pytest.approx(batch.step.median)
        assert prediction.products > 0


def test_models_of_other_vocabularies_and_contexts_share_prompts(tmp_path: Path):
    small = build_tiny(LlamaConfig(**{**SIZES, "vocab_size": 50, "max_position_embeddings": 16}), tmp_path / "small")
    big = build_tiny(LlamaConfig(**SIZES), tmp_path / "big")
    lines = Lines()
    found = slimlm.bench(str(small), against=str(big), **{**QUICK, "prompt_tokens": 40}, progress=lines)
    assert found.prompt_tokens == 13
    assert "prompts are cut to 13 tokens: the models' context is 16" in lines.lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "--rounds is 0: give at least 1"),
        ({"new_tokens": 1}, "--new-tokens is 1: give at least 2"),
        ({"batch_sizes": "1,x"}, "--batch-sizes '1,x': give numbers"),
        ({"batch_sizes": (0,)}, "give at least 1"),
        ({"dtype": "int8"}, "--dtype 'int8' is none of"),
        ({"kernels": "csr"}, "--kernels 'csr' is none of"),
        ({"kernels": "2:4"}, "cpu has no kernels for 2:4"),
        ({"kernels": "bsr"}, "has no tiles of zeros"),
        ({"engine": "vllm"}, "vllm is not installed here"),
        ({"model": ("nowhere/at/all",)}, "'nowhere/at/all' does not exist"),
        ({"model": ()}, "give a model"),
        ({"kernels": "bsr", "device_map": "auto"}, "--device-map is for models as stored in transformers"),
        ({"device_map": "nonsense"}, "cannot be loaded by transformers: "),
        ({"model": "no.gguf"}, "GGUF file no.gguf does not exist"),
        ({"new_tokens": 128}, "--new-tokens 128 is beyond the models' context"),
        ({"against": "/nowhere"}, "'/nowhere' does not exist"),
    ],
)
def test_mistakes_are_one_line(tiny_llama: Path, settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        slimlm.bench(**{"model": str(tiny_llama), **QUICK, "device": "cpu", **settings})


def test_rounds_are_checked_by_the_command(tiny_llama: Path):
    done = CliRunner().invoke(app, ["bench", str(tiny_llama), "--rounds", "0"])
    assert done.exit_code == 2


def test_the_processors_clock_is_for_one_thread(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(UserError, match="OMP_NUM_THREADS=1"):
        slimlm.bench(str(tiny_llama), **QUICK, clock="cpu", device="cpu")


def test_models_that_do_not_fit_together_are_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("slimlm.evaluation.speed.contenders.available_memory", lambda device: {"host": 1000})
    with pytest.raises(UserError, match="give fewer models"):
        slimlm.bench(str(tiny_llama), against="llama", **QUICK)


def test_a_model_that_is_spread_is_measured_where_its_parts_are(tiny_llama: Path):
    found = slimlm.bench(str(tiny_llama), against="llama", **QUICK, device_map="auto", device="cpu")
    plain = slimlm.bench(str(tiny_llama), against="llama", **QUICK, device="cpu")
    assert (found.device, found.models[0].flops) == (plain.device, plain.models[0].flops)
    assert found.models[0].batches[0].memory == plain.models[0].batches[0].memory


def test_parts_that_are_fetched_at_every_step_are_no_model_to_measure(tiny_llama: Path, monkeypatch):
    def spread(path: Path, how: Any) -> Any:
        assert how.device_map == "auto"
        model = loaded(path)
        model.model.layers[1].to("meta")
        return model

    monkeypatch.setattr("slimlm.evaluation.speed.contenders.load_model", spread)
    with pytest.raises(UserError, match=f"--device-map auto leaves parts of {tiny_llama} elsewhere than on cpu"):
        slimlm.bench(str(tiny_llama), **QUICK, device_map="auto", device="cpu")


@pytest.mark.parametrize(("is_spread", "fits"), [(False, False), (True, True)])
def test_all_gpus_together_have_room_for_what_is_spread(is_spread: bool, fits: bool, tiny_llama: Path, monkeypatch):
    """Of two, each of which holds two thirds of what the model takes."""
    (source,) = sources(BenchSettings(str(tiny_llama)), [str(tiny_llama)], torch.device("cpu"))
    room = source.bytes * 2 * 2 // 3
    monkeypatch.setattr(contenders, "available_memory", lambda device: {"host": 1, "gpu": room})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with nullcontext() if fits else pytest.raises(UserError, match="free on cuda:0: they take turns"):
        refuse_too_many([source], torch.device("cuda:0"), is_spread)
    with pytest.raises(UserError, match="free on cpu: they"):
        refuse_too_many([source], torch.device("cpu"), is_spread)


def test_what_a_processor_multiplies_fast(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    for flags, fast in (("avx512_bf16", True), ("avx2", False)):
        monkeypatch.setattr("slimlm.device._processor", lambda what="", flags=flags: flags)
        assert is_fast(torch.bfloat16, cpu) == fast
        assert is_fast(torch.float32, cpu)
        assert not is_fast(torch.float16, cpu)
