import json
import os
from pathlib import Path

import pytest

from slimlm.errors import RunFailure, UserError
from slimlm.report import results
from slimlm.report.results import check_results, write_results


def test_checking_leaves_nothing_and_changes_nothing(tmp_path: Path):
    (tmp_path / "old.json").write_text("earlier")
    for name in ("old.json", "new.json"):
        check_results(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "earlier"
    for place in (tmp_path, tmp_path / "nowhere" / "x.json"):
        with pytest.raises(UserError, match="cannot be written"):
            check_results(place)


def test_a_file_is_written_whole_or_stays(tmp_path: Path, monkeypatch):
    target = tmp_path / "kept.json"
    (tmp_path / "link.json").symlink_to(target)
    write_results(tmp_path / "link.json", {"a": "±"})
    assert json.loads(target.read_text(encoding="utf-8")) == {"a": "±"}
    assert (tmp_path / "link.json").is_symlink()
    with pytest.raises(TypeError):
        write_results(target, {"a": object()})
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(RunFailure, match="No space left on device"):
        write_results(target, {"b": 1})
    monkeypatch.undo()
    assert json.loads(target.read_text(encoding="utf-8")) == {"a": "±"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "link.json"]


def full_disk(self: Path, text: str, **_: str) -> int:
    self.touch()
    raise OSError(28, "No space left on device")


def test_a_file_that_may_not_be_renamed_over_is_filled(tmp_path: Path, monkeypatch):
    """As where a container mounts a single file."""

    def busy(self: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    write_results(tmp_path / "x.json", [1])
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == [1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name here")
def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_results(pipe)
    write_results(pipe, [1])
    assert json.loads(os.read(reader, 100)) == [1]
    os.close(reader)
    assert pipe.is_fifo()
    assert results._in_one_step(pipe) is False
