"""What a run will need, found by running its own code on the first blocks.

Memory does not grow with depth, so the peak of a run over a block of each kind is the peak of the whole, hidden states
that wait in memory included; time is what the last such block took, times the number of them, and the rest once. The
probe is a real run in a process of its own, on a directory that shows only the first blocks of the checkpoint, with the
calibration tokens of the run: with a few of them where what takes long is in proportion to them, which `work.py` knows.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slimlm.calibration import remembered, written_for
from slimlm.check import How, Job, journalled, spilled
from slimlm.checkpoint.manifest import Manifest, Stage, stages_of, took
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.checkpoint.staging import check_space
from slimlm.device import available_memory
from slimlm.errors import UserError
from slimlm.few import as_they_go, few, filled
from slimlm.methods import method_of
from slimlm.model.hidden import SHARE
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every
from slimlm.probe import Event, probe, shown_keys
from slimlm.prober import Prober
from slimlm.recipe import AnyStep, RecoverStep
from slimlm.work import MEASURING, SAMPLING, Passed, Work, pass_cost, work_of

LEAST = 2  # blocks to probe: the first of a process is slow, and a GPU has the next one in memory, too
MOST = 8  # of them; a kind that comes later is taken to be like the slowest of them


@dataclass(frozen=True)
class Forecast:
    """Bytes and seconds a run is expected to take. memory: "host", imports included, and "gpu" where there is one.

    result: bytes on disk of what is written in the end and on the way there; scratch: of hidden states that wait.
    processes: that are to share it, each of which takes no more memory than one alone would.
    """

    memory: dict[str, int]
    result: int
    scratch: int
    seconds: float
    processes: int = 1

    @property
    def disk(self) -> int:
        """Bytes of both."""
        return self.result + self.scratch


def forecast(job: Job, later: list[AnyStep], how: How, prober: Prober, processes: int = 1) -> Forecast:
    """Probe the first blocks of a checked run, in a directory beside its output. Raises RunFailure when that fails, and
    UserError for training, of which first blocks tell nothing.

    later: the steps after the checked one, which are probed, too, each on what the one before gives. processes: that
    are to share the run on this machine, which is probed in one.
    """
    if any(isinstance(step, RecoverStep) for step in (job.recipe, *later)):
        raise UserError("--dry-run cannot tell what `recover` takes: leave that step out")
    how.progress.stage("probing the first blocks", 1)
    kinds, steps = every(job.model, lambda block: block.kind), filled(job, later)
    shown = min(MOST, len(kinds), max(LEAST, *(kinds.index(kind) + 1 for kind in kinds)))
    home = next(parent for parent in job.output.parents if parent.is_dir())
    with ExitStack() as stack:
        place, *waiting = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".slimlm-probe-", dir=where)))
            for where in (home, *([how.work_dir] if how.work_dir else []))
        )
        prober.owns([place, *waiting])
        manifest, events = probe(
            job, steps, shown, place, replace(how, work_dir=waiting[0] if waiting else None), prober
        )
    how.progress.step()
    (_, memory), more = took(manifest), dict[str, int]()
    if any("sampling" in stage["run"]["seconds"] for stage in stages_of(manifest)):
        # Sampling holds every block at once, and their keys and values.
        others = parameter_count(job.model.model) - manifest["parameters"]["dense"]
        others += max(
            len(kinds) * _remembered(step, job) - shown * _remembered(few(step, job.model), job) for step in steps
        )
        more["gpu" if "gpu" in memory else "host"] = others * job.model.checkpoint.main_dtype.itemsize
    waits = max(_more_waiting(step, job, how) + _more_in_batches(step, job) for step in steps)
    more["host"] = max(more.get("host", 0), waits)
    memory = {where: size + more.get(where, 0) for where, size in memory.items()}  # nothing waits while it samples
    result, scratch = _disk(job, later, stages_of(manifest))
    return Forecast(memory, result, scratch, _seconds(job, steps, manifest, events, shown), processes)


def _remembered(step: AnyStep, job: Job) -> int:
    """Elements of the keys and values that a block keeps while the model writes."""
    assert step.max_seq_length is not None
    return remembered(job.model.config, written_for(step.own_windows), step.max_seq_length)


def _more_in_batches(step: AnyStep, job: Job) -> int:
    """Bytes of what a block's matrices and norms take in and give in a batch of the run, and not in its probe's; two
    thirds of it at a time where no gradients are taken."""
    if job.model.device.type != "cpu":
        return 0
    tokens = [
        min(one.batch_size, one.num_windows or one.eval_windows) * (one.max_seq_length or 0)
        for one in (step, few(step, job.model))
    ]
    each = (tokens[0] - tokens[1]) * Passed.of(job.model).numbers * job.model.dtype.itemsize
    return round(each if step.repairs else each * 2 / 3)


def _more_waiting(step: AnyStep, job: Job, how: How) -> int:
    """Bytes of hidden states that wait in memory in the run, and not in its probe."""
    shown = few(step, job.model)
    assert step.max_seq_length is not None
    if not step.num_windows:
        return 0
    share = shown.num_windows * (shown.max_seq_length or 0) / (step.num_windows * step.max_seq_length)
    windows: int = step.num_windows + method_of(step).scratch(step, job.model)
    waiting: int = windows * step.max_seq_length * job.model.config.hidden_size * job.model.dtype.itemsize
    room = available_memory(torch.device("cpu"))["host"] // SHARE if how.stream_memory is None else how.stream_memory
    return round(min(waiting, room) * (1 - share))


def _seconds(job: Job, steps: list[AnyStep], manifest: Manifest, events: list[Event], shown: int) -> float:
    """Of all steps on all blocks and windows, from what a few of them took."""
    model, timings = job.model, [stage["run"]["seconds"] for stage in stages_of(manifest)]
    whole, probed = (_added(some, model) for some in (steps, [few(step, model) for step in steps]))
    times = {stage: cost / probed[stage] for stage, cost in whole.items() if probed[stage]}
    in_blocks = sum(event["seconds"] for event in events)
    timed = {name: sum(timing.get(name, 0.0) for timing in timings) for name in ("checking", "sampling", "measuring")}
    beside = timed["measuring"] - sum(event["seconds"] for event in events if event["what"] == MEASURING)  # the head
    seconds: float = took(manifest)[0] - in_blocks - timed["sampling"] - beside
    seconds += beside * times.get(MEASURING, 1.0)
    seconds += sum(times.get(stage, 1.0) * _of_all_blocks(job, events, stage, shown) for stage in stages_in(events))
    tensors = model.checkpoint.tensors
    read = sum(tensors[key].nbytes for key in shown_keys(job, shown))  # of files that may hold all blocks
    larger: float = sum(tensor.nbytes for tensor in tensors.values()) / read
    seconds += (larger - 1) * timed["checking"] + times.get(SAMPLING, 1.0) * larger * timed["sampling"]
    return seconds


def stages_in(events: list[Event]) -> list[str]:
    """By name, each once."""
    return list(dict.fromkeys(event["what"] for event in events))


def _of_all_blocks(job: Job, events: list[Event], stage: str, shown: int) -> float:
    """Seconds of a stage on all blocks, and beside them, from those of the first ones: others take what one of their
    kind did, best one that was not the last, which may be refined by what the head says."""
    kinds, places = every(job.model, lambda block: block.kind), map(job.model.family.block, range(shown))
    taken = [sum(one["seconds"] for one in events if (one["what"], one["part"]) == (stage, place)) for place in places]
    per_kind = {kinds[index]: taken[index] for index in (shown - 1, *range(shown - 1))}
    rest: float = sum(per_kind.get(kind, max(taken)) for kind in kinds[shown:])
    return rest + sum(one["seconds"] for one in events if one["what"] == stage)


def _added(steps: Sequence[AnyStep], model: StreamedModel) -> Work:
    """Of all steps together, in tokens' products with the weights."""
    found: Work = {}
    for step in as_they_go(steps):
        unit = pass_cost(step, model)
        found |= {stage: cost * unit + found.get(stage, 0.0) for stage, cost in work_of(step, model).items()}
    return found


def _disk(job: Job, later: list[AnyStep], probed: list[Stage]) -> tuple[int, int]:
    """Bytes of what all steps give, which stands until the last is done, and of hidden states waiting in one."""
    waiting = [spilled(job.recipe, job.model)]
    for step in later:
        data = step.dataset if method_of(step).calibrates(step, job.source.path) else None
        waiting.append(spilled(step.model_copy(update={"dataset": data}), job.model))
    sizes, runs = [stage["bytes"]["compressed"] for stage in probed], [stage["run"] for stage in probed]
    kept = [run["work_bytes"] - run["scratch_bytes"] for run in runs]
    kept.append(journalled(job.recipe, job.model))
    written = job.result_bytes * sum(sizes) // sizes[0]
    return written + max(kept), max(*waiting, *(run["scratch_bytes"] for run in runs))


def require_room(job: Job, found: Forecast, work_dir: Path | None = None) -> None:
    """Raises UserError when memory or disk space is too small."""
    check_space(job.output, found.result, work_dir, found.scratch)
    available = available_memory(torch.device(job.model.device))
    for where, each in found.memory.items():
        needed = each * (found.processes if where == "host" else 1)
        if needed > available[where]:
            raise UserError(
                f"the run needs {needed / 1e9:.2f} GB of {where} memory and {available[where] / 1e9:.2f} GB are free: "
                "lower --batch-size, --max-seq-length or --stream-memory, for slice and slimlm add --self-share 0 "
                "--refine 0, or use a larger machine"
            )
