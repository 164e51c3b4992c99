"""What a run says of itself: the fingerprint that resuming it compares, the manifest, and the recipe as it ran."""

from pathlib import Path

import yaml

from slimlm.calibration import SELF, Windows, load_windows
from slimlm.checkpoint.card import inherited
from slimlm.checkpoint.code import code_files, is_own_class
from slimlm.checkpoint.companions import companions
from slimlm.checkpoint.disk import write_whole
from slimlm.checkpoint.journal import Journal
from slimlm.checkpoint.manifest import Manifest, versions
from slimlm.checkpoint.reader import Checkpoint, file_hash
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.checkpoint.staging import Staging
from slimlm.device import machine, peak_memory, rounding
from slimlm.evaluation.streamed import Comparison
from slimlm.methods import method_named
from slimlm.prepare import Job, later_runs_of
from slimlm.recipe import RAN_REMOTE_CODE, AnyStep, Recipe, as_file, dumped
from slimlm.run import Outcome

# What a recipe says of how and where it is run, and of what is done with the result: none of it decides a bit.
UNDECISIVE = {"expected", "model", "revision", "output_dir", "measure", "eval_text", "eval_windows", "device"}


def fingerprint_of(job: Job) -> dict[str, object]:
    """Everything that decides the weights to the last bit: what was read by its hash, not by its name."""
    settings = _decisive(job.recipe)
    if job.windows:
        del settings["dataset"]
    found = versions()
    return {
        **{f"model {name}": digest for name, digest in job.model.checkpoint.hashes.items()},
        **{f"code {file.name}": file_hash(file) for file in _trusted_code(job)},
        **{f"file {file.name}": file_hash(file) for file in companions(job.resolved.path)},
        **{f"recipe {name}": value for name, value in settings.items()},
        **{f"version {name}": found.get(name) for name in ("python", "slimlm", "torch", "transformers")},
        **{f"machine {name}": value for name, value in rounding(job.model.device).items()},
        "calibration sha256": job.windows.sha256 if job.windows else None,
    }


def _decisive(step: AnyStep) -> dict[str, object]:
    return {name: value for name, value in step.settings.items() if name not in UNDECISIVE}


def _trusted_code(job: Job) -> list[Path]:
    return code_files(job.resolved.path) if job.recipe.trust_remote_code else []


def fingerprint_of_all(job: Job, whole: Recipe) -> dict[str, object]:
    """The same of several runs, of which `job` is the first: with every run's settings, and the data of each."""
    found = fingerprint_of(job)
    for number, run in enumerate(later_runs_of(job, whole), start=2):
        found |= {f"recipe {name} of run {number}": value for name, value in _decisive(run).items()}
        if run.dataset in (None, SELF) or not method_named(run.method).calibrates(run, job.resolved.path):
            continue
        assert run.max_seq_length is not None
        del found[f"recipe dataset of run {number}"]
        windows = load_windows(
            run.dataset, job.tokenizer, run.num_calibration_samples, run.max_seq_length, run.seed, run.text_column
        )
        found[f"calibration sha256 of run {number}"] = windows.sha256
    return found


def account_for(earlier: list[Manifest], whole: Recipe, manifest: Manifest) -> None:
    """Make the manifest of the last of several runs that of all of them. whole: the recipe of all, as it was run."""
    first = earlier[0]
    manifest["recipe"] = dumped(whole)
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
    manifest["stages"] = [{name: stage[name] for name in kept} for stage in earlier]


def write_recipe(directory: Path, manifest: Manifest) -> None:
    """The recipe as it was run, able to run again anywhere on this machine: whole paths, the revision, no output."""
    settings, model = as_file(manifest["recipe"]), manifest["model"]
    settings.pop("output_dir", None)
    if settings.pop("trust_remote_code", False):
        settings[RAN_REMOTE_CODE] = True
    if model["origin"] == "directory":
        settings["model"] = model["path"]
    if model["revision"] is not None:
        settings["revision"] = model["revision"]
    for own in (settings, *settings["steps"]):
        for name in ("dataset", "eval_text"):
            if name in own and Path(own[name]).expanduser().exists():
                own[name] = str(Path(own[name]).expanduser().resolve())
    write_whole(directory / "recipe.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def manifest_of(
    job: Job,
    staging: Staging,
    journal: Journal,
    windows: Windows | None,
    outcome: Outcome,
    comparison: Comparison | None,
) -> Manifest:
    """Everything there is to say of a run whose tensors are all written."""
    dense, plan, recipe = parameter_count(job.model.model), outcome.plan, job.recipe
    removed = 1 - plan.parameters / dense
    return {
        "model": {
            "name": job.resolved.name,
            "origin": job.resolved.origin,
            "path": str(job.resolved.path),
            "revision": job.resolved.revision,
            "model_type": job.model.config.model_type,
            "card": inherited(job.resolved.path),
            "sha256": job.model.checkpoint.hashes,
        },
        "recipe": dumped(Recipe(steps=[recipe])),
        "paper": job.method.paper,
        "needs_remote_code": bool(plan.files) or is_own_class(plan.config),
        "sparsity": {
            "requested": removed if recipe.share is None else recipe.share,
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
        "skipped": {"modules": len(job.model.skipped), "weights": sum(job.model.skipped.values())},
        "changes": {name: list(pair) for name, pair in plan.changes.items()},
        "method": outcome.notes,
        "calibration": _calibration(windows, recipe.seed),
        **measured_of(job, comparison),
        "run": {
            "seconds": {name: round(value, 3) for name, value in job.seconds.items()},
            "peak_memory_bytes": peak_memory(job.model.device),
            "memory_before_bytes": job.memory_before,
            "resumed": job.resumed,
            "resumed_anyway": journal.differences,
            **_waiting(staging),
            "machine": machine(job.model.device),
            "compute_dtype": str(job.model.dtype).removeprefix("torch."),
        },
        "versions": versions(),
    }


def _waiting(staging: Staging) -> dict[str, int]:
    """Bytes of work files in all, and of the hidden states among them, which `--work-dir` puts elsewhere."""
    files = {path: path.stat().st_size for place in {staging.work, staging.scratch} for path in place.iterdir()}
    kept = sum(size for path, size in files.items() if path.suffix in (".safetensors", ".jsonl"))
    return {"work_bytes": sum(files.values()), "scratch_bytes": sum(files.values()) - kept}


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


def measured_of(job: Job, comparison: Comparison | None) -> Manifest:
    """The entries of a manifest that measuring gives."""
    if comparison is None or job.test is None:
        return {"measured": None, "blocks": []}
    sides = {"dense": comparison.dense, "compressed": comparison.compressed}
    errors = [
        {"block": job.model.family.block(index), "relative_error": error}
        for index, error in enumerate(comparison.block_errors)
    ]
    described = {name: likelihood.describe() for name, likelihood in sides.items()}
    return {"measured": {**job.test.describe(), **described}, "blocks": errors}
