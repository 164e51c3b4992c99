"""The whole flow on one page: check everything, calibrate, rewrite block by block, measure, publish."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from slimlm.calibration import Windows, sample_windows
from slimlm.checkpoint.card import write_card
from slimlm.checkpoint.manifest import Manifest, versions, write_manifest
from slimlm.checkpoint.output import copy_companions, staged_output
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.checkpoint.writer import CheckpointWriter
from slimlm.device import machine, peak_memory
from slimlm.evaluation.streamed import Comparison, compare_streamed
from slimlm.methods.plan import Outcome
from slimlm.prepare import Job, open_model, prepare
from slimlm.progress import LogProgress, Progress
from slimlm.recipe import Recipe

Result = TypeVar("Result")


@dataclass(frozen=True)
class CompressResult:
    """Where the compressed model is, and its manifest."""

    output_dir: Path
    manifest: Manifest


def compress(recipe: Recipe, overwrite: bool = False, progress: Progress | None = None) -> CompressResult:
    """Carry out a recipe; the result is a directory that stock transformers loads.

    Raises UserError for anything wrong with the request, before any work and with nothing written, and RunFailure when
    the run itself fails; either way nothing is left under the output's name.
    """
    progress = progress or LogProgress()
    job = prepare(recipe, overwrite, progress)
    started = time.perf_counter()
    with staged_output(job.output, overwrite) as partial:
        writer = CheckpointWriter(partial, job.plan.tensors)
        windows = job.windows or _timed(job, "sampling", lambda: _sample(job, progress))
        batches = windows.batches(job.recipe.batch_size)

        def write(tensors: Mapping[str, Tensor]) -> None:
            for name, tensor in tensors.items():
                writer.write(name, tensor)

        outcome = _timed(job, "compressing", lambda: job.method.run(job.model, job.plan, batches, write, progress))
        writer.finish()
        job.plan.config.save_pretrained(partial)
        copy_companions(job.resolved.path, partial)
        comparison = _timed(job, "measuring", lambda: _measure(job, partial, outcome, progress))
        job.seconds["total"] = time.perf_counter() - started
        manifest = _manifest(job, partial, windows, outcome, comparison)
        write_manifest(partial, manifest)
        write_card(partial, manifest)
        recipe_text = yaml.safe_dump(job.recipe.model_dump(exclude={"expected"}), sort_keys=False)
        (partial / "recipe.yaml").write_text(recipe_text)
    return CompressResult(job.output, manifest)


def _sample(job: Job, progress: Progress) -> Windows:
    """Self-calibration: the one source that needs the whole model in memory at once."""
    recipe = job.recipe
    assert recipe.max_seq_length is not None
    progress.stage("sampling calibration text", recipe.num_calibration_samples)
    model = AutoModelForCausalLM.from_pretrained(
        job.resolved.path, dtype="auto", trust_remote_code=recipe.trust_remote_code
    ).to(job.model.device)
    return sample_windows(
        model.eval(), job.tokenizer, recipe.num_calibration_samples, recipe.max_seq_length, recipe.seed, progress.step
    )


def _measure(job: Job, partial: Path, outcome: Outcome, progress: Progress) -> Comparison | None:
    """Both models in the dtype they are stored in, as `from_pretrained` would load them, so that `eval` agrees."""
    if job.test is None:
        return None
    dense, compressed = (
        open_model(path, job.model.device, "stored", job.recipe.trust_remote_code)
        for path in (job.resolved.path, partial)
    )
    batches = list(job.test.tokens.split(job.recipe.batch_size))
    comparison = compare_streamed(dense, compressed, batches, outcome.basis, progress)
    for index, error in enumerate(comparison.block_errors):
        progress.line(f"{job.model.family.block(index)}  relative error of the stream {error:.3f}")
    return comparison


def _timed(job: Job, name: str, work: Callable[[], Result]) -> Result:
    start = time.perf_counter()
    result = work()
    job.seconds[name] = time.perf_counter() - start
    return result


def _manifest(job: Job, partial: Path, windows: Windows, outcome: Outcome, comparison: Comparison | None) -> Manifest:
    dense, plan, recipe = parameter_count(job.model.model), job.plan, job.recipe
    count, length = windows.tokens.shape
    return {
        "model": {
            "name": job.resolved.name,
            "origin": job.resolved.origin,
            "path": str(job.resolved.path),
            "revision": job.resolved.revision,
            "model_type": job.model.config.model_type,
            "sha256": job.model.checkpoint.hashes(),
        },
        "recipe": recipe.model_dump(exclude={"expected"}),
        "paper": job.method.paper,
        "sparsity": {
            "requested": recipe.sparsity,
            "achieved": 1 - plan.parameters / dense,
            "zeros_in_matrices": outcome.zeros,
        },
        "parameters": {"dense": dense, "compressed": plan.parameters},
        "bytes": {"dense": job.model.checkpoint.bytes_on_disk(), "compressed": Checkpoint(partial).bytes_on_disk()},
        "changes": {name: list(pair) for name, pair in plan.changes.items()},
        "method": outcome.notes,
        "calibration": {
            "source": windows.source,
            "windows": count,
            "window": length,
            "bos": windows.bos,
            "seed": recipe.seed,
            "sha256": windows.sha256,
        },
        "measured": _measured(job, comparison),
        "blocks": [
            {"block": job.model.family.block(index), "relative_error": error}
            for index, error in enumerate(comparison.block_errors if comparison else [])
        ],
        "run": {
            "seconds": {name: round(value, 3) for name, value in job.seconds.items()},
            "peak_memory_bytes": peak_memory(),
            "machine": machine(job.model.device),
            "compute_dtype": str(job.model.dtype).removeprefix("torch."),
        },
        "versions": versions(),
    }


def _measured(job: Job, comparison: Comparison | None) -> dict[str, object] | None:
    if comparison is None or job.test is None:
        return None
    figures: dict[str, object] = {
        name: {
            "perplexity": likelihood.perplexity,
            "log_perplexity": likelihood.mean,
            "log_perplexity_stderr": likelihood.stderr,
        }
        for name, likelihood in (("dense", comparison.dense), ("compressed", comparison.compressed))
    }
    dtype = job.plan.config.dtype
    return {**job.test.describe(), "dtype": str(dtype).removeprefix("torch."), **figures}
