"""The machine: which device to use, how much memory was."""

import os
import platform
import resource
import sys

import torch

from slimlm.errors import UserError, one_line


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU. Raises UserError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("meta"):
        raise UserError("device 'meta' holds no numbers: choose cpu or cuda")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r} is not available: {one_line(error)}") from error
    return chosen


def peak_memory() -> dict[str, int]:
    """Bytes: this process's peak resident memory, and the GPU's where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def machine(device: torch.device) -> str:
    """One line: processor, threads, and the GPU in use."""
    host = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device)}; {host}" if device.type == "cuda" else host
