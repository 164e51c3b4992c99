"""Writing `config.json` for every program that reads one, and the generation settings that old ones hold.

transformers 5 has RoPE in `rope_parameters` and the dtype in `dtype`. Earlier releases, and programs that read the file
themselves, look for `rope_theta`, `rope_scaling` and `torch_dtype`, and where these are missing take a theta of 10,000
without a word. The file has both.
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from slimlm.checkpoint.disk import disk_errors, write_whole
from slimlm.checkpoint.kinds import CONFIG_NAME

logger = logging.getLogger(__name__)
Settings = dict[str, Any]
GENERATION_NAME = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
OLD_ROPE = (
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "rotary_emb_base",
    "rotary_pct",
)


def write_config(config: PretrainedConfig, source: Path, target: Path) -> None:
    """Write a result's config beside its weights. source: the dense model's directory.

    Raises RunFailure when the disk is full.
    """
    with disk_errors(target):
        config.save_pretrained(target)
    settings = read_settings(target / CONFIG_NAME)
    old = old_keys(settings, read_settings(source / CONFIG_NAME))
    if not reads_the_same(config, settings | old):
        logger.warning("config.json has no keys for transformers 4: with them it would be another model's")
        return
    write_whole(target / CONFIG_NAME, json.dumps(settings | old, indent=2, sort_keys=True) + "\n")


def read_settings(path: Path) -> Settings:
    """A JSON file that holds settings; none where there is no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def reads_the_same(config: PretrainedConfig, settings: Settings) -> bool:
    """Whether transformers makes the same config of these settings; what else it keeps of them decides nothing."""
    made = [type(config).from_dict(copy.deepcopy(found)) for found in (config.to_dict(), settings)]
    known, read = (_comparable(found.to_dict()) for found in made)
    return all(read[name] == value for name, value in known.items())


def _comparable(settings: Settings) -> Settings:
    """Without where the config is from, and the old name of RoPE's type, which stays beside the new one."""
    found = {name: value for name, value in settings.items() if not name.startswith("_")}
    if isinstance(rope := found.get("rope_parameters"), dict):
        found["rope_parameters"] = {name: value for name, value in rope.items() if name != "type"}
    return found


def old_keys(settings: Settings, dense: Settings) -> Settings:
    """What transformers 4 calls RoPE's parameters and the dtype. settings, dense: the result's and the model's config.

    RoPE is the dense model's own, whose old keys, where it has them, are what was right for it.
    """
    found = {"torch_dtype": settings["dtype"]} if settings.get("dtype") else {}
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return found
    whole, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    if not isinstance(whole, dict):
        return found
    found |= _old_rope(whole, str(settings.get("model_type")))
    if isinstance(local, dict):
        found["rope_local_base_freq"] = local.get("rope_theta")
    found |= {name: dense[name] for name in OLD_ROPE if name in dense and dense["model_type"] == settings["model_type"]}
    return {name: value for name, value in found.items() if name not in settings or name == "rope_scaling"}


def _old_rope(rope: Settings, model_type: str) -> Settings:
    """RoPE's parameters, one set, as transformers 4 has them."""
    theta, share, kind = rope.get("rope_theta"), rope.get("partial_rotary_factor"), rope.get("rope_type", "default")
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if model_type == "olmo2" and kind in ("linear", "dynamic"):  # its check wants these two and nothing else
        scaling = {"type": kind, "factor": rope["factor"]}
    if model_type == "phi3" and kind == "longrope":  # its check wants these three and nothing else
        scaling = {"type": kind, "long_factor": rope["long_factor"], "short_factor": rope["short_factor"]}
    found = {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}
    if share is not None:
        found["partial_rotary_factor"] = share
    if model_type.endswith("gpt_neox"):
        found |= {"rotary_emb_base": theta, "rotary_pct": share}
    return found


def move_generation_settings(source: Path, target: Path) -> None:
    """Sampling settings in the config of a model without `generation_config.json` go into one, where transformers 5
    looks for them. Raises RunFailure when the disk is full."""
    if (target / GENERATION_NAME).exists():
        return
    old = read_settings(source / CONFIG_NAME)
    found = {name: old[name] for name in GenerationConfig().to_dict() if old.get(name) is not None}
    ignored = {*TOKENS, "use_cache", "transformers_version"}
    if found.keys() - ignored:
        found.pop("transformers_version", None)
        write_whole(target / GENERATION_NAME, json.dumps(found, indent=2, sort_keys=True) + "\n")
