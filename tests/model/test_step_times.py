"""Steps and products are timed in turns, with a clock that says what it is told."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch

from slimlm.model import step_times as timing
from slimlm.model.shape_times import StepTimes
from slimlm.model.step_times import step_times
from tests.conftest import CONFIGS, build_tiny, stream
from tests.families.configs import family_config

SHAPES = {(48, 32): 3, (32, 48): 3, (16, 16): 0}


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once a reading."""
    ticks = count()
    for name in ("process_time", "perf_counter"):
        monkeypatch.setattr(timing.time, name, lambda: float(next(ticks)))


def test_a_step_takes_one_tick_and_a_product_its_share_of_one(tiny: Path, ticking: None):
    found = step_times(stream(tiny), SHAPES, torch.float32)
    assert (found.step, found.blocks) == (1.0, 3)
    room = 3 * (48 * 32 + 32 * 48)
    assert found.products == {(48, 32): 1 / 6, (32, 48): 1 / 6, (16, 16): 1 / (room // 256)}


def test_of_a_large_model_the_first_blocks_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And nothing else is read: the files of the others are gone."""
    model = stream(build_tiny(CONFIGS["llama"], tmp_path / "model"))
    size = 2 * sum(tensor.numel() for tensor in model.blocks[0].module.state_dict().values())
    read = []
    load = type(model).loaded
    monkeypatch.setattr(type(model), "loaded", lambda self, parts: read.extend(parts) or load(self, parts))
    for room, blocks in ((2 * size + 1, 2), (1, 1), (9 * size, 3)):
        monkeypatch.setattr(timing, "MOST_BYTES", room)
        read.clear()
        assert step_times(model, SHAPES, torch.bfloat16).blocks == blocks
        assert [part for part in read if "layers" in part] == [f"model.layers.{index}" for index in range(blocks)]
    assert len(model.model.model.layers) == 3  # the model itself stays whole
    assert all(parameter.is_meta for parameter in model.model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "bloom", "gpt_neox", "gemma3_text"])
def test_other_families_can_be_timed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    model = stream(build_tiny(family_config(name), tmp_path / "model"))
    size = 4 * sum(tensor.numel() for tensor in model.blocks[0].module.state_dict().values())
    monkeypatch.setattr(timing, "MOST_BYTES", 2 * size)
    found = step_times(model, SHAPES, torch.float32)
    assert (found.blocks, min(found.products.values()) > 0) == (2, True)
    assert found.step > 0


def test_times_come_back_from_json_to_the_bit():
    times = StepTimes(0.1 + 0.2, 3, {(4, 8): 1 / 3, (2, 2): 1e-9})
    assert StepTimes.read(**json.loads(json.dumps(times.described()))) == times
