"""How the processes of a run find each other, and part.

torchrun, accelerate launch or slimlm itself started them, and the environment says how many they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from slimlm.device import pick_device
from slimlm.errors import UserError, one_line
from slimlm.ranks import Ranks
from slimlm.started import local_rank, local_size, own_rank, world_size

MEETING = timedelta(minutes=10)  # to wait for all to begin
PATIENCE = timedelta(days=7)  # one may solve for hours while the others wait; that one died shows at once
_groups = count()


@contextmanager
def start_ranks(device: str) -> Iterator[Ranks]:
    """This process's place among those that torchrun, accelerate or slimlm itself started, alone where nobody did; at
    the end all wait for each other and part.

    device: as `--device`; several processes of a machine have a GPU each, or share those that there are. A group that
    the caller has already is used, and left to the caller. Raises UserError for a device that cannot be, and where the
    others cannot be reached.
    """
    is_ours = world_size() > 1 and not _has_group()
    if is_ours:
        _join_group()
    if not _has_group() or dist.get_world_size() == 1:
        yield Ranks(device=pick_device(device))
        return
    ranks = _placed(device, is_ours)
    try:
        yield ranks
        ranks.meet()  # one that left early would look lost to those that still read from it
    except BaseException:
        if ranks.swift is None:  # NCCL's end would wait for the others; gloo's tells them
            _part(ranks, is_ours)
        raise
    _part(ranks, is_ours)


def may_speak() -> bool:
    """Whether it is up to this process to say why the run ends: the first that asks may, of all that have met; of
    those that have not, one on each machine."""
    if world_size() == 1:
        return True
    if not _meeting_point.cache_info().currsize:
        return local_rank() == 0
    try:
        return bool(_meeting_point().add("slimlm/said", 1) == 1)
    except RuntimeError:  # whoever kept count is gone: rather twice than never
        return True


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


@cache
def _meeting_point() -> Store:
    """What all ranks can read and write; there is one, however many groups come and go."""
    found: Store = next(rendezvous("env://", timeout=MEETING))[0]
    return found


def _join_group() -> None:
    """Raises UserError where the others cannot be reached."""
    try:
        store = PrefixStore(f"slimlm/{next(_groups)}", _meeting_point())
        dist.init_process_group("gloo", store=store, rank=own_rank(), world_size=world_size(), timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {world_size()} processes of this run do not find each other: {one_line(error)}"
        ) from error


def _placed(device: str, is_ours: bool) -> Ranks:
    """Raises UserError."""
    if dist.get_world_size() != world_size():
        raise UserError("a group of processes that no launcher made cannot be used: start them with torchrun")
    plain = dist.group.WORLD if is_ours else dist.new_group(backend="gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), _own_device(device), plain)
    kinds = ranks.gather(ranks.device.type)
    if len(set(kinds)) > 1:
        raise UserError(f"the processes of this run compute on {', '.join(kinds)}: give --device cpu, or GPUs to all")
    if kinds[0] != "cpu":
        ranks.direct = all(ranks.gather(local_size() <= torch.cuda.device_count()))  # NCCL wants a GPU for each
        ranks.swift = dist.new_group(backend="nccl", timeout=PATIENCE) if ranks.direct else None
    return ranks


def _own_device(device: str) -> torch.device:
    """Raises UserError."""
    if device.startswith("cuda:"):
        raise UserError(f"--device {device} is one GPU for several processes: --device cuda gives each its own")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return pick_device(f"cuda:{local_rank() % max(1, torch.cuda.device_count())}")
    return pick_device(device)


def _part(ranks: Ranks, is_ours: bool) -> None:
    if is_ours:
        dist.destroy_process_group()
        return
    for group in (ranks.swift, ranks.plain):
        if group is not None and group is not dist.group.WORLD:
            dist.destroy_process_group(group)
