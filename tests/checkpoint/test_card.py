from pathlib import Path
from typing import Any

import pytest
import yaml

from slimlm.checkpoint import card
from slimlm.checkpoint.card import CARD_NAME, write_card


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
        "recipe": {"method": "slice"},
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
