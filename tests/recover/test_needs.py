"""What a recovery takes, in bytes."""

from pathlib import Path

import pytest
import torch

from slimlm.checkpoint.skeleton import parameter_count
from slimlm.models import open_model
from slimlm.recipe import RecoverStep, one_step
from slimlm.recover.needs import changed_count, kept_bytes, memory_needed, remembered_bytes
from slimlm.recover.optimizers import MFAC, Adam
from tests.recover.conftest import recovering


@pytest.mark.parametrize("block", [0, 8, 1000])
def test_what_optimizers_remember_is_counted(settings: dict, pruned: Path, block: int):
    parameters = {"a": torch.ones(30, 50), "b": torch.ones(700)}
    how = {"optimizer": "mfac", "mfac_gradients": 3, "mfac_block": block}
    for optimizer, more in ((MFAC(parameters, 3, 1.0, block), how), (Adam(parameters), {})):
        for one in parameters.values():
            one.grad = torch.ones_like(one)
        optimizer.update(0.1)
        held = sum(one.nbytes for kind in optimizer.memory().values() for one in kind.values())
        counted = remembered_bytes(step_of(settings, pruned, **more), 2200)
        assert counted <= held <= counted + 4 * 3 * block  # the last block is filled up


def step_of(settings: dict, pruned: Path, **more) -> RecoverStep:
    (step,) = one_step(**recovering(settings, pruned, **more)).steps
    return step


def test_low_rank_and_a_remembered_teacher_take_less(settings: dict, pruned: Path):
    model, dense = (open_model(Path(one), torch.device("cpu"), "fast") for one in (pruned, settings["model"]))

    def needs(**more) -> tuple[int, int]:
        step = step_of(settings, pruned, **more)
        return memory_needed(step, model, dense), kept_bytes(step, model)

    count = parameter_count(model.model)
    whole = needs()
    assert whole == (27 * count + dense.checkpoint.bytes_on_disk(), 36 * count)
    low = needs(lora=2)
    assert low[0] < 0.6 * whole[0]
    assert low[1] < 0.5 * whole[1]
    changed = changed_count(step_of(settings, pruned, lora=2), model)
    assert changed == 2 * sum(rows + columns for rows, columns in model.matrices.values())
    remembered = needs(teacher_top_k=1)
    assert remembered[0] < whole[0]
    assert remembered[1] == whole[1] + 8 * 40 * 24
    assert needs(optimizer="mfac")[0] > whole[0] + 2 * 4 * 31 * count
