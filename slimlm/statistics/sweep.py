"""Gradients of the loss along the residual stream and at the linears: one sweep forward, and one back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from slimlm.linalg.gram import Gram
from slimlm.model.block import Block
from slimlm.model.ends import differentiable_logits, embed
from slimlm.model.hidden import HiddenStates, Scratch
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel

TOKENS = 16_384
Labels = Literal["model", "text"]
Seen = dict[str, tuple[Tensor, Tensor]]  # by linear or norm: its input and its output


@dataclass(frozen=True)
class Losses:
    """Of which tokens gradients are taken. batches: [batch, time] each. labels: `model` draws the tokens to predict
    from the model's own predictions (the true Fisher information), `text` takes the next tokens (the empirical one)."""

    batches: Sequence[Tensor]
    seed: int
    labels: Labels = "model"


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
    gram = Gram(model.config.hidden_size, model.device, torch.float64)
    scaled = partial(_scaled, eps=model.norm_eps, centred=model.family.centred)
    names = [norm.name for norm in model.family.norms]

    def at_end(gradient: Tensor, hidden: Tensor) -> None:
        gram.add(scaled(gradient, hidden))

    for _, _, seen in sweep(model, losses, walks, lambda block: names, 0, at_end):
        for at, _ in seen.values():
            assert at.grad is not None
            gram.add(scaled(at.grad, at.detach()))
    return gram.matrix


def sweep(
    model: StreamedModel,
    losses: Losses,
    walks: Walks,
    names: Callable[[Block], Sequence[str]],
    side: Literal[0, 1],
    at_end: Callable[[Tensor, Tensor], None] = lambda gradient, hidden: None,
) -> Iterator[tuple[Block, int, Seen]]:
    """For every block from the last to the first and every batch: the block, the batch's number, and the inputs and
    outputs of its modules and matrices of these names, with the gradient of the summed loss on one of them.

    side: where the gradient is wanted: 0 for the input, 1 for the output. at_end: shown each batch's gradient and
    states behind the last block: [batch, time, hidden].
    """
    stream = embed(model, losses.batches, walks.scratch.hidden("input-0"))
    inputs = [stream.hidden]
    for block in walks.forward:
        inputs.append(walks.scratch.hidden(f"input-{block.index + 1}"))
        for _, after in block.outputs(stream):
            inputs[-1].append(after)
        stream.hidden = inputs[-1]
    gradients = walks.scratch.hidden("gradients")
    for number, gradient in enumerate(_at_the_head(model, stream, losses)):
        at_end(gradient, stream.hidden[number])
        gradients.append(gradient)
    for block in walks.back:
        stream.hidden = inputs[block.index]
        for number, seen in _backwards(block, stream, gradients, names(block), side):
            yield block, number, seen
    walks.scratch.clear()


def _backwards(
    block: Block, stream: Stream, gradients: HiddenStates, names: Sequence[str], side: Literal[0, 1]
) -> Iterator[tuple[int, Seen]]:
    """Gradients at the block's output give way to those at its input."""
    for number, hidden in enumerate(stream.hidden):
        hidden.requires_grad_()
        seen: Seen = {}
        with torch.enable_grad(), block.watched(names, partial(_retain, seen=seen, side=side)):
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
    generator = torch.Generator(model.device).manual_seed(losses.seed)
    parts: list[Tensor] = []
    for number, part, logits in differentiable_logits(model, stream):
        tokens, done = stream.tokens[number], sum(piece.shape[1] for piece in parts)
        if losses.labels == "model":
            flat = logits.detach().float().flatten(0, 1)
            wanted = torch.multinomial(flat.softmax(-1), 1, generator=generator).flatten()
        else:  # nothing follows the last token: -100 is left out of the loss
            following = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
            wanted = following[:, done : done + part.shape[1]].flatten()
        with torch.enable_grad():
            loss = cross_entropy(logits.float().flatten(0, 1), wanted, reduction="sum")
        loss.backward()
        assert part.grad is not None
        parts.append(part.grad)
        if done + part.shape[1] == tokens.shape[1]:
            yield torch.cat(parts, dim=1)
            parts = []


def _retain(name: str, x: Tensor, output: Tensor, seen: Seen, side: Literal[0, 1]) -> None:
    seen[name] = x, output
    seen[name][side].retain_grad()
