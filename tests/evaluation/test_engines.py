"""llama.cpp and vLLM as their Python packages have them, stood in for."""

import sys
from importlib.machinery import ModuleSpec
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import slimlm
from slimlm.errors import RunFailure, UserError
from slimlm.evaluation.speed.engines import LlamaCppRunner, VllmRunner, gguf_files, require_installed
from slimlm.model.decoding import Taken
from tests.conftest import random_tokens

QUICK: dict[str, Any] = {"prompt_tokens": 4, "new_tokens": 3, "rounds": 2, "device": "cpu"}


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a stand-in of llama.cpp was asked to do."""
    done: list[Any] = []

    class Llama:
        ctx = "context"

        def __init__(self, path: str, **settings: Any) -> None:
            if Path(path).read_bytes() != b"GGUF":
                raise ValueError(f"Failed to load model from file: {path}")
            self.name = Path(path).name
            done.append((self.name, settings["n_ctx"]))

        def n_vocab(self) -> int:
            return 10

        def reset(self) -> None:
            done.append("reset")

        def eval(self, tokens: list[int]) -> None:
            assert max(tokens) < 10
            done.append((self.name, len(tokens)))

    stand_in(monkeypatch, "llama_cpp", Llama=Llama, llama_synchronize=lambda context: None)
    return done


def gguf(path: Path, content: bytes = b"GGUF") -> Path:
    path.write_bytes(content)
    return path


def test_llama_cpp_reads_a_prompt_at_once_and_goes_on_token_by_token(llama_cpp: list[Any], tmp_path: Path):
    ticks = count()
    runner = LlamaCppRunner(gguf(tmp_path / "a.gguf"), 9, 1, clock=lambda: float(next(ticks)))
    assert runner.run(random_tokens(1, 4) % 10, 4) == Taken(1.0, (1.0, 1.0, 1.0))
    assert llama_cpp == [("a.gguf", 9), "reset", ("a.gguf", 4), *[("a.gguf", 1)] * 3]


def test_gguf_files_take_turns(llama_cpp: list[Any], tmp_path: Path):
    files = [str(gguf(tmp_path / f"{name}.gguf")) for name in "ad"]
    found = slimlm.bench(files[0], against=files[1], **QUICK)
    assert found.engine == "llama.cpp"
    assert [batch.batch_size for batch in found.models[0].batches] == [1]
    assert [one[0] for one in llama_cpp if one[1] == 4] == ["a.gguf", "d.gguf"] * 3
    assert found.models[0].bytes == 4
    assert found.models[0].verdict
    assert found.models[0].batches[0].memory is None


def test_gguf_files_are_compared_with_gguf_files(llama_cpp: list[Any], tmp_path: Path):
    file = str(gguf(tmp_path / "a.gguf"))
    with pytest.raises(UserError, match="compare GGUF files with GGUF files"):
        slimlm.bench(file, against="llama", **QUICK)
    with pytest.raises(UserError, match="leave out --engine"):
        slimlm.bench(file, kernels="bsr", **QUICK)
    with pytest.raises(UserError, match="cannot be loaded by llama.cpp"):
        slimlm.bench(str(gguf(tmp_path / "b.gguf", b"")), **QUICK)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("slimlm.evaluation.speed.engines.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        slimlm.bench(str(gguf(tmp_path / "a.gguf")), **QUICK)
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        slimlm.bench(str(tmp_path), **QUICK)
    with pytest.raises(UserError, match="pip install vllm"):
        require_installed("vllm")
    require_installed("transformers")


def test_a_name_with_another_ending_is_no_gguf(tmp_path: Path):
    assert gguf_files("llama") == []
    file = gguf(tmp_path / "a.gguf")
    assert gguf_files(str(file)) == [file]


def test_a_directory_with_a_gguf_is_that_file(llama_cpp: list[Any], tmp_path: Path):
    for name in "ad":
        (tmp_path / name).mkdir()
        gguf(tmp_path / name / "model.gguf")
        (tmp_path / name / "config.json").write_text("{}")
    found = slimlm.bench(str(tmp_path / "a"), against=str(tmp_path / "d"), **QUICK)
    assert (found.engine, found.models[0].name) == ("llama.cpp", str(tmp_path / "a"))
    assert found.models[0].path == str(tmp_path / "a/model.gguf")
    gguf(tmp_path / "a/other.gguf")
    with pytest.raises(UserError, match="a holds several GGUF files: give one of them, as in .*a/model.gguf"):
        slimlm.bench(str(tmp_path / "a"), **QUICK)
    gguf(tmp_path / "d/model.safetensors")
    assert gguf_files(str(tmp_path / "d")) == []  # a checkpoint that has a GGUF file beside it
    with pytest.raises(UserError, match=r"a/model.gguf is for llama.cpp and .*/d is not"):
        slimlm.bench(str(tmp_path / "a/model.gguf"), against=str(tmp_path / "d"), **QUICK)


def test_a_split_gguf_is_one_model_read_by_its_first(llama_cpp: list[Any], tmp_path: Path):
    files = [gguf(tmp_path / f"model-{number:05}-of-00003.gguf") for number in (1, 2, 3)]
    assert gguf_files(str(tmp_path)) == files
    gguf(tmp_path / "another.gguf")
    assert gguf_files(str(files[0])) == files
    found = slimlm.bench(str(files[0]), **QUICK)
    assert (found.models[0].bytes, llama_cpp[0][0]) == (12, files[0].name)


class Vllm:
    """A stand-in whose time goes by with the tokens that it writes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.settings: dict[str, Any] = {}

    def __call__(self, path: str, **settings: Any) -> "Vllm":
        self.settings = settings
        return self

    def generate(self, prompts: list[dict[str, list[int]]], asked: Any, use_tqdm: bool) -> None:
        assert asked.ignore_eos
        assert not use_tqdm
        self.now += len(prompts) * len(prompts[0]["prompt_token_ids"]) + 10 * (asked.max_tokens - 1)


def test_vllms_steps_are_what_more_tokens_take(monkeypatch: pytest.MonkeyPatch):
    program = Vllm()
    stand_in(monkeypatch, "vllm", LLM=program, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    runner = VllmRunner(Path("model"), "bfloat16", 9, 2, False)
    runner.clock = lambda: program.now
    assert program.settings["gpu_memory_utilization"] == 0.45
    assert not program.settings["enable_prefix_caching"]
    assert runner.run(torch.ones(2, 4, dtype=torch.int64), 5) == Taken(8.0, (10.0,))
    with pytest.raises(RunFailure, match="more --new-tokens"):
        runner.run(torch.ones(2, 4, dtype=torch.int64), 1)


def test_vllm_runs_directories(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path):
    program = Vllm()
    stand_in(monkeypatch, "vllm", LLM=program, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setattr("slimlm.evaluation.speed.engines.time.perf_counter", lambda: program.now)
    found = slimlm.bench(str(tiny_llama), against="llama", engine="vllm", batch_sizes="2", **QUICK)
    assert found.engine == "vllm"
    assert found.models[0].batches[0].step.median == 10
    with pytest.raises(UserError, match="vLLM chooses its own"):
        slimlm.bench(str(tiny_llama), engine="vllm", kernels="bsr", **QUICK)
