"""The modelling files that travel with checkpoints."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from slimlm.modeling import OWN_CLASSES, modeling_narrow, modeling_sliced
from slimlm.recipe import one_step
from slimlm.stages import compress
from tests.conftest import build_tiny, logits_of, random_tokens
from tests.families.configs import family_config


def narrow(name: str, tmp_path: Path) -> tuple[Path, Path]:
    path = build_tiny(family_config(name), tmp_path / "model")
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane. " * 60)
    data = {"dataset": str(tmp_path / "text.txt"), "num_calibration_samples": 6, "max_seq_length": 32}
    out = tmp_path / "out"
    compress(one_step(model=str(path), widths="hidden=16", measure=False, output_dir=str(out), **data))
    return path, out


def names_in(path: Path) -> set[str]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_the_head_of_gpt_neox_keeps_its_name_in_files(tmp_path: Path):
    """transformers 4 knows no other, and would take a random head."""
    dense, out = narrow("gpt_neox", tmp_path)
    assert names_in(out) == names_in(dense)
    assert "embed_out.weight" in names_in(out)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "opt"])
def test_a_model_that_is_saved_again_takes_its_code_along(name: str, tmp_path: Path):
    _, out = narrow(name, tmp_path)
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_narrow.py").read_bytes() == (out / "modeling_narrow.py").read_bytes()
    first, second = (json.loads((path / "config.json").read_text()) for path in (out, tmp_path / "again"))
    assert second["auto_map"] == first["auto_map"]
    assert names_in(tmp_path / "again") == names_in(out)
    tokens = random_tokens(2, 8)
    assert (logits_of(out, tokens) == logits_of(tmp_path / "again", tokens)).all()


def test_what_transformers_4_would_get_wrong_it_is_told_not_to_load(monkeypatch):
    for module in (modeling_narrow, modeling_sliced):
        monkeypatch.setattr(module, "RELEASE", 4)
    known = {"NarrowOPTForCausalLM", "NarrowGPTNeoXForCausalLM", "NarrowFalconForCausalLM", "NarrowBloomForCausalLM"}
    known.add("SlicedLlamaForCausalLM")  # exact there
    for config, model in OWN_CLASSES.items():
        if model.__name__ not in known:
            with pytest.raises(ImportError, match=f"{model.__name__} needs transformers 5 or newer"):
                model(config())
