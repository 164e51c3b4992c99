"""The whole flow on one page: check everything, calibrate, rewrite block by block, measure, publish."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy
from transformers import AutoModelForCausalLM

from slimlm.calibration import SELF, Windows, sample_windows, start_token
from slimlm.checkpoint.card import write_card
from slimlm.checkpoint.code import copy_code
from slimlm.checkpoint.companions import copy_companions
from slimlm.checkpoint.config_file import move_generation_settings, write_config
from slimlm.checkpoint.disk import disk_errors, write_whole
from slimlm.checkpoint.hub import Access
from slimlm.checkpoint.journal import COMPLETE, Journal, compare_fingerprints, finished_steps
from slimlm.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from slimlm.checkpoint.output import clear_leftovers, held, staged_output
from slimlm.checkpoint.push import Push
from slimlm.checkpoint.skeleton import BUILDING
from slimlm.checkpoint.staging import Staging, check_output, size_of
from slimlm.checkpoint.tokenizer import keep_tokenizer
from slimlm.device import check_process, forget_peak, placement
from slimlm.errors import RunFailure, UserError, out_of_memory
from slimlm.evaluation.streamed import Comparison, compare_streamed
from slimlm.methods import method_named
from slimlm.model.hidden import Scratch, Spilled
from slimlm.model.result import Result
from slimlm.prepare import Job, check_later, later_runs_of, open_model, output_of, prepare, spilled
from slimlm.progress import LogProgress, Progress
from slimlm.recipe import AnyStep, Recipe
from slimlm.record import account_for, fingerprint_of, fingerprint_of_all, manifest_of, measured_of, write_recipe
from slimlm.run import Outcome, Plan, Run

Timed = TypeVar("Timed")
MEASURING = {"measure", "eval_text", "eval_windows"}
LOG_NAME = "slimlm.log.jsonl"
CALIBRATION_NAME = "calibration.npy"
OTHER_RUN = "repeat what was run, or start over without --resume"


@dataclass(frozen=True)
class CompressResult:
    """Where the compressed model is, and its manifest."""

    output_dir: Path
    manifest: Manifest


@dataclass(frozen=True)
class _How:
    """How a recipe is run, as `compress` takes it."""

    progress: Progress
    overwrite: bool
    resume: bool
    anyway: bool
    work_dir: Path | None
    is_probe: bool
    access: Access


def compress(
    recipe: Recipe,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    is_probe: bool = False,
    resume_anyway: bool = False,
    work_dir: Path | str | None = None,
    token: str | None = None,
    cache_dir: Path | str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> CompressResult:
    """Carry out a recipe; the result is a directory that stock transformers loads.

    resume: go on from what an interrupted run with the same recipe, model, versions and kind of machine left, if there
    is any; resume_anyway: with other versions or on another kind of machine, too, which the manifest then says.
    work_dir: a directory for hidden states that wait on disk, instead of `<output>.partial/`.
    is_probe: as in `prepare`. token, cache_dir: for a model on the hub, as `from_pretrained` takes them.
    push_to_hub: a repository to upload the result to when it is whole; private: one that is not there yet.
    Raises UserError for anything wrong with the request, before any work, and RunFailure when the run itself fails.
    Either way nothing is left under the output's name; what a run had finished stays in `<output>.partial/`.
    """
    access = Access(token, cache_dir)
    place = None if work_dir is None else Path(work_dir).expanduser().resolve()
    how = _How(progress or LogProgress(), overwrite, resume or resume_anyway, resume_anyway, place, is_probe, access)
    check_process()
    with out_of_memory("lower --batch-size or --max-seq-length; --dry-run says what a run needs"):
        push = Push(push_to_hub, private, token) if push_to_hub else None
        if push is not None:
            push.check()
        result = _compress_in_stages(recipe, how) if len(recipe.steps) > 1 else _compress_once(recipe.steps[0], how)
        if push is not None:
            how.progress.line(f"uploading to {push.repo}")
            how.progress.line(f"it is at {push.upload(result.output_dir)}")
        return result


def _compress_once(recipe: AnyStep, how: _How) -> CompressResult:
    job = _prepared(recipe, how)
    return CompressResult(job.output, _result(job, job.output, how))


def _prepared(recipe: AnyStep, how: _How, overwrite: bool = False) -> Job:
    again = overwrite or how.overwrite
    job = prepare(recipe, again, how.resume, how.progress, how.is_probe, how.work_dir, how.access)
    forget_peak(job.model.device)
    return job


def _result(job: Job, output: Path, how: _How) -> Manifest:
    """The manifest of one run's result, which is at `output` then: from now, or from before."""
    fingerprint = fingerprint_of(job)
    finished = _finished(output, fingerprint, how) if how.resume else None
    if finished is not None:
        return _measured_later(job, [job.recipe], output, finished, how)
    with staged_output(output, how.overwrite, how.resume, how.work_dir) as staging:
        if staging.stages.exists():
            raise UserError(f"cannot resume: {staging.root} holds a recipe of several runs; {OTHER_RUN}")
        return _carry_out(job, fingerprint, staging, how)


def _finished(output: Path, fingerprint: dict[str, object], how: _How) -> Manifest | None:
    """The result, if the run to resume had come as far as giving the output its name.

    Raises UserError naming the difference when what stands there is another run's and not to be replaced.
    """
    manifest = read_manifest(output) if output.is_dir() else None
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


@dataclass(frozen=True)
class _Several:
    """One of several runs, each on what the one before gave. earlier: manifests of those before.

    fingerprint, recipe: of all of them, for the last one.
    """

    fingerprint: dict[str, object]
    earlier: list[Manifest] = field(default_factory=list)
    recipe: Recipe | None = None


def _compress_in_stages(recipe: Recipe, how: _How) -> CompressResult:
    """What a run gives stands in the place where the output is built until the last one is done."""
    runs, output = recipe.steps, output_of(recipe.steps)
    recipe = recipe.updated(output_dir=str(output))
    places = [Staging(output).stages / str(number) for number in range(1, len(runs))]
    is_there = how.resume and (output / MANIFEST_NAME).is_file()  # a result, which needs no room
    replaceable = how.overwrite or is_there
    check_output(output, replaceable, [], work_dir=how.work_dir)
    first = _prepared(runs[0].model_copy(update={"output_dir": str(places[0])}), how, overwrite=True)
    # All results stand until the last is done, none of them larger than the first.
    needed = 0 if is_there else len(runs) * sum(spec.nbytes for spec in first.plan.tensors.values())
    needed -= size_of(Staging(output).stages) if how.resume else 0
    waiting = 0 if is_there else spilled(first.recipe, first.method, first.model)
    check_output(output, replaceable, first.inputs, needed, how.work_dir, waiting, how.resume)
    check_later(first, recipe)
    fingerprint = fingerprint_of_all(first, recipe)
    finished = _finished(output, fingerprint, how) if how.resume else None
    if finished is not None:
        return CompressResult(output, _measured_later(first, recipe.steps, output, finished, how))
    with staged_output(output, how.overwrite, how.resume, how.work_dir) as staging:
        if not staging.stages.exists() and finished_steps(staging.work):
            raise UserError(f"cannot resume: {staging.root} holds a single run; {OTHER_RUN}")
        staging.stages.mkdir(exist_ok=True)
        Journal(staging.stages, fingerprint, how.anyway)  # what all of them are, compared before any of them runs
        manifests: list[Manifest] = []
        ran = [first.recipe.model_copy(update={"output_dir": str(output)}), *later_runs_of(first, recipe)]
        for number, place in enumerate(places):
            job = first if number == 0 else _prepared(_next_run(recipe, first, number, places), how, overwrite=True)
            _announce(job, number, len(runs), how)
            manifests.append(_stage(job, place, _Several(fingerprint, list(manifests)), how))
        last = _prepared(_next_run(recipe, first, len(places), [*places, output]), how)
        _announce(last, len(places), len(runs), how)
        several = _Several(fingerprint, manifests, Recipe(steps=ran))
        manifest = _carry_out(last, fingerprint_of(last), staging, how, several)
    return CompressResult(output, manifest)


def _announce(job: Job, number: int, of: int, how: _How) -> None:
    how.progress.line(f"stage {number + 1} of {of}: {job.recipe.described}")


def _next_run(whole: Recipe, first: Job, number: int, places: list[Path]) -> AnyStep:
    """A run after the first, number 0, on what the one before it gave."""
    run, tokens = later_runs_of(first, whole)[number - 1], places[0] / CALIBRATION_NAME
    settings: dict[str, Any] = {"output_dir": str(places[number]), "model": str(places[number - 1]), "revision": None}
    if run.dataset == SELF and tokens.exists():
        count, length = numpy.load(tokens, mmap_mode="r").shape
        settings |= {"dataset": str(tokens), "num_calibration_samples": count, "max_seq_length": length}
    return run.model_copy(update=settings)


def _stage(job: Job, place: Path, several: _Several, how: _How) -> Manifest:
    """One of the earlier runs' results, at `place` then."""
    fingerprint = fingerprint_of(job)
    finished = _finished(place, fingerprint, how) if how.resume else None
    if finished is not None:
        return _measured_later(job, [job.recipe], place, finished, how)
    with staged_output(place, True, how.resume, how.work_dir) as staging:
        return _carry_out(job, fingerprint, staging, how, several)


def _carry_out(
    job: Job, fingerprint: dict[str, object], staging: Staging, how: _How, several: _Several | None = None
) -> Manifest:
    """Compress, measure, and leave everything that belongs into the result in the place it is built at."""
    job.seconds["preparing"] = time.perf_counter() - job.started - job.seconds["checking"]
    journal = Journal(staging.work, fingerprint, how.anyway)
    job.resumed = journal.steps > 0
    how.progress.log = staging.work / LOG_NAME
    with Result(staging.model, journal, job.recipe.max_shard_bytes) as result:
        windows = job.windows
        if job.recipe.dataset == SELF:
            windows = _timed(job, "sampling", lambda: _sampled(job, journal, how.progress))
        batches = windows.batches(job.recipe.batch_size) if windows else []
        scratch = Scratch(staging.scratch, job.model.device)
        run = Run(job.recipe, job.model, job.plan, batches, result, scratch, how.progress)
        outcome = _timed(job, "compressing", lambda: job.method.run(run))
        result.settle()
        result.writer.finish()
        _furnish(job, outcome.plan, staging.model)
        comparison = _timed(job, "measuring", lambda: _measure(job, staging, staging.model, how.progress, outcome))
        job.seconds["total"] = time.perf_counter() - job.started
        manifest = manifest_of(job, staging, journal, windows, outcome, comparison)
        manifest["fingerprint"] = fingerprint
        if several and several.recipe:
            account_for(several.earlier, several.recipe, manifest)
            manifest["fingerprint"] = several.fingerprint
        elif several and windows is not None and job.recipe.dataset == SELF:
            with disk_errors(staging.model):
                numpy.save(staging.model / CALIBRATION_NAME, windows.tokens.numpy())
        _write_account(staging.model, manifest)
        _write_log(job, staging, how.progress, several)
        how.progress.log = None  # it goes with the rest
        journal.commit(COMPLETE)
    return manifest


def _furnish(job: Job, plan: Plan, target: Path) -> None:
    """Everything beside the weights that makes them a model."""
    source = job.resolved.path
    write_config(plan.config, source, target)
    copy_companions(source, target)
    with disk_errors(target):
        for file in plan.files:
            shutil.copyfile(file, target / file.name)
        copy_code(source, target)
    move_generation_settings(source, target)
    keep_tokenizer(job.tokenizer, target, job.recipe.trust_remote_code)


def _write_account(directory: Path, manifest: Manifest) -> None:
    """The manifest last: what it says is there."""
    write_card(directory, manifest)
    write_recipe(directory, manifest)
    write_manifest(directory, manifest)


def _write_log(job: Job, staging: Staging, progress: Progress, several: _Several | None) -> None:
    """What is left of the log after a full disk, behind those of the runs before."""
    earlier = [job.resolved.path / LOG_NAME] if several and several.earlier else []
    logs = [*earlier, *([progress.log] if progress.log is not None else [])]
    text = "".join(log.read_text(encoding="utf-8") for log in logs if log.exists())
    if text:
        write_whole(staging.model / LOG_NAME, text)


def _sampled(job: Job, journal: Journal, progress: Progress) -> Windows:
    """Self-calibration: the one source that needs the whole model in memory at once."""
    recipe = job.recipe
    assert recipe.max_seq_length is not None
    sampled = journal.recall("sampled")
    if sampled:
        return Windows(sampled[1]["tokens"], SELF, start_token(job.tokenizer))
    progress.stage("sampling calibration text", recipe.num_calibration_samples)
    with BUILDING:
        model = AutoModelForCausalLM.from_pretrained(
            job.resolved.path,
            dtype="auto",
            trust_remote_code=recipe.trust_remote_code,
            device_map=placement(job.model.device),
        )
    windows = sample_windows(
        model.eval(),
        job.tokenizer,
        recipe.num_calibration_samples,
        recipe.max_seq_length,
        recipe.seed,
        progress.step,
    )
    journal.keep("sampled", {"tokens": windows.tokens})
    return windows


def _measure(
    job: Job,
    staging: Staging,
    compressed: Path,
    progress: Progress,
    outcome: Outcome | None,
    compares_blocks: bool = True,
) -> Comparison | None:
    """Both models in the dtype they are stored in, as `from_pretrained` would load them, so that `eval` agrees.

    outcome: of the run, or None for one that is long over. compares_blocks: as in `compare_streamed`; what was cut or
    rotated in a run that is over cannot be.
    """
    if job.test is None:
        return None
    pair = [
        open_model(path, job.model.device, "stock", job.recipe.trust_remote_code)
        for path in (job.resolved.path, compressed)
    ]
    blocks = tuple(range(len(pair[1].blocks))) if outcome is None else outcome.blocks
    batches = list(job.test.tokens.split(job.recipe.batch_size))
    hidden = [Spilled(staging.scratch / name, job.model.device, hashed=False) for name in ("dense", "compressed")]
    try:
        with out_of_memory("there is not enough for both models' largest parts"):
            basis = outcome.basis if outcome else None
            return compare_streamed(pair[0], pair[1], batches, basis, progress, hidden, blocks, compares_blocks)
    except RunFailure as error:
        raise RunFailure(
            f"measuring failed: {error}; the compression itself is done: "
            "add --resume --no-measure to keep it unmeasured"
        ) from error


def _measured_later(job: Job, steps: list[AnyStep], output: Path, manifest: Manifest, how: _How) -> Manifest:
    """A finished result's manifest; one that was not measured is, if that is wanted now. steps: all its runs."""
    if job.test is None or manifest["measured"] is not None:
        return manifest
    with held(output, how.work_dir) as staging:
        start = time.perf_counter()
        kept = all(method_named(run.method).sparsity_of != "parameters" for run in steps)
        manifest |= measured_of(job, _measure(job, staging, output, how.progress, None, kept))
        manifest["run"]["seconds"]["measuring"] = round(time.perf_counter() - start, 3)
        for step in manifest["recipe"]["steps"]:
            for name in MEASURING:
                step.pop(name, None)
        manifest["recipe"] |= job.recipe.model_dump(include=MEASURING)
        _write_account(output, manifest)
    return manifest


def _timed(job: Job, name: str, work: Callable[[], Timed]) -> Timed:
    start = time.perf_counter()
    result = work()
    job.seconds[name] = time.perf_counter() - start
    return result
