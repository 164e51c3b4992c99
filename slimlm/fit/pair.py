"""A dense model and the compressed one beside it, and sums over what goes through both.

What a fit needs are sums over tokens: activations are computed again, not kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from slimlm.deal import Deal, Parts
from slimlm.linalg.gram import is_wide
from slimlm.linalg.regression import Add, Regression, Rows, held_out, judging, keeps_rows
from slimlm.model.hidden import HiddenStates
from slimlm.model.rotation import is_own
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import Streams
from slimlm.ranks import Ranks

AddOf = Callable[[int], Add]  # by the number of a batch


@dataclass
class Pair:
    """The dense model and the compressed one, and their `streams`, whose figures have the strengths of the ridge by
    linear or norm. basis: [hidden, width], fp32.

    between: for the dense stream behind a writer, which the next norm in the block reads. judges: whether some windows
    are kept from regressions, to judge by what comes after. dtype: to write in; as the compressed model has its
    weights.
    """

    dense: StreamedModel
    small: StreamedModel
    basis: Tensor
    streams: Streams
    between: HiddenStates
    dtype: str = "auto"
    judges: bool = False

    @property
    def deal(self) -> Deal:
        """Of the batches."""
        return self.streams["dense"].deal

    @cached_property
    def held_of_all(self) -> list[Tensor]:
        """Per batch, which of its windows are held out: [windows] bool, on the CPU."""
        return self._by_batch(held_out)

    @cached_property
    def held(self) -> list[Tensor]:
        """The same of this rank's: [windows] bool."""
        return [held.to(self.dense.device) for held in self.deal.pick(self.held_of_all)]

    @cached_property
    def judging_of_all(self) -> list[Tensor]:
        """Per batch, which of its windows [windows] bool, on the CPU, no regression sees (but a mixture's experts do);
        of too few, none."""
        return self._by_batch(lambda count: judging(count) & self.judges)

    @cached_property
    def held_and_seen(self) -> list[tuple[Tensor, Tensor | slice]]:
        """Per batch of this rank's, which windows are held out, [windows] bool, and which regressions see, or all."""
        judging = self.deal.pick(self.judging_of_all)
        seen = (~batch.to(self.dense.device) if batch.any() else slice(None) for batch in judging)
        return list(zip(self.held, seen, strict=True))

    def _by_batch(self, chosen: Callable[[int], Tensor]) -> list[Tensor]:
        counts = self.deal.ranks.chained([len(batch) for batch in self.streams["dense"].tokens])
        return list(chosen(sum(counts)).split(counts))

    def regression(self, inputs: int, outputs: int, show: Callable[[AddOf], None]) -> Regression:
        """What `show` gives to functions like `Regression.add`, asked for by the number of a batch: of all ranks for
        the first, and nothing for the others."""
        ranks = self.deal.ranks

        def again(add: Add, into: Sequence[Tensor]) -> None:
            show(lambda number: add)
            for tensor in into:
                tensor.copy_(ranks.added(tensor))

        empty = partial(Regression.of, inputs, outputs, self.basis.device, ranks.size)
        parts = Parts(self.deal, empty, whole=is_wide(inputs) or keeps_rows(inputs))
        show(lambda number: parts.at(number).add)
        own = [pair for part in parts.parts.values() if isinstance(part.held, Rows) for pair in part.held.parts]
        data = parts.total() or empty()
        data.again = again
        if isinstance(data.held, Rows) and ranks.size > 1:
            data.held.parts = _joined(own, (inputs, outputs), ranks)
        return data

    @cached_property
    def _stays(self) -> bool:
        return is_own(self.basis)

    def into(self, x: Tensor) -> Tensor:
        """The dense stream x: [..., hidden] in the basis: [..., width]."""
        return x if self._stays else x @ self.basis

    def back(self, y: Tensor) -> Tensor:
        """The compressed stream y: [..., width] out of the basis: [..., hidden]."""
        return y if self._stays else y @ self.basis.T

    def wanted(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The dense stream [..., hidden] in the basis, and the square of what its next norm multiplies it by: [...]."""
        centred = stream - stream.mean(-1, keepdim=True) if self.small.family.centred else stream
        return self.into(stream), 1 / (centred.square().mean(-1) + self.dense.norm_eps).clamp_min(1e-30)


def _joined(own: list[tuple[Tensor, Tensor]], widths: tuple[int, int], ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
    """Tokens x: [tokens, in] and y: [tokens, out] of all ranks. widths: in and out."""
    x, y = (
        torch.cat([pair[side] for pair in own]) if own else torch.zeros(0, width, device=ranks.device)
        for side, width in enumerate(widths)
    )
    return [(ranks.joined(x), ranks.joined(y))]
