import errno
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimlm
from slimlm.checkpoint.pack import pack
from slimlm.device import available_memory, check_process, memory_size, pick_device, product_dtype
from slimlm.errors import RunFailure, UserError, out_of_memory
from slimlm.inspection import inspect_model


def more_than_there_is(*_: object, **__: object) -> torch.Tensor:
    return torch.empty(2**46)


def wrapped() -> None:
    try:
        more_than_there_is()
    except RuntimeError as error:
        raise UserError("no model can be built") from error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to allocate 9"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_every_kind_of_it_is_out_of_memory(error: Exception):
    with pytest.raises(RunFailure, match="^out of memory: do less$"), out_of_memory("do less"):
        raise error


def test_torchs_own_error_is_known_also_where_another_was_made_of_it():
    for work in (more_than_there_is, wrapped):
        with pytest.raises(RunFailure, match="^out of memory: do less$"), out_of_memory("do less"):
            work()
    for other in (RuntimeError("a shape is wrong"), RunFailure("said already"), OSError(errno.ENOSPC, "full")):
        with pytest.raises(type(other), match=str(other).replace("[", r"\[")), out_of_memory("do less"):
            raise other


@pytest.mark.parametrize("place", ["slimlm.evaluation.measuring.measure_tokens", "from_pretrained"])
def test_an_evaluation_without_memory_says_so(monkeypatch, place: str):
    if place == "from_pretrained":
        monkeypatch.setattr(AutoModelForCausalLM, place, more_than_there_is)
    else:
        monkeypatch.setattr(place, more_than_there_is)
    with pytest.raises(RunFailure, match="^out of memory: lower --batch-size or --window"):
        slimlm.evaluate("llama", tasks=(), num_windows=2)


def test_so_do_the_other_verbs(monkeypatch, tiny_llama: Path, tmp_path: Path):
    monkeypatch.setattr("slimlm.inspection.figures_of", more_than_there_is)
    with pytest.raises(RunFailure, match="^out of memory: lower --window"):
        inspect_model(str(tiny_llama))
    monkeypatch.setattr("slimlm.checkpoint.pack._nonzero", more_than_there_is)
    with pytest.raises(RunFailure, match="^out of memory: every tensor"):
        pack(tiny_llama, tmp_path / "packed")
    monkeypatch.setattr("slimlm.compression.compare", more_than_there_is)
    recipe = slimlm.one_step(model=str(tiny_llama), method="magnitude", sparsity=0.5, output_dir=str(tmp_path / "out"))
    with pytest.raises(RunFailure, match="^out of memory: lower --batch-size or --max-seq-length"):
        slimlm.compress(recipe)


def verbs(path: Path, output: Path) -> list:
    recipe = slimlm.one_step(model=str(path), method="magnitude", sparsity=0.5, output_dir=str(output))
    return [lambda: slimlm.compress(recipe), lambda: slimlm.evaluate(str(path)), lambda: inspect_model(str(path))]


def test_one_of_several_ranks_is_refused_where_one_process_works(monkeypatch, tiny_llama: Path, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    *_, inspecting = verbs(tiny_llama, tmp_path / "out")
    with pytest.raises(UserError, match="^WORLD_SIZE is 2, and this works in one process"):
        inspecting()
    assert not list(tmp_path.glob("out*"))
    for alone in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", alone)
        check_process()


def test_coarse_products_are_refused(tiny_llama: Path, tmp_path: Path):
    torch.set_float32_matmul_precision("medium")
    try:
        for verb in verbs(tiny_llama, tmp_path / "out"):
            with pytest.raises(UserError, match="precision is 'medium', too coarse"):
                verb()
    finally:
        torch.set_float32_matmul_precision("highest")
    check_process()


def test_a_device_that_cannot_sum_is_refused(monkeypatch):
    with pytest.raises(UserError, match="device 'mps:0' has no float64"):
        pick_device("mps:0")

    def no_float64(*_: object, **__: object) -> None:
        raise TypeError("Cannot convert a tensor to float64")

    monkeypatch.setattr("slimlm.device.torch.ones", no_float64)
    with pytest.raises(UserError, match="device 'cpu' is not available: Cannot convert"):
        pick_device("cpu")


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr("slimlm.device.torch.ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr("slimlm.device.torch.cuda.set_device", current.append)
    monkeypatch.setattr("slimlm.device.torch.cuda.current_device", lambda: 3)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cuda") == torch.device("cuda:3")
    assert current == [torch.device("cuda:1"), torch.device("cuda:3")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_windows": -1}, "--num-windows is -1: give at least 0"),
        ({"window": 1}, "--window is 1: give at least 2"),
        ({"batch_size": 0}, "--batch-size is 0: give at least 1"),
        ({"num_fewshot": -1}, "--num-fewshot is -1: give at least 0"),
    ],
)
def test_the_api_refuses_what_the_flags_refuse(settings: dict[str, int], words: str):
    with pytest.raises(UserError, match=f"^{words}$"):
        slimlm.evaluate("llama", tasks=(), **settings)
    ours = {name.replace("num_windows", "windows"): value for name, value in settings.items()}
    if ours.keys() <= {"windows", "window"}:
        with pytest.raises(UserError, match="give at least"):
            inspect_model("llama", **ours)


@pytest.mark.parametrize(("flags", "expected"), [("fma avx512_bf16 avx2", torch.bfloat16), ("fma avx2", torch.float32)])
def test_quick_products_are_in_what_the_processor_has(monkeypatch, flags: str, expected: torch.dtype):
    monkeypatch.setattr("slimlm.device._processor", lambda what: flags)
    assert product_dtype(torch.device("cpu")) == expected
    assert product_dtype(torch.device("meta")) == torch.float32
    assert product_dtype(torch.device("meta"), torch.float16) == torch.float16


def test_the_memory_there_is_does_not_hang_on_what_is_free(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("slimlm.device.CGROUPS", tmp_path)
    whole = memory_size(torch.device("cpu"))
    assert whole >= available_memory(torch.device("cpu"))["host"]
    for limit, expected in ((f"{10**9}\n", 10**9), ("max\n", whole)):
        (tmp_path / "memory.max").write_text(limit)
        assert memory_size(torch.device("cpu")) == expected
