"""What a dry run says, as figures."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from slimlm.check import Job
from slimlm.checkpoint.manifest import Sizes
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.forecast import Forecast
from slimlm.recipe import AnyStep


class Tensors(TypedDict):
    """Tensors of one kind, the number of their block written as *; dense is null where the dense model has none."""

    name: str
    dense: list[int] | None
    compressed: list[int]
    dtype: str
    count: int


class Windows(TypedDict):
    """Calibration data, windows by source."""

    sources: dict[str, int]
    window: int
    batch_size: int


class Disk(TypedDict):
    """Bytes while it runs: of results, beside the output, and of hidden states, there or in work_dir."""

    result: int
    scratch: int
    work_dir: str | None


class Forecasted(TypedDict):
    """What a run would do and take. bytes: of weights. Where several splits give the sparsity, shapes, parameters and
    bytes are the largest's, remark says how one is chosen, and candidates lists their widths as `--widths` takes them,
    but for blocks. later: the steps that follow the first. memory: bytes, by place, of each process."""

    model: str
    model_type: str
    method: str
    paper: str
    output_dir: str
    calibration: Windows | None
    parameters: Sizes
    bytes: Sizes
    changes: dict[str, list[Any]]
    shapes: list[Tensors]
    candidates: list[str]
    remark: str | None
    later: list[str]
    memory: dict[str, int]
    disk: Disk
    seconds: float
    processes: int
    device: str


def forecast_figures(job: Job, found: Forecast, later: Sequence[AnyStep], work_dir: Path | None) -> dict[str, Any]:
    """later: the steps that follow, which the forecast includes. work_dir: where hidden states are to wait."""
    recipe, plan = job.recipe, job.plan
    data: Windows = {
        "sources": dict(recipe.parts),
        "window": recipe.max_seq_length or 0,
        "batch_size": recipe.batch_size,
    }
    figures: Forecasted = {
        "model": job.source.name,
        "model_type": job.model.config.model_type,
        "method": recipe.method,
        "paper": job.method.paper,
        "output_dir": str(job.output),
        "calibration": data if recipe.dataset else None,
        "parameters": {"dense": parameter_count(job.dense.model), "compressed": plan.parameters},
        "bytes": {"dense": job.dense.checkpoint.bytes_on_disk(), "compressed": job.result_bytes},
        "changes": {name: list(pair) for name, pair in plan.changes.items()},
        "shapes": shapes_of(job),
        "candidates": plan.widths.split("/") if plan.widths else [],
        "remark": plan.remark,
        "later": [step.described for step in later],
        "memory": found.memory,
        "disk": {"result": found.result, "scratch": found.scratch, "work_dir": str(work_dir) if work_dir else None},
        "seconds": found.seconds,
        "processes": found.processes,
        "device": str(job.model.device),
    }
    return {**figures}


def shapes_of(job: Job) -> list[Tensors]:
    """Every shape before and after, those alike in one."""
    kinds: Counter[tuple[str, tuple[int, ...] | None, tuple[int, ...], str]] = Counter()
    for name, spec in job.plan.tensors.items():
        stored = job.model.checkpoint.tensors.get(name)
        dtype = str(spec.dtype).removeprefix("torch.")
        kinds[re.sub(r"\.\d+\.", ".*.", name), stored.shape if stored else None, spec.shape, dtype] += 1
    return [
        {
            "name": name,
            "dense": None if dense is None else list(dense),
            "compressed": list(compressed),
            "dtype": dtype,
            "count": count,
        }
        for (name, dense, compressed, dtype), count in kinds.items()
    ]
