"""Calibration data: any text source to token windows."""

from slimlm.calibration.sample import SAMPLING_BATCH, go_on, remembered, sample_windows, side_by_side, written_for
from slimlm.calibration.sources import split_documents
from slimlm.calibration.windows import Windows, interleaved, load_windows, start_token

__all__ = [
    "SAMPLING_BATCH",
    "Windows",
    "go_on",
    "interleaved",
    "load_windows",
    "remembered",
    "sample_windows",
    "side_by_side",
    "split_documents",
    "start_token",
    "written_for",
]
