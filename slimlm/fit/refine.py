"""Refinement of a compressed block beside the dense one, by gradient descent on all of its weights at once.

The closed forms fit one linear after another, each given those before it. Adam (arXiv 1412.6980) goes on from there
with the whole block, towards the dense stream behind it:

    min sum ||block(x') - S^T x_after||^2 / ms(x_after)

x' being the compressed stream, what went wrong before is repaired as far as the block can (BRECQ, arXiv 2102.05426,
reconstructs block by block for rounding, from the dense stream). Tokens are weighed as the next norm does. Where a head
is not fitted to the dense model's predictions itself, most often since it is tied to the embedding, the last block is:
to what the head says to what it gives, in KL divergence. Windows that no fit has seen say which epoch's weights stay,
or that the closed forms do; where they are too few, those that strengths of a ridge are chosen by.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from slimlm.attention import attending_fast
from slimlm.deal import Deal, Parts, Sum, seed_of
from slimlm.device import products_in, quick_products
from slimlm.fit.beside_dense import BlockPair
from slimlm.fit.lm_head import fits_head
from slimlm.linalg.softmax import cosine
from slimlm.model.ends import divergences, head_loaded

RATE = 0.01  # of a tensor's root mean square, what a weight moves in a step at most
WARM_UP = 0.1  # of all steps
BETAS = (0.9, 0.95)
EVERY = 4  # of so many places in a window at most one is learnt from in a pass where a head reads them
PASSES = 2  # of an epoch there
FEWEST = 8192  # places of all windows that are
PATIENCE = 2  # epochs in a row that may each be no better than the one before: as the rate falls, they come back
Few = tuple[int, Tensor]  # number of one of this rank's batches, and numbers of windows in it


@dataclass(frozen=True)
class Refiner:
    """How blocks are refined.

    epochs: over the windows that do not judge. seed: of their order. keeps_zeros: whether zeros of matrices stay.
    """

    epochs: int
    seed: int
    keeps_zeros: bool = False

    def refine(self, block: BlockPair) -> None:
        """Change a block's `tensors` to what is better on the windows that judge, if anything is. The dense stream is
        behind the block."""
        if self.epochs:
            descent = _Descent(block, self)
            head = head_loaded(block.pair.dense) if descent.by_head else nullcontext()
            with head, attending_fast(block.small.model.model):
                descent.run()


class _Descent:
    """Of one block."""

    def __init__(self, block: BlockPair, how: Refiner) -> None:
        self.block, self.how = block, how
        self.pair, self.ranks = block.pair, block.pair.deal.ranks
        judging = self.pair.judging_of_all
        self.judging = judging if any(map(torch.any, judging)) else self.pair.held_of_all
        ends = all(one is one.model.blocks[-1] for one in (block.dense, block.small))
        # Other heads are fitted to predictions themselves.
        self.by_head = ends and (self.pair.small.head_is_tied or not fits_head(self.pair.dense))
        self.every = self._every() if self.by_head else 1

    def run(self) -> None:
        """Leave the best weights there were in the block's tensors."""
        before = best = latest = self._error(self.block.tensors)
        found: dict[str, Tensor] = {}
        worse, passes = 0, min(PASSES, self.every)
        with self._changing() as changed:
            adam = _Adam(list(changed.values()), self.how.keeps_zeros)
            for epoch in range(self.how.epochs):
                for number in range(epoch * passes, (epoch + 1) * passes):
                    for done, few in self._steps(number):
                        gradients = self._gradients(few, adam.changed, number)
                        adam.step(gradients, (number + done) / (self.how.epochs * passes))
                now = self._error(stored := self._stored(changed))
                worse = 0 if now < latest else worse + 1
                latest = now
                if now < best:
                    best, found = now, stored
                if worse == PATIENCE or not math.isfinite(now):
                    break
        self.ranks.share(list(found.values()))  # other processors might round otherwise
        self.block.tensors.update(found)
        self.pair.streams.figures[f"{self.block.small.index} refined"] = best / before if before else 1.0

    @contextmanager
    def _changing(self) -> Iterator[dict[str, nn.Parameter]]:
        """Inside, the compressed block has copies of its tensors, of which these are to be changed."""
        copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in self.block.tensors.items()}
        with self.block.small.placed(copies, torch.float32) as module:
            changed = {name: module.get_parameter(name) for name in copies if not self._stays(name)}
            for parameter in changed.values():
                parameter.requires_grad_(True)
            yield changed

    def _stays(self, name: str) -> bool:
        """Whether a parameter is not to be changed: what is skipped, and routers."""
        spared = self.block.dense.family.spared
        packed = {one.rpartition(".")[0] for one in spared if one.rpartition(".")[2].isdigit()}  # experts' parameters
        return name in packed or name.rpartition(".")[0] in spared

    def _stored(self, changed: Collection[str]) -> dict[str, Tensor]:
        """The changed tensors as they are to be written, linears' as [out, in]."""
        weights = self.block.small.weights()
        return {name: weights[name].to(self.block.tensors[name].dtype, copy=True).contiguous() for name in changed}

    def _steps(self, number: int) -> Iterator[tuple[float, list[Few | None]]]:
        """Steps of a pass: the share of it that is done, and a few windows of each lane that this rank has."""
        deal = self.pair.deal
        lanes = [self._few_of(lane, numbers, number) for lane, numbers in enumerate(deal.lanes)]
        count = max(map(len, lanes))
        for step, few in enumerate(zip_longest(*lanes)):
            yield step / count, [few[lane] for lane in deal.own_lanes]

    def _few_of(self, lane: int, numbers: range, order: int) -> list[Few]:
        """Windows of a lane's batches, in an order of the pass's own, as many at a time as make a batch with those of
        the other lanes."""
        judging, deal, few = self.judging, self.pair.deal, list[Few]()
        size = max(1, max(map(len, judging)) // len(deal.lanes))
        generator = torch.Generator()
        generator.manual_seed(seed_of(seed_of(seed_of(self.how.seed, self.block.dense.index), order), lane))
        for number in numbers:
            learned = (~judging[number]).nonzero().flatten()
            mixed = learned[torch.randperm(len(learned), generator=generator)]
            few += [(number - deal.mine.start, part) for part in mixed.split(size) if len(part)]
        return [few[index] for index in torch.randperm(len(few), generator=generator).tolist()]

    def _gradients(self, few: list[Few | None], changed: list[nn.Parameter], order: int) -> list[Tensor]:
        """Of the windows' losses, all ranks' lane after lane."""
        parts = Parts(Deal(self.ranks, len(self.pair.deal.lanes)), partial(Sum, changed))
        for number, windows in enumerate(few):
            part = parts.at(number)
            if windows is not None:
                with torch.enable_grad():
                    out = self._out(*windows)
                    at, places = out.detach().requires_grad_(), slice(order % self.every, None, self.every)
                    for loss in self._losses(at, *windows, places):
                        (loss / at[:, places, 0].numel()).backward()
                    part.add(torch.autograd.grad(out, changed, at.grad, allow_unused=True))
        shared = parts.shared()
        assert shared is not None
        return shared.tensors()

    def _every(self) -> int:
        """Of so many places one is to be learnt from in a pass, others in the next: the head, which reads them, is to
        cost no more than the block, if there are enough of them."""
        config, own = self.pair.dense.config, sum(tensor.numel() for tensor in self.block.tensors.values())
        time = max((tokens.shape[1] for tokens in self.pair.streams["dense"].tokens), default=1)
        places = sum(map(len, self.judging)) * time
        return max(1, min(EVERY, int(config.vocab_size * config.hidden_size) // own, places // FEWEST, time))

    def _out(self, number: int, windows: Tensor) -> Tensor:
        """What the compressed block gives for some windows of a batch: [windows, time, width], or [..., hidden] where
        the head is to read it."""
        small, stream = self.block.small, self.pair.streams["small"]
        stream.number, hidden = number, stream.hidden[number]
        call = stream.calls[number][small.index].of(windows, *hidden.shape[:2])
        with self._in_products(hidden):
            found = small.module(hidden[windows], *call.args, **call.kwargs)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return self.pair.back(out.float()) if self.by_head else out.float()

    def _in_products(self, like: Tensor) -> AbstractContextManager[None]:
        """Inside, products for gradients are in what is fastest; errors are in the model's own dtype."""
        return (quick_products if torch.is_grad_enabled() else products_in)(like.device, like.dtype)

    def _losses(self, out: Tensor, number: int, windows: Tensor, places: slice = slice(None)) -> Iterator[Tensor]:
        """What the block gives is off by in these places, summed over some tokens at a time."""
        x, out = self.pair.streams["dense"].hidden[number][windows][:, places], out[:, places]
        if self.by_head:
            yield from divergences(self.pair.dense, x, out, partial(self._in_products, x))
            return
        wanted, weight = self.pair.wanted(x.float())
        error = out - wanted
        if self.block.small.family.centred:  # norms do not see the mean
            error = error - error.mean(-1, keepdim=True)
        yield (error.square().mean(-1) * weight).sum()

    def _error(self, tensors: dict[str, Tensor]) -> float:
        """Of a token of the windows that judge, with these tensors."""
        own = list[tuple[float, int]]()
        with self.block.small.placed(tensors):
            for number, judges in enumerate(self.pair.deal.pick(self.judging)):
                if judges.any():
                    out = self._out(number, chosen := judges.nonzero().flatten())
                    own.append((sum(map(float, self._losses(out, number, chosen))), out[..., 0].numel()))
        return self.ranks.mean(own)


class _Adam:
    """Adam on parameters whose zeros may have to stay, each at a rate of its own size."""

    def __init__(self, changed: list[nn.Parameter], keeps_zeros: bool) -> None:
        self.changed = changed
        self.masks = [parameter != 0 if keeps_zeros and parameter.dim() > 1 else None for parameter in changed]
        self.rates = [RATE * float(parameter.detach().square().mean().sqrt()) for parameter in changed]
        self.adam = torch.optim.Adam([{"params": [parameter]} for parameter in changed], betas=BETAS, fused=True)

    def step(self, gradients: list[Tensor], done: float) -> None:
        """Use these up. done: of all steps, the share before this one."""
        rate = min(1.0, (done + 1e-3) / WARM_UP) * cosine(done)
        for group, own in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * own
        for parameter, gradient, mask in zip(self.changed, gradients, self.masks, strict=True):
            parameter.grad = gradient if mask is None else gradient.mul_(mask)
        self.adam.step()
