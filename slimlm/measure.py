"""What a run did to its model, on test windows: both models in the dtype they are stored in, so that `eval` agrees."""

import time
from pathlib import Path

from slimlm.check import How, Job
from slimlm.checkpoint.manifest import Manifest, stages_of
from slimlm.checkpoint.output import held
from slimlm.checkpoint.shared import scratch_of, shared
from slimlm.checkpoint.staging import Staging
from slimlm.errors import RunFailure, out_of_memory
from slimlm.evaluation.streamed import Comparison, Kinship, compare_streamed
from slimlm.manifest import block_errors, measured, write_account
from slimlm.model.hidden import Scratch
from slimlm.models import open_model
from slimlm.run import Outcome

MEASURING = {"measure", "eval_text", "eval_windows"}


def compare(
    job: Job,
    staging: Staging,
    compressed: Path,
    how: How,
    outcome: Outcome | None,
    compares_blocks: bool = True,
) -> Comparison | None:
    """The dense model and the one in a directory, side by side; None where the run is not to be measured.

    outcome: of the run, or None for one that is long over. compares_blocks: as a `Kinship` is known; what was
    cut or rotated in a run that is over is not. Raises RunFailure.
    """
    if job.test is None:
        return None
    device, trusted = job.model.device, job.recipe.trust_remote_code
    models = (
        open_model(job.dense.checkpoint.path, device, "stock", trusted),
        open_model(compressed, device, "stock", trusted),
    )
    own = tuple(range(len(models[1].blocks)))
    blocks, basis = (outcome.blocks, outcome.basis) if outcome and job.teacher is None else (own, None)
    kinship = Kinship(basis, blocks, compares_blocks and job.teacher is None)
    batches = list(job.test.tokens.split(job.recipe.batch_size))
    try:
        with (
            out_of_memory("there is not enough for both models' largest parts"),
            Scratch(scratch_of(how.ranks, staging), device, how.stream_memory) as scratch,
        ):
            hidden = [scratch.hidden(name) for name in ("dense", "compressed")]
            return compare_streamed(models, batches, how.progress, kinship, hidden, how.ranks)
    except RunFailure as error:
        raise RunFailure(
            f"measuring failed: {error}; the compression itself is done: "
            "add --resume --no-measure to keep it unmeasured"
        ) from error


def measured_later(job: Job, output: Path, manifest: Manifest, how: How) -> Manifest:
    """A finished result's manifest; one that was not measured is, if that is wanted now. job: its first run's.

    Raises RunFailure.
    """
    if job.test is None or manifest["measured"] is not None:
        return manifest
    with shared(how.ranks, output, how.work_dir, held(output, how.work_dir)) as staging:
        start = time.perf_counter()
        kept = all(stage["sparsity"]["of"] != "parameters" for stage in stages_of(manifest))
        comparison = compare(job, staging, output, how, None, kept)
        manifest["measured"], manifest["blocks"] = measured(job, comparison), block_errors(job, comparison)
        manifest["run"]["seconds"]["measuring"] = round(time.perf_counter() - start, 3)
        for step in manifest["recipe"]["steps"]:
            for name in MEASURING & step.keys():
                del step[name]
        manifest["recipe"] |= job.recipe.model_dump(include=MEASURING)
        if how.ranks.writes:
            write_account(output, manifest)
    return manifest
