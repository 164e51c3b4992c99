from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Timer

import pytest
import torch
from torch import Tensor

from slimlm.checkpoint.disk import disk_errors
from slimlm.errors import RunFailure
from slimlm.model import waiting
from slimlm.model.hidden import AHEAD, Scratch, Spilled
from slimlm.model.saving import Saver
from slimlm.model.waiting import BatchFile

SIZE = 4 * 3 * 6 * 4  # bytes of a batch


class Recorded:
    """Bytes that went to and came from files."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.read = self.written = 0
        read, write, pieces = BatchFile.read, BatchFile.write, BatchFile.pieces

        def reading(file: BatchFile, offset: int, into: Tensor) -> Tensor:
            self.read += into.nbytes
            return read(file, offset, into)

        def writing(file: BatchFile, offset: int, tensor: Tensor) -> None:
            self.written += tensor.nbytes
            write(file, offset, tensor)

        def hashing(file: BatchFile, offset: int, count: int) -> Iterator[bytes]:
            self.read += count
            return pieces(file, offset, count)

        for name, function in (("read", reading), ("write", writing), ("pieces", hashing)):
            patch.setattr(BatchFile, name, function)

    def take(self) -> tuple[int, int]:
        found, self.read, self.written = (self.read, self.written), 0, 0
        return found


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


def batches_of(count: int, width: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The last is shorter."""
    return [torch.randn(2 if n == count - 1 and n else 4, 3, width).to(dtype) for n in range(count)]


def moved(hidden: Spilled, change: Callable[[Tensor], Tensor]) -> None:
    for number, batch in enumerate(hidden):
        hidden.replace(number, change(batch))
    hidden.turn()


def same(hidden: Spilled, batches: list[Tensor]) -> bool:
    return len(hidden) == len(batches) and all(torch.equal(a, b) for a, b in zip(hidden, batches, strict=True))


def saved(hidden: Spilled) -> dict:
    part = hidden.to_save()
    record = part.write()
    part.done()
    return record


@pytest.mark.parametrize("memory", [0, 5 * SIZE, 7 * SIZE, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_replaced_is_what_is_read_whatever_was_there(tmp_path: Path, dtype: torch.dtype, memory: int):
    """Nothing at first, then narrower batches of another dtype; the last one is shorter."""
    scratch = Scratch(tmp_path, memory=memory)
    hidden = scratch.resumable("hidden")
    for width, kind in ((6, dtype), (4, torch.float32), (5, dtype)):
        batches = batches_of(3, width, kind)
        for number, batch in enumerate(batches):
            hidden.replace(number, batch)
        hidden.turn()
        assert same(hidden, batches)
        record = saved(hidden)
        again = Spilled(tmp_path / "hidden")
        assert again.adopt(record)
        assert same(again, batches)
        assert torch.equal(again[1], batches[1])
        assert not again.adopt({**record, "sha256": ""})
    assert scratch.means.memory.peak <= memory


@pytest.mark.parametrize("memory", [0, 6 * SIZE, 10**6])
def test_streams_without_batches_and_with_one(tmp_path: Path, memory: int):
    """A process of several may have none."""
    for count in (0, 1):
        hidden, batches = Scratch(tmp_path, memory=memory).resumable(f"hidden-{count}"), batches_of(count)
        for batch in batches:
            hidden.append(batch)
        moved(hidden, lambda batch: batch + 1)
        again = Spilled(tmp_path / f"hidden-{count}")
        assert again.adopt(saved(hidden))
        assert same(again, [batch + 1 for batch in batches])


def test_what_was_appended_is_read_only_once_a_slow_disk_has_it(tmp_path: Path):
    scratch, batches, held = Scratch(tmp_path, memory=(AHEAD + 4) * SIZE), batches_of(13)[:12], Event()
    scratch.means.writer.submit(held.wait)
    hidden = scratch.hidden("x")
    for batch in batches:
        hidden.append(batch)
    Timer(0.2, held.set).start()
    moved(hidden, lambda batch: batch + 1)
    assert same(hidden, [batch + 1 for batch in batches])
    scratch.means.close()


def test_within_the_memory_nothing_goes_to_a_file_but_what_is_saved(tmp_path: Path, disk: Recorded):
    scratch, batches = Scratch(tmp_path, memory=10 * SIZE), batches_of(6)
    hidden = scratch.resumable("hidden")
    for batch in batches:
        hidden.append(batch)
    for _ in range(3):
        moved(hidden, lambda batch: batch + 1)
    assert not list(tmp_path.iterdir())
    saved(hidden)
    moved(hidden, lambda batch: batch + 1)
    assert disk.take() == (0, sum(batch.nbytes for batch in batches))
    assert scratch.means.waits == 0
    del hidden
    assert scratch.means.memory.used == 0


def test_beyond_the_memory_only_the_rest_is_in_files_and_read_before_it_is_needed(tmp_path: Path, disk: Recorded):
    scratch, batches = Scratch(tmp_path, memory=(AHEAD + 4) * SIZE), batches_of(13)[:12]
    hidden = scratch.hidden("x")
    for batch in batches:
        hidden.append(batch)
    moved(hidden, lambda batch: batch + 1)
    assert disk.read >= 8 * SIZE  # the first of the next pass may be on its way
    assert 2 * 8 * SIZE <= disk.written <= 2 * 12 * SIZE  # what is still being written takes memory, too
    assert same(hidden, [batch + 1 for batch in batches])
    assert scratch.means.memory.peak <= scratch.means.memory.size
    held = Event()
    scratch.means.reader.submit(held.wait)  # what is read ahead is read by the thread, and what is not by none
    assert torch.equal(hidden[3], batches[3] + 1)
    held.set()
    assert torch.equal(hidden[4], batches[4] + 1)
    scratch.means.close()


def test_batches_out_of_order_are_found(tmp_path: Path):
    scratch, batches = Scratch(tmp_path, memory=(AHEAD + 2) * SIZE), batches_of(8)
    hidden = scratch.hidden("x")
    for batch in batches:
        hidden.append(batch)
    for number in torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist() * 2:
        assert torch.equal(hidden[number], batches[number])


def test_what_is_being_saved_stays_what_it_was_while_the_stream_moves_on(tmp_path: Path):
    """Its memory counts meanwhile, so that batches go to files, and are in memory again when it is done."""
    scratch, batches = Scratch(tmp_path, memory=(AHEAD + 6) * SIZE), batches_of(6)
    hidden = scratch.resumable("hidden")
    for batch in batches:
        hidden.append(batch)
    part = hidden.to_save()
    for step in range(1, 5):
        moved(hidden, lambda batch: batch + 1)
        assert same(hidden, [batch + step for batch in batches] if step == 1 else list(hidden))
    record = part.write()
    part.done()
    again = Spilled(tmp_path / "hidden")
    assert again.adopt(record)
    assert same(again, batches)
    del part, again
    moved(hidden, lambda batch: batch + 1)
    assert hidden.side is None
    assert scratch.means.memory.peak <= scratch.means.memory.size


def test_what_was_saved_last_is_whole_at_any_instant(tmp_path: Path):
    """Whatever is written before the next save is recorded."""
    for memory in (0, 6 * SIZE, 10**6):
        hidden, batches = Scratch(tmp_path, memory=memory).resumable(f"hidden-{memory}"), batches_of(5)
        for batch in batches:
            hidden.append(batch)
        record = saved(hidden)
        for _ in range(4):
            moved(hidden, lambda batch: batch + 1)
            assert Spilled(tmp_path / f"hidden-{memory}").adopt(record)
        hidden.to_save().write()  # of which there is no record yet
        moved(hidden, lambda batch: batch + 1)
        assert Spilled(tmp_path / f"hidden-{memory}").adopt(record)


def test_a_full_disk_is_the_main_threads_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(file: BatchFile, offset: int, tensor: Tensor) -> None:
        with disk_errors(file.path):
            raise OSError(28, "No space left on device")

    for memory in (0, (AHEAD + 1) * SIZE):
        hidden = Scratch(tmp_path, memory=memory).resumable("hidden")
        for batch in batches_of(6):
            hidden.append(batch)
        assert len(list(hidden)) == 6
        with monkeypatch.context() as patch:
            patch.setattr(BatchFile, "write", full)
            with pytest.raises(RunFailure, match=r"cannot write .*hidden\.1: No space left on device"):
                moved(hidden, lambda batch: batch + 1)


def test_a_file_that_ends_too_early_is_no_numbers(tmp_path: Path):
    hidden = Spilled(tmp_path / "hidden")
    for batch in batches_of(3):
        hidden.append(batch)
    record = saved(hidden)
    (tmp_path / "hidden.0").write_bytes(b"torn")
    with pytest.raises(RunFailure, match=r"cannot read .*hidden\.0: it ends too early"):
        hidden[1]
    assert not Spilled(tmp_path / "hidden").adopt(record)
    (tmp_path / "hidden.0").unlink()
    assert not Spilled(tmp_path / "hidden").adopt(record)


def test_whoever_writes_into_what_it_is_given_is_stopped(tmp_path: Path):
    """From files it could be: they are read anew."""
    for memory in (0, 10**6):
        hidden = Scratch(tmp_path, memory=memory).hidden(f"{memory}")
        for batch in batches_of(2):
            hidden.append(batch)
        first = hidden[0].clone()
        hidden[0].add_(1)
        if memory:
            with pytest.raises(RunFailure, match="--stream-memory 0"):
                hidden[0]
        else:
            assert torch.equal(hidden[0], first)


def test_a_part_of_something_larger_does_not_keep_all_of_it(tmp_path: Path):
    hidden = Scratch(tmp_path, memory=10**6).hidden("x")
    hidden.append(torch.randn(40, 3, 6)[:4])
    assert hidden[0].untyped_storage().nbytes() == SIZE


def test_gradients_are_not_left_on_what_waits(tmp_path: Path):
    hidden = Scratch(tmp_path, memory=10**6).hidden("x")
    hidden.append(torch.randn(4, 3, 6))
    batch = hidden[0].requires_grad_()
    batch.sum().backward()
    assert batch.grad is not None
    assert hidden[0].grad is None
    assert not hidden[0].requires_grad


def test_saving_waits_for_its_time_and_for_the_last_one(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("slimlm.model.saving.time.monotonic", lambda: now[0])
    saver, held, done = Saver(), Event(), list[int]()
    now[0] = Saver.seconds - 1
    assert not saver.due()
    now[0] = Saver.seconds
    assert saver.due()
    saver.start(lambda: (held.wait(), done.append(1))[1])
    now[0] *= 3
    assert not saver.due()  # it is not done
    held.set()
    saver.settle()
    assert saver.due()
    assert done == [1]

    def fails() -> None:
        raise RunFailure("cannot write it")

    saver.start(fails)
    with pytest.raises(RunFailure, match="cannot write it"):
        for _ in range(10**6):
            saver.due()
    saver.close(is_needed=False)
    assert saver.is_abandoned


def test_pieces_are_of_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "PIECE", 7)
    file = BatchFile(tmp_path / "x")
    file.path.write_bytes(bytes(range(40)))
    assert b"".join(file.pieces(5, 30)) == bytes(range(5, 35))
