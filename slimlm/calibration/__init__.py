"""Calibration data: any text source to token windows."""

from slimlm.calibration.sample import SAMPLING_BATCH, sample_windows
from slimlm.calibration.sources import SELF, split_documents
from slimlm.calibration.windows import Windows, load_windows, start_token

__all__ = ["SAMPLING_BATCH", "SELF", "Windows", "load_windows", "sample_windows", "split_documents", "start_token"]
