"""Compression on several processes: the same bytes as in one, each having done its share."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
QUICK = ("slice", "slimlm", "sparsegpt", "magnitude")
# All that ranks do: curves, gradients, experts, statistics and scores for allocations, sampling, several steps.
MORE = (
    "slice mixture", "slice refined", "slimlm refined", "slimlm refined tied", "slice two batches",
    "slice tied", "slice self", "slice mixtral", "slice qwen2_moe", "slice no refit", "slice per-block", "slice gpt2",
    "rotate", "slice rotated", "slimlm fisher", "slimlm qwen2_moe", "slimlm solved", "slimlm owl", "slimlm global",
    "slimlm tiles", "sparsegpt pq", "sparsegpt mixtral", "obc", "mfac", "mfac mixtral", "mfac sequence", "woodfisher",
    "wanda", "magnitude global", "slice then slimlm", "slice then recover",
    "slimlm then recover", "slice then recover by mfac", "slimlm then recover remembered", "shots", "bundled slice",
    "bundled slimlm 2:4",
)  # fmt: skip


def started(
    place: Path, size: int, *cases: str, nodes: tuple[str, ...] = (), **environment: str
) -> "subprocess.Popen[str]":
    command = [*TORCHRUN, *nodes, "--nproc-per-node", str(size), "-m", "tests.golden.on_ranks"]
    return subprocess.Popen(
        [*command, str(place), str(place / "found.json"), *cases],
        cwd=ROOT, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: "subprocess.Popen[str]", place: Path) -> dict[str, Any]:
    _, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, errors[-3000:]
    found = place / "found.json"
    return json.loads(found.read_text()) if found.exists() else {}


def found_on(place: Path, size: int, *cases: str) -> dict[str, Any]:
    return finished(started(place, size, *cases), place)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_on(tmp_path_factory.mktemp("alone"), 1, *QUICK)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Files byte for byte, and all that the manifests say."""
    assert found.keys() == expected.keys()
    for name, case in expected.items():
        assert found[name]["files"] == case["files"], name
        places = re.compile("output_dir|model/path|recipe/model|/name$|run/resumed")
        ours, theirs = (
            {key: value for key, value in side["manifest"].items() if not places.search(key)}
            for side in (found[name], case)
        )
        assert ours == theirs, name


def assert_shared(found: dict[str, Any], size: int) -> None:
    """Every rank did its share of windows, or of blocks where there are none."""
    for name, case in found.items():
        for ranks in case["ranks"]:
            assert [entry["rank"] for entry in ranks] == list(range(size)), name
            windows, blocks = ([entry.get(kind, 0) for entry in ranks] for kind in ("windows", "blocks"))
            assert sum(windows) + sum(blocks), name
            assert min(windows) >= 0.6 * max(windows), (name, windows)
            assert max(blocks) - min(blocks) <= 1, (name, blocks)


def test_two_processes_write_the_bytes_of_one_and_share_the_work(tmp_path: Path, alone: dict[str, Any]):
    found = found_on(tmp_path, 2, *QUICK)
    assert_same(found, alone)
    assert_shared(found, 2)


@pytest.mark.slow
def test_nodes_with_disks_of_their_own_each_have_the_result(tmp_path: Path, alone: dict[str, Any]):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    places = tmp_path / "first", tmp_path / "second"
    processes = [
        started(
            place, 1, "slice", "magnitude",
            nodes=("--nnodes", "2", "--node-rank", str(node), "--master-addr", "localhost", "--master-port", port),
        )
        for node, place in enumerate(places)
    ]  # fmt: skip
    found, nothing = (finished(process, place) for process, place in zip(processes, places, strict=True))
    assert not nothing  # the first one speaks
    assert_same(found, {name: alone[name] for name in ("slice", "magnitude")})
    for name in ("out-2-0", "out-2-1"):
        ours, theirs = (place / name / "model.safetensors" for place in places)
        assert ours.read_bytes() == theirs.read_bytes()
    left = [path.name for place in places for path in place.iterdir() if path.name.endswith((".partial", ".json"))]
    assert left == ["found.json"]


@pytest.fixture(scope="module")
def all_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("all")
    return place, found_on(place, 1, *MORE)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_whatever_is_run_two_and_four_write_the_same_bytes(
    tmp_path: Path, all_alone: tuple[Path, dict[str, Any]], size: int
):
    assert_same(found_on(tmp_path, size, *MORE), all_alone[1])


@pytest.mark.slow
def test_three_processes_prune_nearly_the_same(tmp_path: Path, all_alone: tuple[Path, dict[str, Any]]):
    """They add up in another order: rounding may tip a choice here and there."""
    place, alone = all_alone
    names = ("slimlm qwen2_moe", "sparsegpt mixtral", "bundled slimlm 2:4", "mfac")
    found = found_on(tmp_path, 3, *names)
    for number, name in enumerate(sorted(names, key=list(alone).index)):
        key = "measured/compressed/log_perplexity"
        assert found[name]["manifest"][key] == pytest.approx(alone[name]["manifest"][key], abs=1e-3), name
        ours = load_file(tmp_path / f"out-3-{number}" / "model.safetensors")
        theirs = load_file(place / f"out-1-{list(alone).index(name)}" / "model.safetensors")
        places = sum(tensor.numel() for tensor in ours.values())
        apart = sum(int(((ours[key] == 0) != (theirs[key] == 0)).sum()) for key in ours)
        assert apart <= 0.005 * places, name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("slice", 2), ("slice", 5), ("slimlm", 3), ("sparsegpt", 2)])
def test_when_one_of_two_dies_both_go_on_from_what_both_had_saved(
    tmp_path: Path, alone: dict[str, Any], name: str, number: int
):
    dying = started(tmp_path, 2, name, DIE_AT=str(number))
    dying.communicate(timeout=300)
    assert dying.returncode
    (journal,) = tmp_path.rglob("out-2-0.partial/work/journal.jsonl")
    saved = [record for record in map(json.loads, journal.read_text().splitlines()) if "ranks" in record]
    assert len(saved) == number - 1
    assert all(len(record["ranks"]) == 2 for record in saved)
    found = finished(started(tmp_path, 2, name, RESUME="1"), tmp_path)
    assert_same(found, {name: alone[name]})


@pytest.mark.slow
def test_after_a_kill_of_one_process_the_others_end_and_resuming_gives_the_same_bytes():
    """At a random instant; `eval/kill.py` does as many as one likes."""
    command = [sys.executable, "eval/kill.py", "--kills", "1", "--seed", "1", "--num-processes", "2"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
