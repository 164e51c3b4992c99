"""What one of several ranks does in tests/test_ranks.py: everything that ranks can, written down by each."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from slimlm.deal import Deal, Parts
from slimlm.errors import UserError
from slimlm.meeting import may_speak, start_ranks
from slimlm.ranks import Lost, Ranks

BATCHES = 11


class Sums:
    """A sum of tensors [5, 3], and a count."""

    def __init__(self) -> None:
        self.held = [torch.zeros(5, 3), torch.zeros((), dtype=torch.long)]

    def tensors(self) -> list[Tensor]:
        return self.held

    def replace(self, tensors: Sequence[Tensor]) -> None:
        self.held = list(tensors)

    def add(self, batch: Tensor) -> None:
        self.held[0] += batch
        self.held[1] += 1


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, generator=generator) * 10**n for n in range(-5, BATCHES - 5)]


def added_up(deal: Deal, owner: int, whole: bool = False) -> list[Tensor] | None:
    parts = Parts(deal, Sums, whole)
    for number, batch in enumerate(deal.pick(batches())):
        parts.at(number).add(batch)
        deal.ranks.note("batches")
    total = parts.total(owner)
    return total.tensors() if total else None


def found(ranks: Ranks) -> dict[str, object]:
    """Of each operation what this rank gets."""
    rank, last = ranks.rank, ranks.size - 1
    shared = [torch.full((2,), float(rank)), torch.tensor(rank, dtype=torch.bfloat16)]
    ranks.share(shared, owner=last)
    one = torch.arange(4.0) if rank == 0 else None
    few = Deal(ranks, 2)
    return {
        "sums": added_up(Deal(ranks, BATCHES), 0),
        "sums at the last": added_up(Deal(ranks, BATCHES), last),
        "whole sums": added_up(Deal(ranks, BATCHES), 0, whole=True),
        "sums of few": added_up(few, last),
        "mine": list(Deal(ranks, BATCHES).mine),
        "owner": [Deal(ranks, BATCHES).owner(index) for index in range(BATCHES)],
        "agreed": ranks.agreed(f"of {rank}", owner=last),
        "decided": ranks.decided(lambda: f"by {rank}"),
        "gathered": ranks.gather(rank),
        "shared": shared,
        "sent": ranks.sent(one, ((4,), torch.float32), 0, last),
        "joined": ranks.joined(torch.full((rank, 2), float(rank))),
        "added": ranks.added(torch.ones(3), owner=last) if ranks.size > 1 else torch.ones(3),
        "owners": ranks.owners([1, 5, 2, 4, 3, 3]),
        "account": ranks.account(more=rank),
    }


def main(directory: Path, what: str) -> None:
    """what: `found`, or how rank 1 of several ends."""
    if what == "inside a group":
        dist.init_process_group("gloo")
    try:
        with start_ranks("cpu") as ranks:
            told: object = found(ranks)
            if ranks.rank == 1 and what == "fails":
                raise UserError("rank 1 did")
            if ranks.rank == 1 and what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.meet()
        with start_ranks("cpu") as again:
            again.meet()
    except (Lost, UserError) as error:
        rank = int(os.environ["RANK"])
        told = (type(error).__name__, str(error), rank == 1 or None)
    if what == "speaking":
        told = may_speak()
    if what == "inside a group":
        assert dist.is_initialized()  # it is the caller's
        dist.barrier()
        dist.destroy_process_group()
    torch.save(told, directory / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
