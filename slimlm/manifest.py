"""What a run says of itself: the fingerprint that resuming it compares, the manifest, and the recipe as it ran."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from slimlm.calibration import Windows
from slimlm.check import Job
from slimlm.checkpoint.card import inherited, write_card
from slimlm.checkpoint.code import code_files, is_own_class
from slimlm.checkpoint.companions import companions
from slimlm.checkpoint.disk import write_whole
from slimlm.checkpoint.journal import Journal
from slimlm.checkpoint.kin import kin_files
from slimlm.checkpoint.manifest import (
    BlockError,
    Calibration,
    Manifest,
    Measured,
    Origin,
    RunFigures,
    Sparsity,
    Stage,
    read_manifest,
    versions,
    write_manifest,
)
from slimlm.checkpoint.reader import Checkpoint, file_hash
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.checkpoint.staging import Staging
from slimlm.device import machine, peak_memory, rounding
from slimlm.errors import UserError
from slimlm.evaluation.streamed import Comparison
from slimlm.plain import Json
from slimlm.prune.group import code_hash
from slimlm.ranks import Ranks
from slimlm.recipe import RAN_REMOTE_CODE, AnyStep, Recipe, as_file, dumped, steps_of
from slimlm.run import Outcome
from slimlm.windows import tokens_wanted

# What a step says of how and where it is run, and of what is done with the result: none of it decides a bit.
UNDECISIVE = {
    "model", "revision", "output_dir", "measure", "eval_text", "eval_windows", "device", "teacher",
    "gradient_checkpointing",
}  # fmt: skip
Fingerprint = dict[str, str | int | float | list[str] | None]


def fingerprint_of(job: Job, ranks: Ranks) -> Fingerprint:
    """Everything that decides the weights to the last bit: what was read by its hash, not by its name. For all ranks,
    as the first one has it. Raises UserError where they did not read the same."""
    hashes = {f"model {name}": digest for name, digest in job.model.checkpoint.hashes(ranks).items()}
    if job.teacher:
        hashes |= {f"teacher {name}": digest for name, digest in job.teacher.checkpoint.hashes(ranks).items()}
    own = [*job.model.checkpoint.sizes.values(), job.windows.sha256 if job.windows else None]
    if any(other != own for other in ranks.gather(own)):
        raise UserError("the processes of this run read different models or calibration data: give all the same")
    return ranks.decided(lambda: _fingerprint(job, hashes, ranks.size))


def _fingerprint(job: Job, hashes: Mapping[str, str], count: int) -> Fingerprint:
    settings = decisive(job.recipe)
    if job.windows:
        settings["dataset"] = job.recipe.own_windows
    found, trusted = versions(), code_files(job.source.path) if job.recipe.trust_remote_code else []
    return {
        **hashes,
        **{f"code {file.name}": file_hash(file) for file in trusted},
        **{
            f"file {file.name}": file_hash(file) for file in [*companions(job.source.path), *kin_files(job.source.path)]
        },
        **{f"recipe {name}": value for name, value in settings.items()},
        **{f"version {name}": found.get(name) for name in ("python", "slimlm", "torch", "transformers")},
        **{f"machine {name}": value for name, value in rounding(job.model.device).items()},
        **({"machine processes": count} if count > 1 else {}),
        **({"method code": code_hash(job.method.row)} if job.recipe.own_method and job.method.row else {}),
        "calibration sha256": job.windows.sha256 if job.windows else None,
    }


def decisive(step: AnyStep) -> Fingerprint:
    """The settings that decide bits."""
    return {name: value for name, value in step.settings.items() if name not in UNDECISIVE}


def manifest_of(
    job: Job,
    staging: Staging,
    journal: Journal,
    windows: Windows | None,
    outcome: Outcome,
    comparison: Comparison | None,
) -> Manifest:
    """Everything there is to say of a run whose tensors are all written."""
    dense, plan = parameter_count(job.dense.model), outcome.plan
    return {
        "model": _origin(job),
        "recipe": dumped(Recipe(steps=[job.recipe])),
        "paper": job.method.paper,
        "needs_remote_code": bool(plan.files) or is_own_class(plan.config),
        "sparsity": _sparsity(job, outcome),
        "parameters": {"dense": dense, "compressed": plan.parameters},
        "bytes": {
            "dense": job.dense.checkpoint.bytes_on_disk(),
            "compressed": Checkpoint(staging.model).bytes_on_disk(),
        },
        "skipped": {"modules": len(job.model.skipped), "weights": sum(job.model.skipped.values())},
        "changes": {name: list(pair) for name, pair in plan.changes.items()},
        "method": outcome.notes,
        "calibration": _calibration(windows, job),
        "measured": measured(job, comparison),
        "blocks": block_errors(job, comparison),
        "run": _run_figures(job, staging, journal),
        "versions": versions(),
        "fingerprint": journal.fingerprint,
    }


def _origin(job: Job) -> Origin:
    return {
        "name": job.source.name,
        "origin": job.source.origin,
        "path": str(job.source.path),
        "revision": job.source.revision,
        "model_type": job.model.config.model_type,
        "card": inherited(job.source.path),
        "sha256": job.model.checkpoint.hashes(),
    }


def _sparsity(job: Job, outcome: Outcome) -> Sparsity:
    removed = 1 - outcome.plan.parameters / parameter_count(job.dense.model)
    before = read_manifest(job.source.path) if job.teacher else None
    if before is not None:  # what compression did is still so
        return {**before["sparsity"], "parameters_removed": removed}
    return {
        "requested": removed if job.recipe.share is None else job.recipe.share,
        "of": job.method.sparsity_of,
        "achieved": removed if outcome.zeros is None else outcome.zeros,
        "parameters_removed": removed,
        "zeros_in_pruned_matrices": outcome.zeros,
    }


def _calibration(windows: Windows | None, job: Job) -> Calibration | None:
    if windows is None:
        return None
    count, length = windows.tokens.shape
    return {
        "source": windows.source,
        "windows": count,
        "window": length,
        "bos": windows.bos,
        "seed": job.recipe.seed,
        "sha256": windows.sha256,
        "tokens_wanted": tokens_wanted(job.recipe, job.model),
        "parts": windows.parts,
    }


def measured(job: Job, comparison: Comparison | None) -> Measured | None:
    """What measuring gave, if anything."""
    if comparison is None or job.test is None:
        return None
    return {
        **job.test.describe(),
        "documents": len(job.test.documents.unique()),
        "also_calibrated": job.also_calibrated,
        "dense": comparison.dense.describe(),
        "compressed": comparison.compressed.describe(),
    }


def block_errors(job: Job, comparison: Comparison | None) -> list[BlockError]:
    """How far the stream was from the dense one's after each block, as far as that was measured."""
    errors = comparison.block_errors if comparison else []
    return [{"block": job.model.blocks[index].path, "relative_error": error} for index, error in enumerate(errors)]


def _run_figures(job: Job, staging: Staging, journal: Journal) -> RunFigures:
    """Bytes of work files are of all, and of the hidden states among them, which `--work-dir` puts elsewhere."""
    places = {staging.work, staging.scratch} if journal.ranks.writes else set()
    files = {path: path.stat().st_size for place in places for path in place.rglob("*") if path.is_file()}
    kept = sum(size for path, size in files.items() if path.suffix in (".safetensors", ".jsonl"))
    return {
        "seconds": {name: round(value, 3) for name, value in job.seconds.items()},
        "peak_memory_bytes": peak_memory(job.model.device),
        "memory_before_bytes": job.memory_before,
        "resumed": job.resumed,
        "resumed_anyway": journal.differences,
        "work_bytes": sum(files.values()),
        "scratch_bytes": sum(files.values()) - kept,
        "machine": machine(job.model.device),
        "ranks": journal.ranks.account(peak_memory_bytes=peak_memory(job.model.device)),
        "compute_dtype": str(job.model.dtype).removeprefix("torch."),
    }


def write_account(directory: Path, manifest: Manifest) -> None:
    """Card, recipe, and last the manifest: what it says is there. Raises RunFailure on a full disk."""
    write_card(directory, manifest)
    write_recipe(directory, manifest)
    write_manifest(directory, manifest)


def _whole(source: Json) -> Json:
    """A path in a recipe, or several in a list, that holds wherever one is; other things as they are."""
    if isinstance(source, list):
        return [{**part, "source": _whole(part["source"])} if isinstance(part, dict) else part for part in source]
    path = Path(str(source)).expanduser()
    return str(path.resolve()) if path.exists() else source


def write_recipe(directory: Path, manifest: Manifest) -> None:
    """The recipe as it was run, able to run again anywhere on this machine: whole paths, the revision, no output.

    Raises RunFailure on a full disk.
    """
    settings, model = as_file(manifest["recipe"]), manifest["model"]
    settings.pop("output_dir", None)
    if settings.pop("trust_remote_code", False):
        settings[RAN_REMOTE_CODE] = True
    if model["origin"] == "directory":
        settings["model"] = model["path"]
    if model["revision"] is not None:
        settings["revision"] = model["revision"]
    steps = [dict(step) for step in steps_of(settings)]
    settings["steps"] = steps
    for own in (settings, *steps):
        for name in ("dataset", "eval_text"):
            if name in own:
                own[name] = _whole(own[name])
    write_whole(directory / "recipe.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def account_for(stages: list[Manifest], recipe: Recipe, manifest: Manifest) -> None:
    """Make the manifest of the last of several steps that of all of them. stages: those of the steps before it.

    recipe: of all, as it was run.
    """
    first = stages[0]
    manifest["recipe"] = dumped(recipe)
    manifest["model"] = first["model"]
    manifest["parameters"]["dense"] = first["parameters"]["dense"]
    manifest["bytes"]["dense"] = first["bytes"]["dense"]
    removing = [stage for stage in (*stages, manifest) if stage["recipe"]["steps"][-1]["method"] != "recover"]
    manifest["sparsity"] = {**removing[-1]["sparsity"]} if removing else manifest["sparsity"]
    manifest["sparsity"]["parameters_removed"] = 1 - manifest["parameters"]["compressed"] / first["parameters"]["dense"]
    manifest["changes"] = _changes([*stages, manifest])
    for stage in reversed(stages):  # where tokens came from that a later step got by a file
        own, last = stage["calibration"], manifest["calibration"]
        manifest["calibration"] = own if own and last and own["sha256"] == last["sha256"] else last
    if manifest["measured"] and first["measured"]:
        manifest["measured"]["dense"] = first["measured"]["dense"]
    kept: Any = [{name: said for name, said in stage.items() if name in Stage.__annotations__} for stage in stages]
    manifest["stages"] = kept


def _changes(stages: list[Manifest]) -> dict[str, list[Any]]:
    """What the first has and the last, of what any of them changed."""
    found: dict[str, list[Any]] = {}
    for stage in stages:
        for name, (before, after) in stage["changes"].items():
            found[name] = [found.get(name, [before])[0], after]
    return found
