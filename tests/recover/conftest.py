"""A pruned model, and how it is recovered."""

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from slimlm.recipe import one_step
from slimlm.stages import compress
from tests.conftest import CONFIGS, build_tiny, random_tokens

TRAINED = {"tokens": 24 * 8 * 8, "learning_rate": 0.003, "self_share": 0.25}


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    numpy.save(tmp_path / "tokens.npy", random_tokens(40, 24).numpy())
    return {
        "model": str(build_tiny(CONFIGS["llama"], tmp_path / "model")), "dataset": str(tmp_path / "tokens.npy"),
        "num_calibration_samples": 40, "max_seq_length": 24, "eval_windows": 2, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip


@pytest.fixture
def pruned(settings: dict, tmp_path: Path) -> Path:
    whole = {**settings, "output_dir": str(tmp_path / "pruned"), "method": "magnitude", "pattern": "2:4"}
    del whole["dataset"], whole["num_calibration_samples"]
    return compress(one_step(**whole)).output_dir


def recovering(settings: dict, model: Path, **more) -> dict:
    return {**settings, "model": str(model), "method": "recover", **TRAINED, **more}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")
