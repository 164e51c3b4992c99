"""Several calls in one process, at once: none disturbs another, nor the caller's torch."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

import slimlm
from slimlm.checkpoint.hf_internals import BARS
from slimlm.checkpoint.skeleton import build_skeleton
from slimlm.evaluation.quiet import quiet
from tests.conftest import CONFIGS, build_tiny


def ordinary() -> bool:
    """Whether torch makes modules as it does in a fresh process, and numbers in them."""
    layer = torch.nn.Linear(2, 2)
    return (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float32) and bool(
        0 < layer.weight.abs().max() < 1
    )


def test_skeletons_that_are_built_at_once_leave_torch_as_it_was():
    before = torch.nn.Module.register_parameter, torch.nn.init.uniform_, torch.linspace

    def build(number: int) -> bool:
        model = build_skeleton(
            CONFIGS[sorted(CONFIGS)[number % len(CONFIGS)]], (torch.float32, torch.bfloat16)[number % 2]
        )
        dtypes = {parameter.dtype for parameter in model.parameters()}
        return dtypes == {(torch.float32, torch.bfloat16)[number % 2]} and all(p.is_meta for p in model.parameters())

    for _ in range(20):
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(build, range(4)))
        assert ordinary()
    assert before == (torch.nn.Module.register_parameter, torch.nn.init.uniform_, torch.linspace)


def test_what_another_thread_builds_meanwhile_is_not_empty(monkeypatch):
    seen = []
    actual = AutoModelForCausalLM.from_config

    def building(*arguments: object, **settings: object) -> PreTrainedModel:
        thread = threading.Thread(target=lambda: seen.append(torch.nn.Linear(2, 2).weight.device.type))
        thread.start()
        thread.join()
        return actual(*arguments, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", building)
    model = build_skeleton(CONFIGS["llama"])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert seen == ["cpu"]


def test_runs_at_once_give_what_they_give_alone(tmp_path: Path):
    paths = [build_tiny(CONFIGS[name], tmp_path / name) for name in ("llama", "llama-tied", "mistral")]

    def run(path: Path, output: Path) -> bytes:
        settings = {"method": "magnitude", "sparsity": 0.5, "measure": False}
        slimlm.compress(slimlm.one_step(model=str(path), output_dir=str(output), **settings))
        return (output / "model.safetensors").read_bytes()

    alone = [run(path, tmp_path / f"alone-{path.name}") for path in paths]
    for turn in range(3):
        with ThreadPoolExecutor(3) as pool:
            at_once = list(pool.map(lambda path, turn=turn: run(path, tmp_path / f"{turn}-{path.name}"), paths))
        assert at_once == alone
        assert ordinary()
    assert load_file(tmp_path / "0-llama" / "model.safetensors")


@pytest.mark.parametrize("on", [True, False])
def test_bars_are_as_they_were_once_the_last_is_done(on: bool):
    was = transformers_logging.is_progress_bar_enabled()
    (transformers_logging.enable_progress_bar if on else transformers_logging.disable_progress_bar)()
    try:
        first, second = BARS.off(), BARS.off()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not transformers_logging.is_progress_bar_enabled()
        second.__exit__(None, None, None)
        assert transformers_logging.is_progress_bar_enabled() is on
    finally:
        (transformers_logging.enable_progress_bar if was else transformers_logging.disable_progress_bar)()


def test_only_the_thread_that_evaluates_is_quiet(capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture):
    import lm_eval.api.task
    import lm_eval.models.huggingface

    news, known = "tokens were truncated", "Passed an already-initialized model through `pretrained`, assuming"

    def use() -> None:
        lm_eval.models.huggingface.eval_logger.warning(news)
        lm_eval.models.huggingface.eval_logger.warning(known)
        list(lm_eval.api.task.tqdm(range(2), desc="bar of lm_eval"))
        os.write(2, b"said")

    with quiet():
        use()
        assert [record.getMessage() for record in caplog.records] == [news]
        assert capfd.readouterr().err == "said"
        caplog.clear()
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert [record.getMessage() for record in caplog.records] == [news, known]
    shown = capfd.readouterr().err
    assert "bar of lm_eval" in shown
    assert "said" in shown
