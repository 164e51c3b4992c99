"""Calibration data: any text source to token windows."""

from slimlm.calibration.sample import SAMPLING_BATCH, remembered, sample_windows, written_for
from slimlm.calibration.sources import split_documents
from slimlm.calibration.windows import Windows, interleaved, load_windows, start_token

__all__ = [
    "SAMPLING_BATCH",
    "Windows",
    "interleaved",
    "load_windows",
    "remembered",
    "sample_windows",
    "split_documents",
    "start_token",
    "written_for",
]
