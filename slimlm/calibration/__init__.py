"""Calibration data: any text source to token windows."""

from slimlm.calibration.sample import cached, sample_windows, sampling_batch, written_for
from slimlm.calibration.sources import split_documents
from slimlm.calibration.windows import Windows, interleaved, load_windows, start_token

__all__ = [
    "Windows",
    "cached",
    "interleaved",
    "load_windows",
    "sample_windows",
    "sampling_batch",
    "split_documents",
    "start_token",
    "written_for",
]
