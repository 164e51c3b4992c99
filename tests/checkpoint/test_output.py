import errno
import fcntl
import json
import os
import platform
import shutil
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slimlm.checkpoint import lock as lock_module
from slimlm.checkpoint.journal import COMPLETE, JOURNAL_NAME, Journal
from slimlm.checkpoint.lock import LOCK_NAME, OWNER_NAME
from slimlm.checkpoint.output import clear_leftovers, held, staged_output
from slimlm.checkpoint.staging import Staging, check_output, check_space
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
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB in "):
        check_space(tmp_path / "new", 10**18)


def test_space_is_counted_disk_by_disk(tmp_path: Path, monkeypatch):
    """What goes to one disk is added up, what goes to another is not; what an earlier run left there counts as free."""
    (tmp_path / "fast").mkdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("slimlm.checkpoint.staging.shutil.disk_usage", lambda path: usage._replace(free=1000))
    check_space(tmp_path / "out", 600, tmp_path / "fast", 400)
    with pytest.raises(UserError, match="needs"):
        check_space(tmp_path / "out", 600, tmp_path / "fast", 401)
    left = Staging(tmp_path / "out", tmp_path / "fast").scratch
    left.mkdir()
    (left / "states.0").write_bytes(b"x" * 100)
    check_space(tmp_path / "out", 600, tmp_path / "fast", 500)
    own = Staging(tmp_path / "out").work
    own.mkdir(parents=True)
    (own / "states.0").write_bytes(b"x" * 100)
    check_space(tmp_path / "out", 600, None, 500)
    with pytest.raises(UserError, match="needs"):
        check_space(tmp_path / "out", 600, None, 501)


@pytest.fixture
def mounted(tmp_path: Path):
    """Mounts made in a test, gone afterwards. Needs root in a namespace that may mount."""
    places: list[Path] = []

    def mount(place: Path, *arguments: str) -> None:
        place.mkdir()
        done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        places.append(place)

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
@pytest.mark.parametrize("name", ["out", "out.partial", "with space"])
def test_a_mount_point_is_refused_beforehand(tmp_path: Path, mounted, kind: str, name: str):
    (tmp_path / "source").mkdir()
    place = tmp_path / name
    mounted(place, *(["-t", "tmpfs", "none"] if kind == "tmpfs" else ["--bind", str(tmp_path / "source")]))
    output = tmp_path / "out" if name == "out.partial" else place
    with pytest.raises(UserError, match="is a mount point.*--output-dir"):
        check_output(output, overwrite=True, inputs=[])
    check_output(place / "below", overwrite=False, inputs=[])


def test_mount_points_are_told_from_mountinfo(tmp_path: Path, monkeypatch):
    """Without the right to mount: the lines of a bind mount, its blanks written in octal."""
    place = tmp_path / "with space"
    written = str(place).replace(" ", "\\040")
    lines = f"22 1 8:1 / / rw - ext4 /dev/a rw\n30 22 8:1 /x {written} rw - ext4 /dev/a rw\n"
    original = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *a, **k: lines if str(self) == "/proc/self/mountinfo" else original(self, *a, **k),
    )
    with pytest.raises(UserError, match="is a mount point"):
        check_output(place, overwrite=False, inputs=[])
    check_output(tmp_path / "other", overwrite=False, inputs=[])


@pytest.mark.parametrize("name", ["", "model", "work", "stages", "replaced", "lock", "owner"])
def test_links_that_others_planted_are_refused(tmp_path: Path, name: str):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "config.json").write_text("precious")
    root = Staging(tmp_path / "out").root
    if name:
        root.mkdir()
    (root / name if name else root).symlink_to(victim)
    with pytest.raises(UserError, match="is a link to .*victim"):
        check_output(tmp_path / "out", overwrite=True, inputs=[])
    assert (victim / "config.json").read_text() == "precious"


def test_a_link_that_is_planted_as_a_lock_is_not_followed(tmp_path: Path):
    root = Staging(tmp_path / "out").root
    root.mkdir()
    (root / LOCK_NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="lock is a link to .*victim"), staged_output(tmp_path / "out"):
        pass
    assert not (tmp_path / "victim").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
@pytest.mark.parametrize("name", ["", "model"])
def test_what_belongs_to_another_user_is_refused(tmp_path: Path, name: str):
    place = Staging(tmp_path / "out").root / name
    place.mkdir(parents=True)
    os.chown(place, 12345, 12345)
    with pytest.raises(UserError, match=r"belongs to another user \(uid 12345\)"):
        check_output(tmp_path / "out", overwrite=False, inputs=[])


def test_what_is_built_is_nobody_elses(tmp_path: Path):
    with staged_output(tmp_path / "out") as staging:
        assert stat.S_IMODE(staging.root.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) & 0o055  # the result is as readable as any directory


def refuse_to_delete(monkeypatch, name: str) -> None:
    original = shutil.rmtree

    def rmtree(path: Path, *args, **kwargs) -> None:
        if Path(path).name == name:
            raise OSError(errno.EPERM, "Operation not permitted", str(path))
        original(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)


def test_a_run_that_cannot_start_over_says_so(tmp_path: Path, monkeypatch):
    staging = Staging(tmp_path / "out")
    staging.work.mkdir(parents=True)
    refuse_to_delete(monkeypatch, "work")
    with (
        pytest.raises(UserError, match=r"work cannot be deleted: Operation not permitted"),
        staged_output(staging.output),
    ):
        pass


def test_what_cannot_be_deleted_in_the_end_does_not_fail_a_run(tmp_path: Path, monkeypatch, caplog):
    refuse_to_delete(monkeypatch, "work")
    with staged_output(tmp_path / "out") as staging:
        (staging.model / "file").write_text("new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert "work cannot be deleted: Operation not permitted; delete it yourself; the result is whole" in caplog.text


def test_nfs_keeps_the_entry_of_a_removed_lock_and_that_fails_nothing(tmp_path: Path, monkeypatch):
    """Until it is closed, an open file that is removed stays in its directory as .nfs..., which then is not empty."""
    original_unlink, original_close, hidden = Path.unlink, os.close, []

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == LOCK_NAME and self.exists():
            hidden.append(self.rename(self.with_name(".nfs0001")))
        else:
            original_unlink(self, missing_ok=missing_ok)

    def close(descriptor: int) -> None:
        original_close(descriptor)
        while hidden:
            original_unlink(hidden.pop())

    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr("slimlm.checkpoint.lock.os.close", close)
    with staged_output(tmp_path / "out") as staging:
        (staging.model / "file").write_text("new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert not staging.root.exists()


@pytest.fixture(params=["ENOSYS", "ENOLCK", "no fcntl"])
def without_locks(request, monkeypatch) -> None:
    """A file system, or a system, that has no file locks."""
    if request.param == "no fcntl":
        monkeypatch.setattr(lock_module, "fcntl", None)
        return

    def flock(descriptor: int, how: int) -> None:
        raise OSError(getattr(errno, request.param), "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_file_locks_there_is_one_run_at_a_time_too(tmp_path: Path, without_locks):
    output = tmp_path / "out"
    with staged_output(output) as staging:
        (staging.model / "file").write_text("first")
        with (
            pytest.raises(UserError, match=f'another slimlm run is writing .*"pid": {os.getpid()}'),
            staged_output(output),
        ):
            pass
    assert (output / "file").read_text() == "first"
    assert not staging.root.exists()


@pytest.mark.parametrize(
    ("who", "age", "dead"),
    [
        ({"host": platform.node(), "pid": 2**22 + 5}, 0, True),
        ({"host": "elsewhere", "pid": 1}, 0, False),
        ({"host": "elsewhere", "pid": 1}, lock_module.STALE + 60, True),
        (None, 0, False),
        (None, lock_module.STALE + 60, True),
    ],
    ids=["gone from here", "elsewhere", "silent elsewhere", "just beginning", "begun long ago"],
)
def test_an_owner_that_is_dead_is_replaced(tmp_path: Path, without_locks, who: dict | None, age: float, dead: bool):
    staging = Staging(tmp_path / "out")
    staging.root.mkdir()
    owner = staging.root / OWNER_NAME
    owner.write_text("" if who is None else json.dumps(who))
    os.utime(owner, (time.time() - age, time.time() - age))
    if dead:
        with staged_output(staging.output):
            pass
        assert staging.output.is_dir()
    else:
        with pytest.raises(UserError, match="another slimlm run is writing"), staged_output(staging.output):
            pass
        assert owner.exists()


def test_an_owner_shows_that_it_lives(tmp_path: Path, without_locks, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT", 0.01)
    with staged_output(tmp_path / "out") as staging:
        owner = staging.root / OWNER_NAME
        os.utime(owner, (0, 0))
        while owner.stat().st_mtime == 0:  # pytest's own timeout ends it where no sign of life comes
            time.sleep(0.01)


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


def test_a_live_owner_is_never_taken_for_dead(tmp_path: Path, without_locks):
    """However many look at it at once."""
    staging = Staging(tmp_path / "out")
    with staged_output(staging.output):
        owner = staging.root / OWNER_NAME
        with ThreadPoolExecutor(4) as pool:
            judged = list(pool.map(lambda _: lock_module._is_dead(owner, owner.read_text()), range(400)))
        assert not any(judged)
        assert not list(staging.root.glob(f"{OWNER_NAME}.*"))


def test_of_two_that_find_a_dead_owner_one_wins(tmp_path: Path, without_locks):
    """The second judged the dead one's file before the first put its own there."""
    staging = Staging(tmp_path / "out")
    staging.root.mkdir()
    owner = staging.root / OWNER_NAME
    with lock_module._owned(owner):
        mine = owner.read_text()
        lock_module._put_away(owner, "what the dead one said")
        assert owner.read_text() == mine
    assert not owner.exists()


def test_what_a_finished_run_did_not_come_to_publish_is_said_before_it_goes(tmp_path: Path, caplog):
    staging = Staging(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), staged_output(staging.output) as place:
        journal = Journal(place.work, {})
        journal.commit("written model.layers.0")
        journal.commit(COMPLETE)
        raise KeyboardInterrupt
    with staged_output(staging.output):
        pass
    assert f"discarding 2 finished steps in {staging.root}" in caplog.text


def test_leftovers_of_another_run_stay(tmp_path: Path, caplog):
    with pytest.raises(KeyboardInterrupt), staged_output(tmp_path / "out") as staging:
        Journal(staging.work, {}).commit("written model.layers.0")
        raise KeyboardInterrupt
    clear_leftovers(staging.output)
    assert "holds an interrupted run of another kind: it is left alone" in caplog.text
    assert (staging.work / JOURNAL_NAME).exists()
    with pytest.raises(UserError, match="holds an interrupted run of another kind"), held(staging.output):
        pass


def test_runs_that_are_cleared_first_count_as_free(tmp_path: Path, monkeypatch):
    stages = Staging(tmp_path / "out").stages
    stages.mkdir(parents=True)
    (stages / "weights").write_bytes(b"x" * 500)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("slimlm.checkpoint.staging.shutil.disk_usage", lambda path: usage._replace(free=1000))
    check_space(tmp_path / "out", 1500)
    with pytest.raises(UserError, match="needs"):
        check_space(tmp_path / "out", 1500, resume=True)
