"""Calibration data: any text source to token windows."""

from slimlm.calibration.sample import (
    SAMPLING_BATCH,
    go_on,
    remembered,
    sample_windows,
    sampling_batch,
    side_by_side,
    written_for,
)
from slimlm.calibration.sources import STANDARD_INPUT, is_of_hub, local_documents, local_files, split_documents
from slimlm.calibration.windows import Windows, interleaved, load_windows, require_known, say_if_few, start_token

__all__ = [
    "SAMPLING_BATCH",
    "STANDARD_INPUT",
    "Windows",
    "go_on",
    "interleaved",
    "is_of_hub",
    "load_windows",
    "local_documents",
    "local_files",
    "remembered",
    "require_known",
    "sample_windows",
    "sampling_batch",
    "say_if_few",
    "side_by_side",
    "split_documents",
    "start_token",
    "written_for",
]
