"""Gradients of the loss along the residual stream and at the linears: one sweep forward, and one back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from slimlm.deal import Deal, Parts, seed_of
from slimlm.linalg.draws import IGNORED, slopes_of, slopes_of_drawn
from slimlm.linalg.gram import Gram, is_wide
from slimlm.model.block import Block
from slimlm.model.ends import differentiable_logits, embed
from slimlm.model.hidden import HiddenStates, Scratch
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel
from slimlm.ranks import ALONE, Ranks

TOKENS = 16_384
Labels = Literal["model", "text"]
Seen = dict[str, tuple[Tensor, Tensor]]  # by linear or norm: its input and its output


@dataclass(frozen=True)
class Losses:
    """Of which tokens gradients are taken. batches: [batch, time] each. labels: `model` draws the tokens to predict
    from the model's own predictions (the true Fisher information), `text` takes the next tokens (the empirical one).
    ranks: to which the batches are dealt out; each batch's draws have a seed of their own."""

    batches: Sequence[Tensor]
    seed: int
    labels: Labels = "model"
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Walks:
    """Two walks over a model's blocks, and where every block's input waits between them."""

    forward: Iterable[Block]
    back: Iterable[Block]
    scratch: Scratch


def swept_windows(length: int, blocks: int) -> int:
    """Windows' worth of hidden states that a sweep over windows of so many tokens leaves on disk: every block's input,
    which do not come in pairs."""
    return (TOKENS // length + 1) * (blocks + 2) // 2


def windows_to_sweep(batches: Sequence[Tensor], most: int | None = None) -> list[Tensor]:
    """The first windows, up to TOKENS tokens and `most` windows of them, in batches as before: [batch, time] each."""
    windows = torch.cat(list(batches))
    count = max(1, TOKENS // windows.shape[1])
    return list(windows[: count if most is None else min(count, most)].split(len(batches[0])))


def gradient_covariance(model: StreamedModel, losses: Losses, walks: Walks) -> Tensor:
    """Sum over all norms and tokens of `g g^T`: [hidden, hidden] fp64, g the gradient of the loss at the norm's input
    times what the norm divides by, so that it goes with the normalised stream.

    That is the gradient of the whole stream, in what the norm passes on and in the shortcut past it: what the loss
    feels of a direction from there on. Early directions that only the shortcut carries thus count at every norm.

    The loss is that of tokens drawn from the model's own predictions, which makes this the true Fisher information of
    the stream (Kunstner et al., arXiv 1905.12558, section 2).
    """
    hidden = model.config.hidden_size
    deal, make = Deal(losses.ranks, len(losses.batches)), partial(Gram, hidden, model.device, torch.float64)
    parts = Parts(deal, make, whole=is_wide(hidden), again=True)
    scaled = partial(_scaled, eps=model.norm_eps, centred=model.family.centred)
    names = [norm.name for norm in model.family.norms]

    def at_end(number: int, gradient: Tensor, hidden: Tensor) -> None:
        parts.at(number).add(scaled(gradient, hidden))

    for _, batches in sweep(model, losses, walks, lambda block: names, 0, at_end):
        for number, seen in batches:
            for at, _ in seen.values():
                assert at.grad is not None
                parts.at(number).add(scaled(at.grad, at.detach()))
    return (parts.shared() or make()).matrix


def sweep(
    model: StreamedModel,
    losses: Losses,
    walks: Walks,
    names: Callable[[Block], Sequence[str]],
    side: Literal[0, 1],
    at_end: Callable[[int, Tensor, Tensor], None] = lambda number, gradient, hidden: None,
) -> Iterator[tuple[Block, Iterator[tuple[int, Seen]]]]:
    """Every block from the last to the first, and for every batch of this rank its number and the inputs and outputs of
    the block's modules and matrices of these names, with the gradient of the summed loss on one of them.

    side: where the gradient is wanted: 0 for the input, 1 for the output. at_end: shown each batch's number, gradient
    and states behind the last block: [batch, time, hidden].
    """
    stream = embed(model, losses.batches, walks.scratch.hidden("input-0"), losses.ranks)
    inputs = [stream.hidden]
    for block in walks.forward:
        inputs.append(walks.scratch.hidden(f"input-{block.index + 1}"))
        with model.quick_products():
            for _, after in block.outputs(stream):
                inputs[-1].append(after)
        stream.hidden = inputs[-1]
    gradients = walks.scratch.hidden("gradients")
    for number, gradient in enumerate(_at_the_head(model, stream, losses)):
        at_end(number, gradient, stream.hidden[number])
        gradients.append(gradient)
    for block in walks.back:
        stream.hidden = inputs[block.index]
        yield block, _backwards(block, stream, gradients, names(block), side)
    walks.scratch.clear()


def _backwards(
    block: Block, stream: Stream, gradients: HiddenStates, names: Sequence[str], side: Literal[0, 1]
) -> Iterator[tuple[int, Seen]]:
    """Gradients at the block's output give way to those at its input."""
    for number, hidden in enumerate(stream.hidden):
        hidden.requires_grad_()
        seen: Seen = {}
        watching = block.watched(names, partial(_retain, seen=seen, side=side))
        with torch.enable_grad(), watching, block.model.quick_products():
            out = block.run(hidden, stream.calls[number][block.index])
        out.backward(gradients[number])
        yield number, seen
        seen.clear()  # whoever got them has them no longer than the next batch takes to come
        assert hidden.grad is not None
        gradients.replace(number, hidden.grad)
    gradients.turn()


def _scaled(gradient: Tensor, at: Tensor, eps: float, centred: bool) -> Tensor:
    """The gradient at a norm's input [..., hidden], times what the norm divides by."""
    at = at.float()
    at = at - at.mean(-1, keepdim=True) if centred else at
    return gradient.float() * (at.square().mean(-1, keepdim=True) + eps).sqrt()


def _at_the_head(model: StreamedModel, stream: Stream, losses: Losses) -> Iterator[Tensor]:
    """Per batch, the gradient [batch, time, hidden] of the summed loss at what leaves the last block."""
    generator = torch.Generator(model.device)
    parts: list[Tensor] = []
    for number, part, logits in differentiable_logits(model, stream):
        tokens, done = stream.tokens[number], sum(piece.shape[1] for piece in parts)
        if not parts:
            generator.manual_seed(seed_of(losses.seed, stream.deal.mine[number]))
        if losses.labels == "model":
            slopes = slopes_of_drawn(logits.detach(), generator)
        else:  # nothing follows the last token
            following = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
            slopes = slopes_of(logits.detach(), following[:, done : done + part.shape[1]])
        logits.backward(slopes)
        assert part.grad is not None
        parts.append(part.grad)
        if done + part.shape[1] == tokens.shape[1]:
            yield torch.cat(parts, dim=1)
            parts = []


def _retain(name: str, x: Tensor, output: Tensor, seen: Seen, side: Literal[0, 1]) -> None:
    seen[name] = x, output
    seen[name][side].retain_grad()
