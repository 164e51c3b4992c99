"""Uploading a result: refused before the run where it cannot be, and done once the result has its name."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import LocalTokenNotFoundError

from slimlm.checkpoint.manifest import MANIFEST_NAME
from slimlm.checkpoint.push import Push
from slimlm.cli import main
from slimlm.errors import RunFailure, UserError
from slimlm.recipe import Recipe, one_step
from slimlm.stages import compress

ME = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}


@pytest.fixture
def hub(monkeypatch) -> dict[str, Any]:
    """What the hub's client is asked to do. `user`: who is logged in; `fails`: what uploading raises."""
    seen: dict[str, Any] = {"user": ME, "fails": None, "done": []}

    def whoami(self: HfApi) -> dict[str, Any]:
        if seen["user"] is None:
            raise LocalTokenNotFoundError("Token is required, but no token found")
        return dict(seen["user"])

    def create_repo(self: HfApi, repo_id: str, private: bool | None, exist_ok: bool) -> RepoUrl:
        assert exist_ok
        seen["done"].append(("create", repo_id, private, self.token))
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, delete_patterns: list[str], **_: Any) -> None:
        if seen["fails"]:
            raise seen["fails"]
        assert (folder_path / MANIFEST_NAME).is_file()
        assert sorted(delete_patterns) == [
            "adapter_config.json",
            "model-00001-of-00002.safetensors",
            "slimlm/basis.safetensors",
        ]
        seen["done"].append(("upload", repo_id, folder_path.name, sorted(path.name for path in folder_path.iterdir())))

    def list_repo_files(self: HfApi, repo_id: str) -> list[str]:
        return [
            "README.md",
            "notes.txt",
            "model-00001-of-00002.safetensors",
            "adapter_config.json",
            "fp16/a.safetensors",
            "slimlm/basis.safetensors",
        ]

    for method in (whoami, create_repo, upload_folder, list_repo_files):
        monkeypatch.setattr(HfApi, method.__name__, method)
    return seen


def recipe(model: Path, out: Path) -> Recipe:
    return one_step(model=str(model), method="magnitude", sparsity=0.5, measure=False, output_dir=str(out))


@pytest.mark.parametrize("repo", ["smaller", "us/smaller"])
def test_a_whole_result_is_uploaded(repo: str, hub: dict[str, Any], tiny_llama: Path, tmp_path: Path):
    compress(recipe(tiny_llama, tmp_path / "out"), push_to_hub=repo, private=True, token="hf_secret")
    (created, uploaded) = hub["done"]
    assert created == ("create", repo, True, "hf_secret")
    assert uploaded[:3] == ("upload", repo if "/" in repo else "me/smaller", "out")
    assert {"model.safetensors", "README.md", "config.json"} <= set(uploaded[3])
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"hf_secret" not in file.read_bytes()
    assert "hf_secret" not in repr(Push(repo, token="hf_secret"))


@pytest.mark.parametrize(
    ("user", "repo", "message"),
    [
        (None, "smaller", "log in with `hf auth login`, or give --token"),
        ({**ME, "auth": {"accessToken": {"role": "read"}}}, "smaller", "the token may only read"),
        (ME, "others/smaller", "me is not a member of others"),
        (ME, "a/b/c", "--push-to-hub a/b/c: Repo id must"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_run(
    user: Any, repo: str, message: str, hub: dict[str, Any], tiny_llama: Path, tmp_path: Path
):
    hub["user"] = user
    with pytest.raises(UserError, match=message):
        compress(recipe(tiny_llama, tmp_path / "out"), push_to_hub=repo)
    assert not hub["done"]
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_the_result(hub: dict[str, Any], tiny_llama: Path, tmp_path: Path):
    hub["fails"] = ConnectionError("gone")
    with pytest.raises(RunFailure, match="the result is whole, at .*out, but .* gone.*`hf upload smaller .*out`"):
        compress(recipe(tiny_llama, tmp_path / "out"), push_to_hub="smaller")
    assert (tmp_path / "out" / MANIFEST_NAME).is_file()
    hub["fails"] = None
    compress(recipe(tiny_llama, tmp_path / "out"), push_to_hub="smaller", resume=True)
    assert hub["done"][-1][0] == "upload"


def test_without_the_network_that_is_what_is_said(tiny_llama: Path, tmp_path: Path, capsys, monkeypatch):
    command = ["compress", "-m", str(tiny_llama), "-s", "0.5", "--method", "magnitude", "-o", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["slimlm", *command, "--push-to-hub", "smaller", "--token", "hf_x"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--push-to-hub: the hub does not answer as it should (OfflineModeIsEnabled" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["slimlm", *command, "--private"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--private is for --push-to-hub REPO" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
