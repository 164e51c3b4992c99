import shutil
from pathlib import Path

import pytest

from slimlm.checkpoint.resolve import BUNDLED, resolve_model
from slimlm.errors import UserError


def http_error() -> Exception:
    """An error of the HTTP library the hub client uses: neither an OSError nor a RuntimeError."""
    from huggingface_hub.utils import _http

    library = next(value for value in vars(_http).values() if hasattr(value, "ProxyError"))
    return library.ProxyError("no way through")


def test_the_alias_is_the_bundled_model():
    resolved = resolve_model("llama")
    assert resolved.path == BUNDLED["llama"]
    assert resolved.origin == "bundled"
    assert "bundled" in str(resolved)


def test_a_directory_of_the_aliass_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    assert resolve_model("llama").path == (tmp_path / "llama")


def test_a_hub_id_that_cannot_be_reached_names_the_ways_out():
    with pytest.raises(UserError, match=r"could not be fetched.*hf auth login.*local directory.*bundled model"):
        resolve_model("meta-llama/Llama-3.2-1B")


def test_a_misspelt_alias_is_suggested():
    with pytest.raises(UserError, match="did you mean 'llama'"):
        resolve_model("lama")


def test_a_directory_without_config_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("error", [OSError(), RuntimeError("proxy said no\nmore"), ValueError("x"), http_error()])
def test_whatever_the_hub_client_raises_is_one_line(monkeypatch, error: Exception):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="could not be fetched") as caught:
        resolve_model("someone/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./missing", "/nowhere/model", "~/nope-slimlm", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(name: str):
    with pytest.raises(UserError, match="does not exist"):
        resolve_model(name)


def test_a_revision_of_something_local_is_refused(tiny_llama: Path):
    with pytest.raises(UserError, match="hub ids only"):
        resolve_model(str(tiny_llama), revision="main")


def test_a_hub_model_in_the_cache_is_found_with_its_revision(tiny_llama: Path, tmp_path: Path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    import huggingface_hub._snapshot_download as download

    monkeypatch.setattr(download.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    resolved = resolve_model("someone/tiny")
    assert (resolved.origin, resolved.revision) == ("hub", commit)
