"""config.json for programs of every age: what the old keys say is what the new ones say."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, LlamaConfig, Phi3Config

from slimlm.checkpoint.config_file import move_generation_settings, old_keys, read_settings, write_config
from tests.conftest import CONFIGS, SIZES
from tests.families.configs import SETTINGS, family_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALED: dict[str, dict[str, Any]] = {
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "rope_theta": 123.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32},
}


def written(config: Any, path: Path, dense: dict[str, Any] | None = None) -> dict[str, Any]:
    source = path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(dense or {}))
    write_config(config, source, path)
    return read_settings(path / "config.json")


@pytest.mark.parametrize("name", [*SETTINGS, *CONFIGS])
def test_rope_and_dtype_are_there_under_the_old_names(name: str, tmp_path: Path):
    config = copy.deepcopy(CONFIGS[name]) if name in CONFIGS else family_config(name)
    config.dtype = torch.bfloat16
    rope = getattr(config, "rope_parameters", None)
    if rope and "rope_theta" in rope:
        config.rope_parameters = rope | {"rope_theta": 54321.0}
    settings = written(config, tmp_path)
    assert settings["torch_dtype"] == settings["dtype"] == "bfloat16"
    if not rope:
        assert "rope_theta" not in settings
        return
    new = settings["rope_parameters"]
    whole = new.get("full_attention", new)
    assert settings["rope_theta"] == whole["rope_theta"]
    assert settings["rope_scaling"] is None
    assert settings.get("partial_rotary_factor") == whole.get("partial_rotary_factor")
    if "sliding_attention" in new:
        assert settings["rope_local_base_freq"] == new["sliding_attention"]["rope_theta"]
    if name.startswith("gpt_neox"):
        assert (settings["rotary_emb_base"], settings["rotary_pct"]) == (54321.0, whole["partial_rotary_factor"])
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("kind", sorted(SCALED))
def test_a_scaled_rope_is_there_under_the_old_names(kind: str, tmp_path: Path):
    config = LlamaConfig(**SIZES, rope_parameters=SCALED[kind])
    settings = written(config, tmp_path)
    assert settings["rope_scaling"] == {name: value for name, value in SCALED[kind].items() if name != "rope_theta"}
    assert settings["rope_theta"] == SCALED[kind]["rope_theta"]
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters == config.rope_parameters
    only_old = {name: value for name, value in settings.items() if name != "rope_parameters"}
    assert LlamaConfig.from_dict(only_old).rope_parameters == config.rope_parameters


def test_old_keys_that_the_model_had_stay_as_they_were(tmp_path: Path):
    scaling = {"type": "longrope", "long_factor": [1.0] * 4, "short_factor": [2.0] * 4}
    dense = {"model_type": "phi3", "rope_theta": 77.0, "rope_scaling": scaling, "torch_dtype": "float16"}
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = Phi3Config(**sizes, rope_theta=77.0, rope_scaling=dict(scaling), original_max_position_embeddings=64)
    config.dtype = torch.float32
    settings = written(config, tmp_path, dense)
    assert settings["rope_scaling"] == scaling
    assert settings["rope_theta"] == 77.0
    assert settings["torch_dtype"] == "float32"
    assert old_keys(settings, {})["rope_scaling"] == scaling  # the three that its check in transformers 4 wants
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_old_keys_that_would_change_the_model_are_left_out(tmp_path: Path, caplog):
    dense = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 3.0}}
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    settings = written(config, tmp_path, dense)
    assert "rope_scaling" not in settings
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
    assert "no keys for transformers 4" in caplog.text


def test_sampling_settings_of_an_old_config_move(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    for path in (source, target):
        path.mkdir()
    old = {"model_type": "llama", "temperature": 0.6, "do_sample": True, "eos_token_id": [3, 4], "hidden_size": 8}
    (source / "config.json").write_text(json.dumps(old))
    move_generation_settings(source, target)
    found = GenerationConfig.from_pretrained(target)
    assert (found.temperature, found.do_sample, found.eos_token_id) == (0.6, True, [3, 4])
    assert not hasattr(found, "hidden_size")
    (target / "generation_config.json").write_text("{}")  # what came with the model wins, as in transformers
    move_generation_settings(source, target)
    assert (target / "generation_config.json").read_text() == "{}"


def test_a_config_without_sampling_settings_gets_no_file(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "use_cache": True}))
    (tmp_path / "target").mkdir()
    move_generation_settings(tmp_path, tmp_path / "target")
    assert not any((tmp_path / "target").iterdir())
