from pathlib import Path
from typing import Any

import pytest
import yaml

from slimlm.checkpoint import card, clients
from slimlm.checkpoint.card import CARD_NAME, write_card
from slimlm.families import FAMILIES


def manifest(name: str, origin: str) -> dict[str, Any]:
    run = {
        "seconds": {"total": 1.0},
        "peak_memory_bytes": {"host": 10**9},
        "machine": "a machine",
        "resumed": False,
        "resumed_anyway": [],
    }
    return {
        "model": {"name": name, "origin": origin, "path": name},
        "recipe": {"steps": [{"method": "slice"}]},
        "paper": "a paper",
        "needs_remote_code": False,
        "sparsity": {
            "requested": 0.25,
            "of": "parameters",
            "achieved": 0.25,
            "parameters_removed": 0.25,
            "zeros_in_pruned_matrices": None,
        },
        "parameters": {"dense": 4, "compressed": 3},
        "bytes": {"dense": 8, "compressed": 6},
        "changes": {},
        "calibration": None,
        "measured": None,
        "run": run,
    }


@pytest.mark.parametrize("name", ["it's: a [model]", "# no comment", "naïve/模型", "a\udcffb", "owner/model"])
@pytest.mark.parametrize("origin", ["hub", "directory"])
def test_the_hub_can_read_the_header_whatever_the_models_name(tmp_path: Path, name: str, origin: str):
    write_card(tmp_path, manifest(name, origin))
    text = (tmp_path / CARD_NAME).read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["tags"] == ["slimlm", "compression", "slice"]
    assert "base_model" in fields if origin == "hub" else "base_model" not in fields
    if "\udcff" not in name:
        assert fields.get("base_model", name) == name
        assert f"# {name}, compressed by slimlm" in body


def test_a_card_is_utf_8_in_any_locale(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale=True: "ascii")
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    card.write_card(tmp_path, manifest("naïve", "bundled"))
    assert "naïve" in (tmp_path / CARD_NAME).read_bytes().decode("utf-8")


@pytest.mark.parametrize("origin", ["hub", "directory"])
def test_licence_languages_and_base_model_carry_over(tmp_path: Path, origin: str):
    header = "license: llama3.2\nlicense_link: https://x.org/a\nlanguage:\n- en\n- no\nbase_model: some/base\ntags: [x]"
    (tmp_path / CARD_NAME).write_text(f"---\n{header}\n---\n# A model\n")
    found = manifest("owner/model", origin)
    found["model"]["card"] = card.inherited(tmp_path)
    write_card(tmp_path, found)
    fields = yaml.safe_load((tmp_path / CARD_NAME).read_text().split("---\n")[1])
    assert (fields["license"], fields["license_link"]) == ("llama3.2", "https://x.org/a")
    assert fields["language"] == ["en", "no"]
    assert fields["base_model"] == ("owner/model" if origin == "hub" else "some/base")
    assert fields["tags"] == ["slimlm", "compression", "slice"]


@pytest.mark.parametrize(
    "text", ["", "# No header", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\nlicense: mit"]
)
def test_a_card_without_a_header_gives_nothing(tmp_path: Path, text: str):
    assert card.inherited(tmp_path) == {}
    (tmp_path / CARD_NAME).write_text(text)
    assert card.inherited(tmp_path) == {}


def test_the_card_says_what_widths_cost_that_no_format_takes(tmp_path: Path):
    found = manifest("model", "directory")
    found["method"] = {"uneven": {"mlp": 888}}
    assert "No multiple of 32: `mlp` 888" in card.render_card(found)
    assert "No multiple" not in card.render_card(manifest("model", "directory"))


def test_the_card_says_where_such_models_were_tried(tmp_path: Path):
    found = manifest("model", "directory")
    found["model"]["model_type"], found["versions"] = "phi3", {"transformers": "5.24.0"}
    text = card.render_card(found)
    assert "Sliced `phi3` models were tried in transformers 4.57, transformers 5.24, PEFT 0.21 and vLLM 0.32: " in text
    assert "Made with transformers 5.24.0." in text
    assert "mlx-lm takes" not in text
    found["changes"] = {"hidden_size": [64, 32]}
    assert "mlx-lm takes the size of a head from hidden_size" in card.render_card(found)
    found["changes"] = {"model_type": ["llama", "mistral"], "hidden_size": [64, 32]}
    assert "Sliced `mistral` models were tried in" in card.render_card(found)
    found["model"]["model_type"] = "qwen2"
    found["changes"] = {"model_type": ["qwen2", "llama"], "hidden_size": [64, 32]}
    assert "CTranslate2 4.8" not in card.render_card(found)
    assert "Not in others: CTranslate2 takes the size of a head" in card.render_card(found)
    found["model"]["model_type"], found["changes"] = "olmo2", {}
    assert "were tried" not in card.render_card(found)


def test_what_the_card_claims_is_of_classes_that_there_are():
    assert set(clients.UNREAD) < set(clients.READ_BY) <= set(FAMILIES)
