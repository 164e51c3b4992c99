"""The machine: which device to use, how much memory was."""

import ctypes
import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path

import psutil
import torch

from slimlm.errors import UserError, one_line
from slimlm.started import world_size

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # glibc, malloc.h
LARGE = 1 / 64  # of all memory
LEAST_RETURNED = 1024 * 1024  # bytes of a freed block that a large model is to leave to others
MOST_KEPT = 32 * 1024 * 1024  # bytes of a freed block that glibc keeps
MOST_MAPPED = 65536  # blocks with pages of their own, as many as glibc has unless told otherwise
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def check_process() -> None:
    """For what works in one process only. Raises UserError in one of several, and as `check_precision` does."""
    if world_size() > 1:
        raise UserError(
            f"WORLD_SIZE is {world_size()}, and this works in one process: start it without torchrun, accelerate "
            "launch or the like, or unset WORLD_SIZE"
        )
    check_precision()


def check_precision() -> None:
    """Raises UserError in a process whose float32 is not float32."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set half through torch's old settings and half through its new ones
        precision = "unclear"
    if precision != "highest":
        raise UserError(
            f"torch's float32 matmul precision is {precision!r}, too coarse for slimlm's sums: "
            'call torch.set_float32_matmul_precision("highest") first'
        )


def pick_device(device: str) -> torch.device:
    """`auto` is torch's current GPU, or the CPU; a GPU becomes the current one of this thread.

    Raises UserError for a device that is not there, or cannot compute in float64.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    kind = device.partition(":")[0]
    if kind == "meta":
        raise UserError("device 'meta' holds no numbers: choose cpu or cuda")
    if kind == "mps":
        raise UserError(f"device {device!r} has no float64, in which slimlm sums: choose cpu")
    try:
        chosen = torch.device(device)
        torch.ones(1, device=chosen, dtype=torch.float64).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(f"device {device!r} is not available: {one_line(error)}") from error
    if chosen.type == "cuda":  # kernels of other libraries run on the current one, whatever holds their operands
        chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    return chosen


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: this process's peak resident memory, and the GPU's if that is where it computes."""
    peak = {"host": _peak_resident()}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def _peak_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows keeps count elsewhere
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def placement(device: torch.device) -> torch.device | None:
    """The `device_map` that has transformers load a whole model there at once, and not into this process first."""
    return None if device.type == "cpu" else device


def forget_peak(device: torch.device) -> None:
    """Count a GPU's peak from now on; a process's cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_name(device: torch.device) -> str:
    """What decides how sums round: the kind of GPU, else the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def rounding(device: torch.device) -> dict[str, str | int]:
    """What of this machine decides how sums round."""
    found: dict[str, str | int] = {"device": device_name(device), "precision": torch.get_float32_matmul_precision()}
    if device.type != "cuda":
        found |= {
            "processor": _processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    return found


@cache
def _processor(what: str = "model name") -> str:
    """The kind of processor, by which BLAS libraries choose their kernels, or what else Linux says of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(what)]
    return named[0] if named else platform.processor() or platform.machine()


def product_dtype(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.dtype:
    """What products are made in where their rounding does not decide, sums in fp32: the dtype that all else is in, or
    bf16 where a CPU has instructions for it, in a quarter to half of the time."""
    fast = device.type == "cpu" and {"avx512_bf16", "amx_bf16"} & {*_processor("flags").split()}
    return torch.bfloat16 if fast else dtype


def training_dtype(device: torch.device) -> torch.dtype:
    """What products are made in while a whole model is trained, its masters in fp32: bf16 where there are instructions
    for it."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return product_dtype(device)


def products_in(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Inside, products are made in a dtype of fewer bytes than fp32's, where it is one."""
    found: AbstractContextManager[None] = torch.autocast(device.type, dtype) if dtype.itemsize < 4 else nullcontext()
    return found


def quick_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Inside, products are made in `product_dtype`."""
    return products_in(device, product_dtype(device, dtype))


def available_memory(device: torch.device) -> dict[str, int]:
    """Bytes that a run could still take."""
    available = {"host": min(int(psutil.virtual_memory().available), _left_in_container())}
    if device.type == "cuda":
        available["gpu"] = int(torch.cuda.mem_get_info(device)[0])
    return available


def memory_size(device: torch.device) -> int:
    """Bytes there are where it computes, taken or free, as far as this process may have them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    sizes = [int(psutil.virtual_memory().total)]
    for limit, *_ in CGROUP_FILES:
        with suppress(OSError, ValueError):  # no such version here, or "max"
            sizes.append(int((CGROUPS / limit).read_text()))
    return min(sizes)


def _left_in_container(root: Path = CGROUPS) -> int:
    """Bytes this process's control group (version 2 or 1) may still take, if there is a limit; else a huge number.

    Cached file pages the kernel would give up first do not count as taken.
    """
    for limit, used, statistics in CGROUP_FILES:
        try:
            allowed = int((root / limit).read_text())
            rows = dict(line.split() for line in (root / statistics).read_text().splitlines())
            cached = int(rows.get("total_inactive_file") or rows["inactive_file"])
            return max(0, allowed - int((root / used).read_text()) + cached)
        except (OSError, ValueError, KeyError):  # no such version here, or "max"
            continue
    return sys.maxsize


def return_memory_at_once(above: int = LEAST_RETURNED) -> None:
    """Let glibc give every block of more bytes back to the system when it is freed, and threads share what is smaller.

    It would keep up to 32 MB pieces for reuse, which for weights that come and go in many sizes means hundreds of
    megabytes of holes. Costs page faults, so large models give back more. Other C libraries are left as they are.
    """
    if libc := _glibc():
        libc.mallopt(M_MMAP_MAX, MOST_MAPPED)
        libc.mallopt(M_MMAP_THRESHOLD, above)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * above)
        libc.mallopt(M_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Let glibc keep all that is freed, where the same sizes come again and again and the system would clear every page
    of the largest each time. Sizes that grow leave holes."""
    if libc := _glibc():
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def is_large(checkpoint: Path) -> bool:
    """Whether a directory's weights are so many bytes that what is free is worth more than page faults."""
    files = filter(Path.is_file, checkpoint.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) > LARGE * memory_size(torch.device("cpu"))


def return_freed_memory() -> None:
    """Have glibc give back what is free between pieces in use: the holes of every block would add up with depth."""
    if libc := _glibc():
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None


def machine(device: torch.device) -> str:
    """One line: processor, threads, and the GPU in use."""
    host = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{device_name(device)}; {host}" if device.type == "cuda" else host
