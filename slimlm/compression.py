"""One run on one page: check everything, calibrate, rewrite block by block, measure, publish."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimlm.calibration import Windows, interleaved
from slimlm.check import How, Job, check
from slimlm.checkpoint.code import copy_code
from slimlm.checkpoint.companions import copy_companions
from slimlm.checkpoint.config_file import move_generation_settings, write_config
from slimlm.checkpoint.disk import disk_errors, write_whole
from slimlm.checkpoint.journal import COMPLETE, Journal, compare_fingerprints
from slimlm.checkpoint.kin import Kin, is_moved, kept_kin, write_kin
from slimlm.checkpoint.manifest import Manifest, read_manifest
from slimlm.checkpoint.output import clear_leftovers, staged_output
from slimlm.checkpoint.shared import scratch_of, shared
from slimlm.checkpoint.staging import Staging
from slimlm.checkpoint.tokenizer import keep_tokenizer
from slimlm.errors import UserError
from slimlm.manifest import Fingerprint, fingerprint_of, manifest_of, write_account
from slimlm.measure import compare, measured_later
from slimlm.model.hidden import Scratch
from slimlm.model.result import Result
from slimlm.recipe import AnyStep
from slimlm.run import Outcome, Run
from slimlm.shown import Shown
from slimlm.windows import sampled_windows
from slimlm.work import kept_of, work_of

LOG_NAME = "slimlm.log.jsonl"
OTHER_RUN = "repeat what was run, or start over without --resume"


@dataclass(frozen=True)
class CompressResult(Shown):
    """Where the compressed model is, and its manifest."""

    output_dir: Path
    manifest: Manifest

    def describe(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**self.manifest, "output_dir": str(self.output_dir)}


@dataclass(frozen=True)
class Made:
    """What a run gave, whole but for what it says of itself. windows: those it calibrated on."""

    manifest: Manifest
    windows: Windows | None
    journal: Journal


def compress_step(step: AnyStep, how: How) -> CompressResult:
    """A run by itself. Raises UserError before any work, and RunFailure."""
    job = check(step, how)
    fingerprint = fingerprint_of(job, how.ranks)
    manifest = finished(job, job.output, fingerprint, how)
    if manifest is None:
        how.progress.expect([work_of(job.recipe, job.model)])
        own = staged_output(job.output, how.overwrite, how.resume, how.work_dir)
        with shared(how.ranks, job.output, how.work_dir, own) as staging:
            if staging.stages.exists():
                raise UserError(f"cannot resume: {staging.root} holds a recipe of several runs; {OTHER_RUN}")
            made = carry_out(job, fingerprint, staging, how)
            publish(made, staging, how)
        manifest = made.manifest
    return CompressResult(job.output, manifest)


def finished(job: Job, output: Path, fingerprint: Fingerprint, how: How) -> Manifest | None:
    """The result, measured if it is to be, where the run to resume had come as far as giving the output its name.

    Raises UserError naming the difference when what stands there is another run's and not to be replaced.
    """
    manifest: Manifest | None = how.ranks.decided(lambda: _found(output, fingerprint, how))
    return None if manifest is None else measured_later(job, output, manifest, how)


def _found(output: Path, fingerprint: Fingerprint, how: How) -> Manifest | None:
    manifest = read_manifest(output) if how.resume and output.is_dir() else None
    if manifest is None:
        return None
    try:
        differences = compare_fingerprints(manifest.get("fingerprint") or {}, fingerprint, how.anyway)
    except UserError:
        if how.overwrite:
            return None
        raise
    if differences:
        manifest["run"]["resumed_anyway"].append(differences)  # for whoever goes on from it
    clear_leftovers(output, how.work_dir)
    how.progress.line(f"{output} is complete already")
    return manifest


def carry_out(job: Job, fingerprint: Fingerprint, staging: Staging, how: How) -> Made:
    """Compress and measure, in the place where the result is built. Raises RunFailure."""
    job.seconds["preparing"] = time.perf_counter() - job.started - job.seconds["checking"]
    how.ranks.begin()
    journal = Journal(staging.work, fingerprint, how.anyway, how.ranks)
    job.resumed = journal.steps > 0
    if kept := kept_of(journal, len(job.model.blocks)):
        how.progress.line(f"resuming; kept: {', '.join(kept)}; what is not is done again")
    how.progress.log = staging.work / LOG_NAME if how.ranks.first else None
    with Result(staging.model, journal, job.recipe.max_shard_bytes) as result:
        windows = job.windows
        if job.recipe.own_windows:
            with _timed(job, "sampling"):
                own = sampled_windows(job.recipe, job.dense, job.tokenizer, journal, how.progress)
            windows = interleaved([windows, own] if windows else [own])
        with _timed(job, "compressing"):
            outcome = _run(job, windows, result, staging, how)
        result.finish()
    if how.ranks.writes:
        _furnish(job, outcome, staging.model)
    how.ranks.meet()
    with _timed(job, "measuring"):
        comparison = compare(job, staging, staging.model, how, outcome)
    job.seconds["total"] = time.perf_counter() - job.started
    manifest = manifest_of(job, staging, journal, windows, outcome, comparison)
    return Made(how.ranks.agreed(manifest), windows, journal)


def _run(job: Job, windows: Windows | None, result: Result, staging: Staging, how: How) -> Outcome:
    batches = windows.batches(job.recipe.batch_size) if windows else []
    with Scratch(scratch_of(how.ranks, staging), job.model.device, how.stream_memory) as scratch:
        run = Run(
            job.recipe, job.model, job.plan, batches, result, scratch, how.progress, how.ranks, windows, job.teacher
        )
        return job.method.run(run)


def _furnish(job: Job, outcome: Outcome, target: Path) -> None:
    """Everything beside the weights that makes them a model."""
    source, plan, kin = job.source.path, outcome.plan, _kin(job, outcome)
    write_config(plan.config, source, target)
    copy_companions(source, target)
    with disk_errors(target):
        for file in plan.files:
            shutil.copyfile(file, target / file.name)
        copy_code(source, target)
    move_generation_settings(source, target)
    keep_tokenizer(job.tokenizer, target, job.recipe.trust_remote_code)
    if kin is not None:
        write_kin(kin, target)


def _kin(job: Job, outcome: Outcome) -> Kin | None:
    """What the result is of the first dense model; None where the same, unknown, or another in every block."""
    path, hidden, blocks = job.source.path, job.model.config.hidden_size, range(len(job.model.blocks))
    kept = kept_kin(path, hidden, len(blocks))
    if outcome.basis is None:
        return kept
    if callable(outcome.basis) or (kept is None and is_moved(path)):
        return None
    own = Kin(outcome.basis.cpu(), torch.tensor(list(outcome.blocks or blocks)))
    return own if kept is None else kept.of(own)


def publish(made: Made, staging: Staging, how: How, before: Path | None = None) -> None:
    """Leave what a run says of itself with its result. before: the log of the runs before it. Raises RunFailure."""
    if not how.ranks.writes:
        made.journal.commit(COMPLETE)
        return
    write_account(staging.model, made.manifest)
    logs = [log for log in (before, how.progress.log) if log is not None and log.exists()]  # a full disk ends a log
    text = "".join(log.read_text(encoding="utf-8") for log in logs)
    if text:
        write_whole(staging.model / LOG_NAME, text)
    how.progress.log = None  # it goes with the rest
    made.journal.commit(COMPLETE)


@contextmanager
def _timed(job: Job, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    job.seconds[name] = time.perf_counter() - start
