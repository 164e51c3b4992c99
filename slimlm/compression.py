"""The whole flow on one page: check everything, calibrate, rewrite block by block, measure, publish."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy
import yaml
from transformers import AutoModelForCausalLM

from slimlm.activations import Spilled
from slimlm.calibration import SELF, Windows, sample_windows, start_token
from slimlm.checkpoint.card import write_card
from slimlm.checkpoint.disk import disk_errors
from slimlm.checkpoint.journal import Journal, compare_fingerprints
from slimlm.checkpoint.manifest import Manifest, read_manifest, versions, write_manifest
from slimlm.checkpoint.output import Staging, check_output, clear_leftovers, copy_companions, staged_output
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.skeleton import BUILDING, parameter_count
from slimlm.device import check_process, device_name, forget_peak, machine, peak_memory, placement, resident_memory
from slimlm.errors import RunFailure, UserError, out_of_memory
from slimlm.evaluation.streamed import Comparison, compare_streamed
from slimlm.methods.plan import Outcome
from slimlm.prepare import Job, check_later, check_shots, later_runs, open_model, output_of, prepare
from slimlm.progress import LogProgress, Progress
from slimlm.recipe import Recipe
from slimlm.work import Work

Result = TypeVar("Result")
LOG_NAME = "slimlm.log.jsonl"
CALIBRATION_NAME = "calibration.npy"


@dataclass(frozen=True)
class CompressResult:
    """Where the compressed model is, and its manifest."""

    output_dir: Path
    manifest: Manifest


def compress(
    recipe: Recipe,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    is_probe: bool = False,
) -> CompressResult:
    """Carry out a recipe; the result is a directory that stock transformers loads.

    resume: go on from what an interrupted run with the same recipe, model and versions left, if there is any.
    is_probe: as in `prepare`.
    Raises UserError for anything wrong with the request, before any work, and RunFailure when the run itself fails.
    Either way nothing is left under the output's name; what a run had finished stays in `<output>.partial/`.
    """
    progress = progress or LogProgress()
    check_process()
    with out_of_memory("lower --batch-size or --max-seq-length; --dry-run says what a run needs"):
        if len(recipe.stages) > 1:
            return _compress_in_stages(recipe, overwrite, resume, progress, is_probe)
        return _compress(recipe, overwrite, resume, progress, None, is_probe)


@dataclass(frozen=True)
class _Stage:
    """One of several runs, each on what the one before gave. recipe: of all. earlier: manifests of those before."""

    recipe: Recipe
    earlier: list[Manifest]
    is_last: bool


def _compress_in_stages(
    recipe: Recipe, overwrite: bool, resume: bool, progress: Progress, is_probe: bool
) -> CompressResult:
    """What a stage gives stands beside the output until the last one is done, whose manifest is that of all."""
    runs, output = recipe.stages, output_of(recipe)
    check_shots(recipe)
    recipe = recipe.model_copy(update={"output_dir": str(output)})
    places = [output.with_name(f"{output.name}.stage-{number}") for number in range(1, len(runs))]
    finished = read_manifest(output) if resume and output.is_dir() else None
    if finished is not None and finished["recipe"] == recipe.model_dump(exclude={"expected"}):
        for place in filter(Path.exists, places):
            shutil.rmtree(place)
        progress.line(f"{output} is complete already")
        return CompressResult(output, finished)
    check_output(output, overwrite, [])
    manifests: list[Manifest] = []
    for number, (run, place) in enumerate(zip(runs, [*places, output], strict=True)):
        progress.line(f"stage {number + 1} of {len(runs)}: {run.method}, sparsity {run.sparsity:g}")
        settings: dict[str, Any] = {"output_dir": str(place)}
        if number:
            first, tokens = manifests[0], places[0] / CALIBRATION_NAME
            is_bundled = first["model"]["origin"] == "bundled"
            run = later_runs(recipe, first["recipe"]["max_seq_length"], is_bundled)[number - 1]
            settings |= {"model": str(places[number - 1]), "revision": None}
            if run.dataset == SELF and tokens.exists():
                count, length = numpy.load(tokens, mmap_mode="r").shape
                settings |= {"dataset": str(tokens), "num_calibration_samples": count, "max_seq_length": length}
        stage = _Stage(recipe, list(manifests), is_last=place == output)
        again = overwrite or not (stage.is_last or resume)
        manifests.append(_compress(run.model_copy(update=settings), again, resume, progress, stage, is_probe).manifest)
    for place in places:
        shutil.rmtree(place)
    return CompressResult(output, manifests[-1])


def _compress(
    recipe: Recipe,
    overwrite: bool,
    resume: bool,
    progress: Progress,
    stage: _Stage | None,
    is_probe: bool,
) -> CompressResult:
    started, before = time.perf_counter(), resident_memory()
    job = prepare(recipe, overwrite, resume, progress, is_probe)
    forget_peak(job.model.device)
    if stage and not stage.earlier:
        check_later(job, stage.recipe)
    fingerprint = _fingerprint(job)
    finished = _finished(job.output, fingerprint, overwrite) if resume else None
    if finished is not None:
        progress.line(f"{job.output} is complete already")
        return finished
    job.seconds["preparing"] = time.perf_counter() - started - job.seconds["checking"]
    with staged_output(job.output, overwrite, resume) as staging:
        journal = Journal(staging.work, fingerprint)
        resumed = len(journal.records) > 1
        progress.log = staging.work / LOG_NAME
        with Work(staging.model, journal, progress) as work:
            windows = job.windows
            if job.recipe.dataset == SELF:
                windows = _timed(job, "sampling", lambda: _sampled(job, work))
            batches = windows.batches(job.recipe.batch_size) if windows else []
            outcome = _timed(job, "compressing", lambda: job.method.run(job.model, job.plan, batches, work))
            work.settle()
            work.writer.finish()
            with disk_errors(staging.model):
                outcome.plan.config.save_pretrained(staging.model)
            for file in outcome.plan.files:
                shutil.copyfile(file, staging.model / file.name)
            copy_companions(job.resolved.path, staging.model)
            comparison = _timed(job, "measuring", lambda: _measure(job, staging, outcome, progress))
            job.seconds["total"] = time.perf_counter() - started
            manifest = _manifest(job, staging, windows, outcome, comparison)
            if stage and stage.is_last:
                _account_for(stage, manifest)
            manifest["run"] |= {"memory_before_bytes": before, "resumed": resumed}
            manifest["fingerprint"] = fingerprint
            with disk_errors(staging.model):
                write_manifest(staging.model, manifest)
                write_card(staging.model, manifest)
                write_recipe(staging.model, stage.recipe if stage and stage.is_last else job.recipe, manifest["model"])
                if stage and not stage.is_last and windows is not None and job.recipe.dataset == SELF:
                    numpy.save(staging.model / CALIBRATION_NAME, windows.tokens.numpy())
                if progress.log is not None:
                    earlier = [job.resolved.path / LOG_NAME] if stage and stage.earlier else []
                    logs = [log.read_text(encoding="utf-8") for log in (*earlier, progress.log) if log.exists()]
                    (staging.model / LOG_NAME).write_text("".join(logs), encoding="utf-8")
            work.journal.commit("complete")
    return CompressResult(job.output, manifest)


def _account_for(stage: _Stage, manifest: Manifest) -> None:
    """Make the manifest of the last stage that of all of them."""
    first = stage.earlier[0]
    manifest["recipe"] = stage.recipe.model_dump(exclude={"expected"})
    manifest["model"] = first["model"]
    for kind in ("parameters", "bytes"):
        manifest[kind]["dense"] = first[kind]["dense"]
    dense, left = manifest["parameters"]["dense"], manifest["parameters"]["compressed"]
    manifest["sparsity"]["parameters_removed"] = 1 - left / dense
    manifest["changes"] = {**first["changes"], **manifest["changes"]}
    if manifest["calibration"] and first["calibration"] and first["calibration"]["source"] == SELF:
        manifest["calibration"] = first["calibration"]
    if manifest["measured"] and first["measured"]:
        manifest["measured"]["dense"] = first["measured"]["dense"]
    kept = ("recipe", "sparsity", "bytes", "changes", "method", "measured", "run")
    manifest["stages"] = [{name: earlier[name] for name in kept} for earlier in stage.earlier]


def write_recipe(directory: Path, recipe: Recipe, model: dict[str, Any]) -> None:
    """The recipe as it was run, able to run again anywhere on this machine: whole paths, the revision, no output.

    model: what the manifest says of it.
    """
    settings = recipe.model_dump(exclude={"expected", "output_dir"}, exclude_none=True)
    if recipe.widths or not recipe.sparsity:
        del settings["sparsity"]
    if model["origin"] == "directory":
        settings["model"] = model["path"]
    if model["revision"] is not None:
        settings["revision"] = model["revision"]
    for run in (settings, settings.get("then", {})):
        for name in ("dataset", "eval_text"):
            if run.get(name) and Path(run[name]).expanduser().exists():
                run[name] = str(Path(run[name]).expanduser().resolve())
    (directory / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def _finished(output: Path, fingerprint: dict[str, object], overwrite: bool) -> CompressResult | None:
    """The result, if the run to resume had come as far as giving the output its name.

    Raises UserError naming the difference when what stands there is another run's and not to be replaced.
    """
    manifest = read_manifest(output) if output.is_dir() else None
    if manifest is None:
        return None
    try:
        compare_fingerprints(manifest.get("fingerprint") or {}, fingerprint)
    except UserError:
        if overwrite:
            return None
        raise
    clear_leftovers(output)
    return CompressResult(output, manifest)


def _fingerprint(job: Job) -> dict[str, object]:
    """Everything that decides the weights to the last bit: what was read by its hash, not by its name."""
    names = {"expected", "model", "revision", "output_dir", "measure", "eval_text", "eval_windows"}
    settings = job.recipe.model_dump(exclude=names | ({"dataset"} if job.windows else set()))
    found = versions()
    return {
        **{f"model {name}": digest for name, digest in job.model.checkpoint.hashes.items()},
        **{f"recipe {name}": value for name, value in settings.items()},
        **{f"version {name}": found.get(name) for name in ("python", "slimlm", "torch", "transformers")},
        "calibration sha256": job.windows.sha256 if job.windows else None,
        "device": device_name(job.model.device),
    }


def _sampled(job: Job, work: Work) -> Windows:
    """Self-calibration: the one source that needs the whole model in memory at once."""
    recipe = job.recipe
    assert recipe.max_seq_length is not None
    sampled = work.journal.recall("sampled")
    if sampled:
        return Windows(sampled[1]["tokens"], SELF, start_token(job.tokenizer))
    work.progress.stage("sampling calibration text", recipe.num_calibration_samples)
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
        work.progress.step,
    )
    work.journal.keep("sampled", {"tokens": windows.tokens})
    return windows


def _measure(job: Job, staging: Staging, outcome: Outcome, progress: Progress) -> Comparison | None:
    """Both models in the dtype they are stored in, as `from_pretrained` would load them, so that `eval` agrees."""
    if job.test is None:
        return None
    dense, compressed = (
        open_model(path, job.model.device, "stock", job.recipe.trust_remote_code)
        for path in (job.resolved.path, staging.model)
    )
    batches = list(job.test.tokens.split(job.recipe.batch_size))
    hidden = [Spilled(staging.work / name, job.model.device, hashed=False) for name in ("dense", "compressed")]
    try:
        comparison = compare_streamed(dense, compressed, batches, outcome.basis, progress, hidden, outcome.blocks)
    except RunFailure as error:
        raise RunFailure(
            f"measuring failed: {error}; the compression itself is done: "
            "add --resume --no-measure to keep it unmeasured"
        ) from error
    return comparison


def _timed(job: Job, name: str, work: Callable[[], Result]) -> Result:
    start = time.perf_counter()
    result = work()
    job.seconds[name] = time.perf_counter() - start
    return result


def _manifest(
    job: Job, staging: Staging, windows: Windows | None, outcome: Outcome, comparison: Comparison | None
) -> Manifest:
    dense, plan, recipe = parameter_count(job.model.model), outcome.plan, job.recipe
    removed = 1 - plan.parameters / dense
    return {
        "model": {
            "name": job.resolved.name,
            "origin": job.resolved.origin,
            "path": str(job.resolved.path),
            "revision": job.resolved.revision,
            "model_type": job.model.config.model_type,
            "sha256": job.model.checkpoint.hashes,
        },
        "recipe": recipe.model_dump(exclude={"expected"}),
        "paper": job.method.paper,
        "needs_remote_code": bool(plan.files),
        "sparsity": {
            "requested": removed if recipe.widths else recipe.sparsity,
            "of": job.method.sparsity_of,
            "achieved": removed if outcome.zeros is None else outcome.zeros,
            "parameters_removed": removed,
            "zeros_in_pruned_matrices": outcome.zeros,
        },
        "parameters": {"dense": dense, "compressed": plan.parameters},
        "bytes": {
            "dense": job.model.checkpoint.bytes_on_disk(),
            "compressed": Checkpoint(staging.model).bytes_on_disk(),
        },
        "changes": {name: list(pair) for name, pair in plan.changes.items()},
        "method": outcome.notes,
        "calibration": _calibration(windows, recipe.seed),
        "measured": _measured(job, comparison),
        "blocks": [
            {"block": job.model.family.block(index), "relative_error": error}
            for index, error in enumerate(comparison.block_errors if comparison else [])
        ],
        "run": {
            "seconds": {name: round(value, 3) for name, value in job.seconds.items()},
            "peak_memory_bytes": peak_memory(job.model.device),
            "work_bytes": sum(path.stat().st_size for path in staging.work.iterdir()),
            "machine": machine(job.model.device),
            "compute_dtype": str(job.model.dtype).removeprefix("torch."),
        },
        "versions": versions(),
    }


def _calibration(windows: Windows | None, seed: int) -> dict[str, object] | None:
    if windows is None:
        return None
    count, length = windows.tokens.shape
    return {
        "source": windows.source,
        "windows": count,
        "window": length,
        "bos": windows.bos,
        "seed": seed,
        "sha256": windows.sha256,
    }


def _measured(job: Job, comparison: Comparison | None) -> dict[str, object] | None:
    if comparison is None or job.test is None:
        return None
    sides = {"dense": comparison.dense, "compressed": comparison.compressed}
    return {**job.test.describe(), **{name: likelihood.describe() for name, likelihood in sides.items()}}
