"""Ranks are real processes here, on gloo: what each gets, that sums keep their bits, and that none outlives another."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slimlm.errors import UserError
from slimlm.meeting import may_speak, start_ranks
from slimlm.ranks import Ranks
from tests.rank_worker import BATCHES, batches, found

ROOT = Path(__file__).parents[1]
WORKER = str(ROOT / "tests" / "rank_worker.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def told(directory: Path, size: int) -> list[Any]:
    """What each rank wrote down; None of one that did not come to it."""
    files = [directory / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file) if file.exists() else None for file in files]


def torchrun(size: int, directory: Path, what: str) -> list[Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    done = subprocess.run(
        [*command, WORKER, str(directory), what],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "terminate called" not in done.stderr
    return told(directory, size)


def by_hand(size: int, directory: Path, what: str) -> tuple[list[Any], list[int]]:
    """Without a launcher that would end the others; what each told, and its exit code."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**ENVIRONMENT, "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, WORKER, str(directory), what]
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)
    ]
    codes = [rank.wait(timeout=120) for rank in ranks]
    return told(directory, size), codes


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return found(Ranks())


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 4]
)
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2, 3 and 4 ranks found."""
    return torchrun(request.param, tmp_path_factory.mktemp(f"ranks-{request.param}"), "found")


def test_alone_everything_is_ones_own(alone: dict[str, Any]):
    assert alone["agreed"] == "of 0"
    assert alone["gathered"] == [0]
    assert alone["mine"] == list(range(BATCHES))
    assert torch.equal(alone["sent"], torch.arange(4.0))
    assert torch.allclose(alone["sums"][0], sum(batches()))


def test_sums_have_the_same_bits_however_many_ranks_there_are(alone: dict[str, Any], several: list[dict[str, Any]]):
    last = len(several) - 1
    for name, owner in (("sums", 0), ("sums at the last", last), ("whole sums", 0), ("sums of few", last)):
        assert [rank[name] is not None for rank in several] == [rank == owner for rank in range(len(several))]
        (total, count), (expected, expected_count) = several[owner][name], alone[name]
        assert torch.equal(count, expected_count)
        assert torch.allclose(total, expected)
        if last + 1 != 3 and name.startswith("sums"):  # three do not have the same lanes, and whole sums have none
            assert torch.equal(total, expected)


def test_every_batch_is_somebodys(several: list[dict[str, Any]]):
    assert [index for rank in several for index in rank["mine"]] == list(range(BATCHES))
    owner = [rank for rank, one in enumerate(several) for _ in one["mine"]]
    assert all(one["owner"] == owner for one in several)


def test_each_gets_what_is_for_it(several: list[dict[str, Any]]):
    size, last = len(several), len(several) - 1
    for rank, one in enumerate(several):
        assert (one["agreed"], one["decided"], one["gathered"]) == (f"of {last}", "by 0", list(range(size)))
        assert torch.equal(one["shared"][0], torch.full((2,), float(last)))
        assert torch.equal(one["shared"][1], torch.tensor(last, dtype=torch.bfloat16))
        assert torch.equal(one["sent"], torch.arange(4.0) if rank == last else torch.empty(0))
        assert torch.equal(
            one["joined"], torch.arange(size).repeat_interleave(torch.arange(size))[:, None].expand(-1, 2)
        )
    assert torch.equal(several[last]["added"], torch.full((3,), float(size)))


def test_work_is_spread_by_its_cost(several: list[dict[str, Any]]):
    costs, owners = [1, 5, 2, 4, 3, 3], several[0]["owners"]
    assert all(one["owners"] == owners for one in several)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(len(several))
    ]
    assert max(loads) - min(loads) <= max(costs) - min(costs)
    assert min(loads) > 0


def test_the_account_is_of_all(several: list[dict[str, Any]]):
    for one in several:
        assert one["account"] == several[0]["account"]
        assert [entry["rank"] for entry in one["account"]] == [entry["more"] for entry in one["account"]]
        assert sum(entry["batches"] for entry in one["account"]) == 3 * BATCHES + 2
        assert all(entry["bytes_exchanged"] > 0 for entry in one["account"])


@pytest.mark.parametrize("end", [pytest.param("fails", marks=pytest.mark.slow), "killed"])
def test_the_others_notice_at_once_that_one_is_gone(tmp_path: Path, end: str):
    (first, own, last), codes = by_hand(3, tmp_path, end)
    for lost in (first, last):
        assert lost[0] == "Lost"
        assert "lost contact with the others" in lost[1]
    assert own == (("UserError", "rank 1 did", True) if end == "fails" else None)
    assert codes == [0, 0 if end == "fails" else -9, 0]


@pytest.mark.slow
def test_a_group_that_is_there_is_used_and_left(tmp_path: Path, alone: dict[str, Any]):
    first, second = torchrun(2, tmp_path, "inside a group")
    assert torch.equal(first["sums"][0], alone["sums"][0])
    assert second["gathered"] == [0, 1]


@pytest.mark.slow
def test_one_speaks(tmp_path: Path):
    assert sorted(torchrun(3, tmp_path, "speaking")) == [False, False, True]


def test_one_gpu_is_not_for_several_processes(monkeypatch: pytest.MonkeyPatch):
    from slimlm.meeting import _own_device

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:1 is one GPU for several processes"):
        _own_device("cuda:1")


def test_alone_the_device_is_checked_too():
    with start_ranks("cpu") as ranks:
        assert (ranks.size, ranks.device) == (1, torch.device("cpu"))
    with pytest.raises(UserError, match="device 'cuda:9' is not available"), start_ranks("cuda:9"):
        pass
    assert may_speak()


def test_others_that_never_come_are_said_to(monkeypatch: pytest.MonkeyPatch):
    from datetime import timedelta

    monkeypatch.setattr("slimlm.meeting.MEETING", timedelta(seconds=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in {"RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the 2 processes of this run do not find each other"), start_ranks("cpu"):
        pass
