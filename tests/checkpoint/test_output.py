import fcntl
import os
from pathlib import Path

import pytest

from slimlm.checkpoint.output import LOCK_NAME, Staging, check_output, clear_leftovers, staged_output
from slimlm.errors import UserError


def test_a_whole_output_appears_in_one_step(tmp_path: Path):
    output = tmp_path / "deep" / "out"
    with staged_output(output) as staging:
        (staging.model / "file").write_text("new")
        (staging.work / "journal").write_text("x")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["file"]
    assert not staging.root.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_run_leaves_nothing_under_the_name_and_can_be_resumed(tmp_path: Path, error):
    output = tmp_path / "out"
    with pytest.raises(error), staged_output(output) as staging:
        (staging.model / "file").write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with staged_output(output, resume=True) as staging:
        assert (staging.model / "file").read_text() == "half"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_overwrite_leaves_the_old_output(tmp_path: Path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "file").write_text("old")
    (output / "slimlm.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt), staged_output(output, overwrite=True) as staging:
        (staging.model / "file").write_text("half")
        raise KeyboardInterrupt
    assert (output / "file").read_text() == "old"
    with staged_output(output, overwrite=True) as staging:
        (staging.model / "file").write_text("new")
    assert (output / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_interruption_between_the_two_renames_puts_the_old_output_back(tmp_path: Path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "file").write_text("old")
    (output / "slimlm.json").write_text("{}")
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "model":
            raise KeyboardInterrupt
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt), staged_output(output, overwrite=True) as staging:
            (staging.model / "file").write_text("new")
    assert (output / "file").read_text() == "old"
    with staged_output(output, overwrite=True, resume=True):
        pass
    assert (output / "file").read_text() == "new"


def test_an_old_output_that_a_death_between_the_renames_hid_comes_back(tmp_path: Path):
    staging = Staging(tmp_path / "out")
    staging.replaced.mkdir(parents=True)
    (staging.replaced / "file").write_text("old")
    with pytest.raises(RuntimeError), staged_output(staging.output):
        raise RuntimeError
    assert (staging.output / "file").read_text() == "old"


def test_something_that_appeared_at_the_output_meanwhile_is_not_replaced(tmp_path: Path):
    output = tmp_path / "out"
    with pytest.raises(UserError, match="did not write"), staged_output(output, overwrite=True):
        output.mkdir()
        (output / "mine").write_text("precious")
    assert (output / "mine").read_text() == "precious"


@pytest.mark.parametrize("left", [[], ["lock"], ["work"], ["model", "work", "lock"]])
def test_whatever_a_death_leaves_of_the_staging_place_is_known_as_ours(tmp_path: Path, left: list[str]):
    staging = Staging(tmp_path / "out")
    staging.root.mkdir()
    for name in left:
        (staging.root / name).touch() if name == "lock" else (staging.root / name).mkdir()
    check_output(staging.output, overwrite=False, inputs=[])
    clear_leftovers(staging.output)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_holder_removed_meanwhile_is_not_taken_for_ours(tmp_path: Path, monkeypatch):
    output = tmp_path / "out"
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        (tmp_path / "out.partial" / LOCK_NAME).unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="just finished"), staged_output(output):
        pass


def test_a_second_run_into_the_same_output_is_refused(tmp_path: Path):
    output = tmp_path / "out"
    with staged_output(output) as staging:
        (staging.model / "file").write_text("first")
        with pytest.raises(UserError, match="another slimlm run"), staged_output(output):
            pass
    assert (output / "file").read_text() == "first"


def test_without_resume_what_a_killed_run_left_is_cleared(tmp_path: Path):
    staging = Staging(tmp_path / "out")
    (staging.model / "sub").mkdir(parents=True)
    (staging.model / "sub" / "old").write_text("x")
    (staging.root / LOCK_NAME).write_text("")
    with staged_output(staging.output) as fresh:
        assert list(fresh.model.iterdir()) == list(fresh.work.iterdir()) == []
        (fresh.model / "file").write_text("new")
    assert [path.name for path in staging.output.iterdir()] == ["file"]


def test_outputs_that_cannot_be_are_refused_beforehand(tmp_path: Path):
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "file").write_text("x")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    (tmp_path / "theirs.partial").mkdir()
    (tmp_path / "theirs.partial" / "precious").write_text("x")
    for output, overwrite, message in [
        (source, True, "is or holds an input"),
        (tmp_path, True, "is or holds an input"),
        (tmp_path / "file", True, "not a directory"),
        (tmp_path / "file" / "below", False, "cannot be created in .*Not a directory"),
        (full, False, "--overwrite"),
        (full, True, "slimlm did not write"),
        (tmp_path / "theirs", False, "was not made by slimlm"),
    ]:
        with pytest.raises(UserError, match=message):
            check_output(output, overwrite, inputs=[source])
    (full / "slimlm.json").write_text("{}")
    check_output(full, overwrite=True, inputs=[source])
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB"):
        check_output(tmp_path / "new", overwrite=False, inputs=[source], needed_bytes=10**18)


def test_an_unwritable_place_is_one_clear_error(tmp_path: Path):
    places = [Path("/proc/slimlm/out")]
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        places.append(tmp_path / "out")
    for place in places:
        with pytest.raises(UserError, match="cannot be created"):
            check_output(place, overwrite=False, inputs=[])
        with pytest.raises(UserError, match="cannot be created"), staged_output(place, overwrite=False):
            pass
