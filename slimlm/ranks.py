"""One process or several that share a run, and what they tell each other.

torchrun, accelerate launch or slimlm start them, torch.distributed carries it: NCCL between GPUs, gloo between CPUs and
for plain objects. Alone, every operation gives back what it got. Nothing here knows a model.
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from slimlm.device import pick_device
from slimlm.errors import SlimlmError, UserError, one_line
from slimlm.plain import Json
from slimlm.started import LOST, local_rank, local_size, own_rank, world_size

MEETING = timedelta(minutes=10)  # to wait for all to begin
PATIENCE = timedelta(days=7)  # one may solve for hours while the others wait; that one died shows at once
_groups = count()
T = TypeVar("T")


class Lost(SlimlmError):
    """Another rank is gone, and says itself why, unless it was killed."""

    exit_code = LOST


@dataclass(eq=False)
class Ranks:
    """Number `rank` of `size` processes; `local` on its machine. device: where it computes. first: whether it alone
    writes, reports and decides.

    plain: carries objects and tensors on a CPU; None alone. direct: whether the device's tensors travel as they are.
    writes: whether it writes the result: the first does, and the first of those that do not see the first's disk.
    swift: what carries these then, where it is not `plain`. waited, moved: seconds and bytes of all that was exchanged.
    did: what this one did of the work, by name.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    plain: Any = None
    direct: bool = True
    writes: bool = True
    swift: Any = None
    waited: float = 0.0
    moved: int = 0
    did: dict[str, int] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether it decides."""
        return self.rank == 0

    def begin(self) -> None:
        """Count anew what this rank does."""
        self.waited, self.moved, self.did = 0.0, 0, {}

    @property
    def host(self) -> str:
        """The machine's name."""
        return platform.node()

    def note(self, what: str, count: int = 1) -> None:
        """That this rank did some more of something."""
        self.did[what] = self.did.get(what, 0) + count

    def agreed(self, value: T, owner: int = 0) -> T:
        """What the owner has, for all."""
        if self.size == 1:
            return value
        box = [value]
        with self._exchange():
            dist.broadcast_object_list(box, src=owner, group=self.plain)
        return box[0]

    def decided(self, decide: Callable[[], T]) -> T:
        """What the first rank finds, for all; the others do not look."""
        (found,) = self.agreed([decide()] if self.first else [])
        return found

    def gather(self, value: T) -> list[T]:
        """What each has, in order, for all."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(found, value, group=self.plain)
        return found

    def meet(self) -> None:
        """Wait for all."""
        self.gather(None)

    def once(self, found: Tensor | None, owner: int = 0) -> Tensor:
        """What the owner found, [...], for all; the others give nothing."""
        if self.size > 1:
            ((shape, dtype),) = self.agreed([] if found is None else [(tuple(found.shape), found.dtype)], owner)
            found = found if found is not None else torch.empty(shape, dtype=dtype, device=self.device)
            self.share([found], owner)
        assert found is not None
        return found

    def share(self, tensors: Sequence[Tensor], owner: int = 0) -> None:
        """Have the owner's numbers in everybody's tensors, [...] each, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            travelling = self._packed(tensor)
            with self._exchange(travelling):
                dist.broadcast(travelling, src=owner, group=self._group)
            if self.rank != owner:
                tensor.copy_(travelling)

    def sent(self, tensor: Tensor | None, like: tuple[Sequence[int], torch.dtype], source: int, target: int) -> Tensor:
        """A tensor [...] of this shape and dtype at `target` that `source` has, the same rank or another; others get an
        empty one."""
        shape, dtype = like
        if self.rank == source == target:
            assert tensor is not None
            return tensor
        if self.rank == source:
            assert tensor is not None
            travelling = self._packed(tensor)
            with self._exchange(travelling):
                dist.send(travelling, dst=target, group=self._group)
        if self.rank != target:
            return torch.empty(0, dtype=dtype, device=self.device)
        travelling = torch.empty(tuple(shape), dtype=dtype, device=self.device if self.direct else "cpu")
        with self._exchange(travelling):
            dist.recv(travelling, src=source, group=self._group)
        return travelling.to(self.device)

    def joined(self, rows: Tensor) -> Tensor:
        """Everybody's rows, [own rows, ...] each, in order of the ranks, for all."""
        if self.size == 1:
            return rows
        parts = []
        for owner, (shape, dtype) in enumerate(self.gather((tuple(rows.shape), rows.dtype))):
            if shape[0]:
                part = rows if owner == self.rank else rows.new_empty(shape, dtype=dtype)
                self.share([part], owner)
                parts.append(part)
        return torch.cat(parts) if parts else rows

    def added(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """The sum of everybody's tensors, of any shape, at the owner, in whatever order is fastest. Used up."""
        if self.size == 1:
            return tensor
        travelling = self._packed(tensor)
        with self._exchange(travelling):
            dist.reduce(travelling, dst=owner, group=self._group)
        return travelling.to(self.device)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Which rank does each of several pieces of work, the dearest dealt out first."""
        load, owner = [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
            owner[index] = min(range(self.size), key=lambda rank: load[rank])
            load[owner[index]] += costs[index]
        return owner

    @property
    def _group(self) -> Any:
        return self.plain if self.swift is None else self.swift

    def _packed(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().contiguous()
        return tensor.to(self.device if self.direct else "cpu")

    @contextmanager
    def _exchange(self, *tensors: Tensor) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch.distributed knows no other; its subclasses tell nothing more
            raise Lost(f"rank {self.rank} lost contact with the others: {one_line(error)}") from error
        self.waited += time.perf_counter() - start
        self.moved += sum(tensor.nbytes for tensor in tensors)

    def account(self, **more: Json) -> list[dict[str, Json]]:
        """Of every rank: where it ran, what it did, how long it waited for others, what it exchanged."""
        own: dict[str, Json] = {
            "rank": self.rank,
            "host": self.host,
            "device": str(self.device),
            **self.did,
            "seconds_exchanging": round(self.waited, 3),
            "bytes_exchanged": self.moved,
            **more,
        }
        return self.gather(own)


ALONE = Ranks()


@contextmanager
def start_ranks(device: str = "auto") -> Iterator[Ranks]:
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
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), local_rank(), _own_device(device), plain)
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
