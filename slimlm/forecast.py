"""What a run will need, found by running its own code on the first blocks.

Memory does not grow with depth, so the peak of a run over a block of each kind is the peak of the whole; time is what
the last such block took, times the number of them, and the rest once. The probe is a real run in a process of its own,
on a directory that shows only the first blocks of the checkpoint, with the calibration tokens of the run.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml

from slimlm.calibration import SAMPLING_BATCH
from slimlm.checkpoint.code import code_files
from slimlm.checkpoint.companions import companions
from slimlm.checkpoint.kinds import INDEX_NAME
from slimlm.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest, stages_of, took
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.checkpoint.staging import check_output
from slimlm.compression import LOG_NAME
from slimlm.device import available_memory
from slimlm.errors import RunFailure, UserError
from slimlm.methods import method_named
from slimlm.model.skip import skipping
from slimlm.model.walk import every
from slimlm.prepare import Job, journalled, keeps_shapes, later_runs_of, spilled
from slimlm.progress import Progress
from slimlm.recipe import AnyStep, Recipe, SliceStep, as_file, dumped
from slimlm.run import Plan
from slimlm.slice.config import BY_BLOCK

LEAST = 2  # blocks to probe: the first of a process is slow, and a GPU has the next one in memory, too
OF_WINDOWS = ("dataset", "text_column", "num_calibration_samples", "max_seq_length", "seed")
MOST = 8  # of them; a kind that comes later is taken to be like the slowest of them


@dataclass(frozen=True)
class Forecast:
    """Bytes and seconds a run is expected to take. memory: "host", imports included, and "gpu" where there is one.

    result: bytes on disk of what is written in the end and on the way there; scratch: of hidden states that wait.
    """

    memory: dict[str, int]
    result: int
    scratch: int
    seconds: float

    @property
    def disk(self) -> int:
        return self.result + self.scratch


def forecast(job: Job, progress: Progress, whole: Recipe | None = None, work_dir: Path | None = None) -> Forecast:
    """Probe the first blocks of a prepared run, in a directory beside its output. Raises RunFailure when that fails.

    whole: a recipe of several runs, of which `job` is the first. All of them are probed, on what each gives. work_dir:
    where hidden states are to wait.
    """
    progress.stage("probing the first blocks", 1)
    kinds = every(job.model, lambda block: block.kind)
    shown = min(MOST, len(kinds), max(LEAST, *(kinds.index(kind) + 1 for kind in kinds)))
    home = next(parent for parent in job.output.parents if parent.is_dir())
    with ExitStack() as stack:
        own, *waiting = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".slimlm-probe-", dir=place)))
            for place in (home, *([work_dir] if work_dir else []))
        )
        manifest, events = _probe(job, whole or Recipe(steps=[job.recipe]), shown, own, waiting[0] if waiting else None)
    per_kind = {
        kinds[block]: sum(event["seconds"] for event in events if event["part"] == job.model.family.block(block))
        for block in range(shown)
    }
    rest = kinds[shown:]
    timings = [stage["run"]["seconds"] for stage in stages_of(manifest)]
    tensors = job.model.checkpoint.tensors
    read = sum(tensors[key].nbytes for key in _shown_keys(job, shown))  # of files that may hold all blocks
    more_to_check = sum(tensor.nbytes for tensor in tensors.values()) / read - 1
    seconds, memory = took(manifest)
    seconds += sum(per_kind.get(kind, max(per_kind.values())) for kind in rest)
    seconds += more_to_check * sum(timing["checking"] for timing in timings)
    seconds += len(rest) / shown * sum(timing.get("sampling", 0.0) for timing in timings)
    if any("sampling" in timing for timing in timings):
        # Sampling holds every block at once, and their keys and values.
        others = parameter_count(job.model.model) - manifest["parameters"]["dense"] + len(rest) * _cached(job)
        memory["gpu" if "gpu" in memory else "host"] += others * job.model.checkpoint.main_dtype.itemsize
    progress.step()
    result, scratch = _disk(job, later_runs_of(job, whole) if whole else [], stages_of(manifest))
    return Forecast(memory, result, scratch, seconds)


def _disk(job: Job, later: list[AnyStep], probed: list[Manifest]) -> tuple[int, int]:
    """Bytes of what all runs give, which stands until the last is done, and of hidden states waiting in one of them."""
    waiting: list[int] = [spilled(job.recipe, job.method, job.model)]
    for run in later:
        method = method_named(run.method)
        data = run.dataset if method.calibrates(run, job.resolved.path) else None
        waiting.append(spilled(run.model_copy(update={"dataset": data}), method, job.model))
    sizes: list[int] = [stage["bytes"]["compressed"] for stage in probed]
    runs = [stage["run"] for stage in probed]
    kept: list[int] = [run["work_bytes"] - run["scratch_bytes"] for run in runs]
    kept.append(journalled(job.recipe, job.method, job.model))
    written = sum(spec.nbytes for spec in job.plan.tensors.values()) * sum(sizes) // sizes[0]
    return written + max(kept), max(*waiting, *(run["scratch_bytes"] for run in runs))


def _cached(job: Job) -> int:
    """Elements of the keys and values one block keeps while calibration text is sampled."""
    config, recipe = job.model.config, job.recipe
    assert recipe.max_seq_length is not None
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch = min(SAMPLING_BATCH, recipe.num_calibration_samples)
    return 2 * int(heads * width) * batch * recipe.max_seq_length


def _probe(
    job: Job, whole: Recipe, shown: int, scratch: Path, work_dir: Path | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compress the first so many blocks alone; the manifest and the log of that."""
    _show_first_blocks(job, shown, scratch / "model")
    steps = [_shown_step(job, job.recipe, shown, job.plan)]
    if job.windows is not None:
        tokens = str(scratch / "tokens.npy")
        numpy.save(tokens, job.windows.tokens.numpy())
        steps[0] = steps[0].model_copy(update={"dataset": tokens})
    is_kept = keeps_shapes(job)
    for later in later_runs_of(job, whole):
        with skipping(job.model, later.skip):
            plan = method_named(later.method).plan(job.model, later) if is_kept else None
            steps.append(_shown_step(job, later, shown, plan))
        is_kept = plan is not None and plan.parameters == job.plan.parameters
        if job.windows is not None and all(getattr(later, name) == getattr(job.recipe, name) for name in OF_WINDOWS):
            steps[-1] = steps[-1].model_copy(update={"dataset": tokens})
    recipe = Recipe(steps=steps).updated(
        model=str(scratch / "model"), output_dir=str(scratch / "out"), revision=None, trust_remote_code=False
    )
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(as_file(dumped(recipe))))
    command = [
        sys.executable,
        "-m",
        "slimlm.probe",
        *(["--trust-remote-code"] if job.recipe.trust_remote_code else []),
        str(scratch / "recipe.yaml"),
        *([str(work_dir)] if work_dir else []),
    ]
    ours, held = os.pipe()  # nobody writes: that it closes when this process ends, however it does, ends the probe
    try:
        done = subprocess.run(command, stdin=ours, capture_output=True, text=True, check=False)
    finally:
        os.close(ours)
        os.close(held)
    if done.returncode < 0:
        raise RunFailure(
            f"the probe of the first blocks was killed by signal {-done.returncode}, probably for want of memory: "
            "lower --batch-size or --max-seq-length"
        )
    if done.returncode != 0:
        raise RunFailure(f"the probe of the first blocks failed: {done.stderr.strip().splitlines()[-1]}")
    manifest = json.loads((scratch / "out" / MANIFEST_NAME).read_text())
    log = (scratch / "out" / LOG_NAME).read_text()
    return manifest, [json.loads(line) for line in log.splitlines()]


def _shown_step(job: Job, step: AnyStep, shown: int, plan: Plan | None = None) -> AnyStep:
    """A step on the first so many blocks, with what does not come out of these alone: the widths to choose from."""
    settings: dict[str, Any] = {"skip": _skipped(job, shown)}
    if plan is not None and plan.widths and isinstance(step, SliceStep):
        settings["widths"] = plan.widths
    return step.model_copy(update=settings)


def _show_first_blocks(job: Job, shown: int, directory: Path) -> None:
    """A model directory of links to the real one, whose config and index speak of the first blocks alone."""
    directory.mkdir()
    source, model = job.resolved.path, job.model
    for file in (*companions(source), *code_files(source)):
        (directory / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    config.pop("transformers_weights", None)  # the index below says it
    config[model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = shown
    for name in BY_BLOCK:
        if isinstance(config.get(name), list):
            config[name] = config[name][:shown]
    (directory / "config.json").write_text(json.dumps(config))
    manifest = read_manifest(source) or {}
    if "influence" in manifest.get("method", {}):  # `slimlm rotate` wrote it, and slicing it goes another way
        influence = {"influence": manifest["method"]["influence"][:shown]}
        (directory / MANIFEST_NAME).write_text(json.dumps({"method": influence}))
    tensors = model.checkpoint.tensors
    weight_map = {key: tensors[key].path.relative_to(source).as_posix() for key in _shown_keys(job, shown)}
    for name in set(weight_map.values()):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).symlink_to((source / name).resolve())
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _skipped(job: Job, shown: int) -> list[str]:
    """What is to stay as it is of the first so many blocks, and the head."""
    inside = {f"{block.path}.{name}" for block in job.model.blocks[:shown] for name in block.family.skipped}
    return [name for name in job.model.skipped if name in inside | {job.model.family.head}]


def _shown_keys(job: Job, shown: int) -> list[str]:
    parts = [*job.model.outside, *map(job.model.family.block, range(shown))]
    return [key for part in parts for key in job.model.keys_of.get(part, [])]


def require_room(job: Job, found: Forecast, work_dir: Path | None = None) -> None:
    """Raises UserError when memory or disk space is too small."""
    check_output(job.output, True, [], found.result, work_dir, found.scratch)
    available = available_memory(torch.device(job.model.device))
    for where, needed in found.memory.items():
        if needed > available[where]:
            raise UserError(
                f"the run needs {needed / 1e9:.2f} GB of {where} memory and {available[where] / 1e9:.2f} GB are free: "
                "lower --batch-size or --max-seq-length, or use a larger machine"
            )
