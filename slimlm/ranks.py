"""One process or several that share a run, and what they tell each other.

torchrun, accelerate launch or slimlm start them, torch.distributed carries it: NCCL between GPUs, gloo between CPUs and
for plain objects. Alone, every operation gives back what it got. Nothing here knows a model.
"""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from slimlm.errors import SlimlmError, one_line
from slimlm.plain import Json
from slimlm.started import LOST

K = TypeVar("K")
T = TypeVar("T")


class Lost(SlimlmError):
    """Another rank is gone, and says itself why, unless it was killed."""

    exit_code = LOST


@dataclass(eq=False)
class Ranks:
    """Number `rank` of `size` processes. device: where it computes. first: whether it alone reports and decides.

    plain: carries objects and tensors on a CPU; None alone. direct: whether the device's tensors travel as they are.
    writes: whether it writes the result: the first does, and the first of those that do not see the first's disk.
    swift: what carries these then, where it is not `plain`. waited, moved: seconds and bytes of all that was exchanged.
    did: what this one did of the work, by name.
    """

    rank: int = 0
    size: int = 1
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

    def chained(self, own: Sequence[T]) -> list[T]:
        """What each has of several things, one rank's behind another's, for all."""
        return list(chain.from_iterable(self.gather(own)))

    def mean(self, own: Sequence[tuple[float, int]]) -> float:
        """Of everybody's sums, each over so many things; 0 of none."""
        found = self.chained(own)
        return sum(total for total, _ in found) / max(1, sum(count for _, count in found))

    def merged(self, own: Mapping[K, T]) -> dict[K, T]:
        """What each has by name, for all."""
        return dict(chain.from_iterable(found.items() for found in self.gather(own)))

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
