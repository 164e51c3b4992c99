"""`slimlm.json`: what was done to a checkpoint, with what, and what it cost."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from slimlm.checkpoint.disk import write_whole
from slimlm.errors import UserError

MANIFEST_NAME = "slimlm.json"
VERSIONED = ("slimlm", "torch", "transformers", "safetensors", "tokenizers", "datasets", "lm_eval")

Manifest = dict[str, Any]


def versions() -> dict[str, str]:
    """Of Python and of every package whose version can change a figure."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def stages_of(manifest: Manifest) -> list[Manifest]:
    """What there is to say of each of a recipe's runs, the last being the manifest itself."""
    return [*manifest.get("stages", []), manifest]


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
