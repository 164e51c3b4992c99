from pathlib import Path

import pytest

from slimlm.checkpoint.resolve import BUNDLED, resolve_model
from slimlm.errors import UserError


def test_the_alias_is_the_bundled_model():
    resolved = resolve_model("llama")
    assert resolved.path == BUNDLED["llama"]
    assert resolved.origin == "bundled"
    assert "bundled" in str(resolved)


def test_a_directory_of_the_aliass_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("llama").path == (tmp_path / "llama")


def test_a_hub_id_that_cannot_be_reached_names_the_ways_out():
    with pytest.raises(UserError, match=r"could not be fetched.*hf auth login.*local directory.*--model llama"):
        resolve_model("meta-llama/Llama-3.2-1B")


def test_a_misspelt_alias_is_suggested():
    with pytest.raises(UserError, match="did you mean 'llama'"):
        resolve_model("lama")


def test_a_directory_without_config_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["./missing", "/nowhere/model", "~/nope-slimlm", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(name: str):
    with pytest.raises(UserError, match="does not exist"):
        resolve_model(name)


def test_a_revision_of_something_local_is_refused(tiny_llama: Path):
    with pytest.raises(UserError, match="hub ids only"):
        resolve_model(str(tiny_llama), revision="main")


def test_a_hub_model_in_the_cache_is_found_with_its_revision(tiny_llama: Path, tmp_path: Path, monkeypatch):
    import shutil

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    import huggingface_hub._snapshot_download as download

    monkeypatch.setattr(download.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    resolved = resolve_model("someone/tiny")
    assert (resolved.origin, resolved.revision) == ("hub", commit)
