import shutil
from pathlib import Path

import pytest
import torch

from slimlm.errors import UserError
from slimlm.evaluation.evaluate import evaluate
from tests.conftest import CONFIGS, build_tiny

FEW = {"tasks": (), "num_windows": 2, "window": 32, "generate": 0}


def test_models_that_compute_in_other_dtypes_are_not_compared(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model", torch.float32)
    with pytest.raises(UserError, match="compute in float32 and bfloat16: add --dtype"):
        evaluate(str(path), "llama", **FEW)
    assert evaluate(str(path), "llama", dtype="float32", **FEW).pairs


def test_models_with_other_chat_templates_are_not_compared(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model", torch.bfloat16)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="different chat templates"):
        evaluate(str(path), "llama", apply_chat_template=True, **FEW)


def test_several_models_are_each_compared_with_the_dense_one(tmp_path: Path):
    paths = [build_tiny(CONFIGS["llama"], tmp_path / name, torch.bfloat16) for name in ("a", "b")]
    found = evaluate([str(path) for path in paths], "llama", **FEW)
    assert [entry["name"] for entry in found.models] == [*map(str, paths), "llama"]
    assert [(pair["model"], pair["against"]) for pair in found.pairs] == [(str(path), "llama") for path in paths]
    alone = evaluate(str(paths[1]), "llama", **FEW)
    assert found.pairs[1] == alone.pairs[0]
    assert found.models[2]["texts"] == alone.models[1]["texts"]


def test_a_model_is_not_measured_twice(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "a")
    shutil.copytree(path, tmp_path / "b")
    with pytest.raises(UserError, match="given more than once"):
        evaluate([str(path), str(tmp_path / "b"), f"{path}/"], **FEW)


def test_windows_are_no_longer_than_the_shortest_context(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    with pytest.raises(UserError, match="beyond the models' context of 128"):
        evaluate(str(path), **{**FEW, "window": 200})
