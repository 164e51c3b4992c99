"""What the figures of a run mean, in lines of text."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from slimlm.check import Job
from slimlm.checkpoint.card import dtypes_of, recovered
from slimlm.checkpoint.manifest import Manifest, Measured, WindowFigures, took
from slimlm.evaluation.perplexity import of_no_use
from slimlm.forecast import Forecast
from slimlm.inspection import Done
from slimlm.recipe import AnyStep
from slimlm.report.expected import shapes_of
from slimlm.report.table import manifest_table
from slimlm.report.terminal import sentences


def compress_shown(manifest: Manifest) -> list[Table | Text]:
    """For the terminal: what a run did to its model."""
    return [manifest_table(manifest), *sentences(compress_summary(manifest))]


def compress_summary(manifest: Manifest) -> str:
    """What was asked for, what was achieved, on what it was measured, and what it took."""
    seconds, peaks = took(manifest)
    lines = [*done_lines(manifest), *recovered(manifest)]
    if latency := manifest["method"].get("latency"):
        lines.append(
            f"decoding: {latency['predicted_ms']:,.3g} ms a token predicted, {latency['ratio']:.3f} of what the dense "
            f"model takes, {latency['dense_ms']:,.3g}"
        )
    if manifest["measured"]:
        lines += measured_lines(manifest["measured"])
    lines.append(f"{seconds:.0f} s, peak memory: {_gigabytes(peaks)}, {manifest['run']['machine']}")
    return "\n".join(lines)


def measured_lines(measured: Measured) -> list[str]:
    """On what it was measured, and whether it is of any use."""
    before, after = measured["dense"]["log_perplexity"], measured["compressed"]["log_perplexity"]
    return [windows_line(measured, dtypes_of(measured)), *of_no_use({measured["text"]: after - before})]


def done_lines(made: Manifest | Done) -> list[str]:
    """What was asked for, and what was achieved."""
    sparsity = made["sparsity"]
    zeros = sparsity["zeros_in_pruned_matrices"] is not None
    # Widths and latencies request none.
    is_asked = sparsity["of"] != "parameters" or sparsity["requested"] != sparsity["parameters_removed"]
    asked = f"requested {sparsity['requested']:g}, " if is_asked else ""
    return [
        f"sparsity {asked}achieved {sparsity['achieved']:.4f} of {sparsity['of']}; "
        f"{sparsity['parameters_removed']:.4f} of all parameters are gone",
        *(f"{name} {before} -> {after}" for name, (before, after) in made["changes"].items()),
        *(["zeros neither shrink nor speed up a stock checkpoint"] if zeros else []),
    ]


def forecast_summary(job: Job, found: Forecast, later: Sequence[AnyStep], work_dir: Path | None) -> str:
    """Every shape before and after, and what the run will take.

    later: the steps that follow it, which the forecast includes. work_dir: where hidden states are to wait.
    """
    recipe, count = job.recipe, found.processes
    each, alone = (f" of each of {count} processes, at most", " in one process") if count > 1 else ("", "")
    sources = ", ".join(f"{count} from {source}" for source, count in recipe.parts)
    data = f"windows of {recipe.max_seq_length} tokens, {sources}"
    return "\n".join(
        [
            f"model_type {job.model.config.model_type}, method {recipe.method} ({job.method.paper})",
            f"calibration: {data}, batches of {recipe.batch_size}" if recipe.dataset else "calibration: none",
            *_shape_lines(job),
            *(f"then, on what that gives: {run.described}" for run in later),
            f"peak memory{each}: {_gigabytes(found.memory)} (imports included)",
            *_disk_lines(job, found, work_dir),
            f"time{alone}: {found.seconds:.0f} s after imports, on {job.model.device}",
            "nothing was written",
        ]
    )


def _disk_lines(job: Job, found: Forecast, work_dir: Path | None) -> list[str]:
    """What each place needs."""
    if work_dir is None:
        return [f"disk: {found.disk / 1e9:.2f} GB while it runs, in and beside {job.output}"]
    return [
        f"disk: {found.result / 1e9:.2f} GB while it runs, in and beside {job.output}",
        f"disk: {found.scratch / 1e9:.2f} GB while it runs, in {work_dir}",
    ]


def _gigabytes(memory: dict[str, int]) -> str:
    return ", ".join(f"{where} {size / 1e9:.2f} GB" for where, size in memory.items())


def _shape_lines(job: Job) -> list[str]:
    """One line per kind of tensor; the number of the block is written as *."""
    lines = ["shapes, in the largest of the splits:"] if job.plan.remark else []
    for kind in shapes_of(job):
        before = "not there" if kind["dense"] is None else kind["dense"]
        line = f"  {kind['name']}: {before} -> {kind['compressed']} {kind['dtype']}"
        lines.append(line + (f"  x {kind['count']}" if kind["count"] > 1 else ""))
    return lines


def expectation_lines(manifest: Manifest, expected: dict[str, float]) -> list[str]:
    """What a recipe says it gave, beside what it gave now: `parameters` and `perplexity` of the result."""
    found = {
        "parameters": manifest["parameters"]["compressed"],
        "perplexity": manifest["measured"]["compressed"]["perplexity"] if manifest["measured"] else None,
    }
    return [
        f"{name}: the recipe's own run gave {figure:.10g}, this one {found[name]:.10g}"
        for name, figure in expected.items()
        if found.get(name) is not None
    ]


def windows_line(windows: WindowFigures, dtype: str) -> str:
    """What a perplexity was measured on."""
    return (
        f"perplexity on {windows['text']}: {windows['windows']} windows of {windows['window']} tokens, "
        f"stride {windows['stride']}, BOS {windows['bos']}, {dtype}"
    )
