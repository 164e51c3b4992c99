"""`slimlm.json`: what was done to a checkpoint, with what, and what it cost."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from slimlm.checkpoint.disk import write_whole
from slimlm.errors import UserError

MANIFEST_NAME = "slimlm.json"
VERSIONED = ("slimlm", "torch", "transformers", "safetensors", "tokenizers", "datasets", "lm_eval")


class Origin(TypedDict):
    """The dense model. card: what of its own card holds for the result; sha256: of its files, by name."""

    name: str
    origin: Literal["bundled", "directory", "hub"]
    path: str | None
    revision: str | None
    model_type: str
    card: dict[str, str | list[str]]
    sha256: dict[str, str]


class Sparsity(TypedDict):
    """Shares, `requested` and `achieved` of what `of` says."""

    requested: float
    of: str
    achieved: float
    parameters_removed: float
    zeros_in_pruned_matrices: float | None


class Sizes(TypedDict):
    dense: int
    compressed: int


class Skipped(TypedDict):
    modules: int
    weights: int


class Part(TypedDict):
    """Windows of one source. documents: that were read to cut them from."""

    source: str
    documents: int
    windows: int
    tokens: int
    sha256: str


class Calibration(TypedDict):
    """parts: by source, where there are several and where not."""

    source: str
    windows: int
    window: int
    bos: int | None
    seed: int
    sha256: str
    tokens_wanted: int
    parts: list[Part]


class Side(TypedDict):
    """One model on the test windows."""

    perplexity: float
    log_perplexity: float
    log_perplexity_stderr: float
    dtype: str


class WindowFigures(TypedDict):
    """Of windows to measure on: the text's name, how many, of how many tokens, how far apart."""

    text: str
    windows: int
    window: int
    stride: int
    bos: int | None
    predicted_tokens: int


class Measured(WindowFigures):
    """also_calibrated: of the documents measured on, those of which the calibration text has half or more."""

    documents: int
    also_calibrated: int
    dense: Side
    compressed: Side


class BlockError(TypedDict):
    block: str
    relative_error: float


class RunFigures(TypedDict):
    """Of the process that finished the run. resumed_anyway: for each process that went on nevertheless, what differed,
    as it was and is."""

    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    memory_before_bytes: int
    resumed: bool
    resumed_anyway: list[dict[str, list[Any]]]
    work_bytes: int
    scratch_bytes: int
    machine: str
    ranks: list[dict[str, Any]]
    compute_dtype: str


class Stage(TypedDict):
    """What there is to say of each of several runs. recipe: in a file's form. method: figures of the method's own."""

    recipe: dict[str, Any]
    sparsity: Sparsity
    bytes: Sizes
    changes: dict[str, list[Any]]
    method: dict[str, Any]
    measured: Measured | None
    run: RunFigures


class Manifest(Stage):
    """What there is to say of a result. stages: the runs before the last, where there are several."""

    model: Origin
    paper: str
    needs_remote_code: bool
    parameters: Sizes
    skipped: Skipped
    calibration: Calibration | None
    blocks: list[BlockError]
    versions: dict[str, str]
    fingerprint: dict[str, Any]
    stages: NotRequired[list[Stage]]


def versions() -> dict[str, str]:
    """Of Python and of every package whose version can change a figure."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def stages_of(manifest: Manifest) -> list[Stage]:
    """What there is to say of each of a recipe's runs, the last being the manifest itself."""
    return [*manifest.get("stages", []), manifest]


def steps_in(manifest: Manifest | None) -> list[dict[str, Any]]:
    """The settings of each step of all its runs; none of no manifest."""
    return [step for stage in stages_of(manifest) for step in stage["recipe"]["steps"]] if manifest else []


def took(manifest: Manifest) -> tuple[float, dict[str, int]]:
    """Seconds and peak memory ("host" and where there is one "gpu", in bytes) of all the runs of a recipe."""
    peaks: dict[str, int] = {}
    seconds = 0.0
    for run in (stage["run"] for stage in stages_of(manifest)):
        seconds += run["seconds"]["total"]
        for where, size in run["peak_memory_bytes"].items():
            peaks[where] = max(size, peaks.get(where, 0))
    return seconds, peaks


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Raises RunFailure on a full disk."""
    write_whole(directory / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a checkpoint slimlm wrote; None for any other. Raises UserError for one that is not JSON."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest: Manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not a manifest slimlm wrote")
    return manifest
