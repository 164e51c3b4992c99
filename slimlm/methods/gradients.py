"""Gradients of the loss along the residual stream and at the linears, in one sweep forward and one back."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from slimlm.linalg.gram import Gram
from slimlm.recipe import Step
from slimlm.stream import Stream
from slimlm.walk import StreamedModel
from slimlm.work import Work

TOKENS = 16_384
Labels = Literal["model", "text"]
Seen = dict[str, tuple[Tensor, Tensor]]  # by linear or norm: its input and its output
Visit = Callable[[int, int, Seen], None]  # (block, batch number, what its modules saw)


def gradient_covariance(model: StreamedModel, batches: list[Tensor], seed: int, work: Work) -> Tensor:
    """Sum over all norms and tokens of `g g^T`: [hidden, hidden] fp64, g the gradient of the loss at the norm's input
    times what the norm divides by, so that it goes with the normalised stream.

    That is the gradient of the whole stream, in what the norm passes on and in the shortcut past it: what the loss
    feels of a direction from there on. Early directions that only the shortcut carries thus count at every norm.

    The loss is that of tokens drawn from the model's own predictions, which makes this the true Fisher information of
    the stream (Kunstner et al., arXiv 1905.12558, section 2).
    """
    gram = Gram(model.config.hidden_size, model.device)

    def visit(block: int, number: int, seen: Seen) -> None:
        for at, _ in seen.values():
            assert at.grad is not None
            gram.add(_scaled(at.grad, at.detach(), model.norm_eps, model.family.centred))

    def at_end(gradient: Tensor, hidden: Tensor) -> None:
        gram.add(_scaled(gradient, hidden, model.norm_eps, model.family.centred))

    names = [norm.name for norm in model.family.norms]
    reverse_sweep(model, batches, seed, "model", (lambda index: names, 0), visit, work, at_end)
    return gram.matrix


def sweep_windows(recipe: Step, model: StreamedModel) -> int:
    """Windows' worth of hidden states that a sweep leaves on disk: every block's input, which do not come in pairs."""
    assert recipe.max_seq_length is not None
    return (TOKENS // recipe.max_seq_length + 1) * (len(model.blocks) + 2) // 2


def reverse_sweep(
    model: StreamedModel,
    batches: list[Tensor],
    seed: int,
    labels: Labels,
    watched: tuple[Callable[[int], Sequence[str]], Literal[0, 1]],
    visit: Visit,
    work: Work,
    at_end: Callable[[Tensor, Tensor], None] = lambda gradient, hidden: None,
) -> None:
    """Show `visit`, for every block from the last to the first and every batch, the inputs and outputs of some modules
    of the block, with the gradient of the summed loss on one of them. One sweep forward that leaves every block's input
    on disk, one backward, a block at a time.

    watched: names of a block's modules and matrices, and where the gradient is wanted: 0 for the input, 1 for the
    output.
    labels: `model` draws the tokens to predict from the model's own predictions (the true Fisher information), `text`
    takes the next tokens (the empirical one). at_end: shown each batch's gradient and states behind the last block.
    """
    blocks = len(model.blocks)
    work.progress.stage("gradients", 2 * blocks)
    stream = model.embed(batches, work.scratch("input-0", model.device))
    inputs = [stream.hidden]
    for index in range(blocks):
        inputs.append(work.scratch(f"input-{index + 1}", model.device))
        start = time.perf_counter()
        with model.block(index), torch.no_grad():
            for number, hidden in enumerate(inputs[index]):
                inputs[-1].append(model.run(index, hidden, stream.calls[number][index]))
        work.progress.step()
        work.progress.done("gradients forward", model.family.block(index), time.perf_counter() - start)
    gradients = work.scratch("gradients", model.device)
    stream.hidden = inputs[-1]
    generator = torch.Generator(model.device).manual_seed(seed)
    for number, gradient in enumerate(_at_the_head(model, stream, generator, labels)):
        at_end(gradient, inputs[-1][number])
        gradients.append(gradient)
    for index in reversed(range(blocks)):
        start = time.perf_counter()
        with model.block(index, step=-1):
            for number, hidden in enumerate(inputs[index]):
                hidden.requires_grad_()
                seen: Seen = {}
                see = partial(_retain, seen=seen, side=watched[1])
                with torch.enable_grad(), model.watched(index, watched[0](index), see):
                    out = model.run(index, hidden, stream.calls[number][index])
                out.backward(gradients[number])
                visit(index, number, seen)
                assert hidden.grad is not None
                gradients.replace(number, hidden.grad)
        gradients.turn()
        work.progress.step()
        work.progress.done("gradients back", model.family.block(index), time.perf_counter() - start)
    work.clear_scratch()


def _scaled(gradient: Tensor, at: Tensor, eps: float, centred: bool) -> Tensor:
    """The gradient at a norm's input [..., hidden], times what the norm divides by."""
    at = at.float()
    at = at - at.mean(-1, keepdim=True) if centred else at
    return gradient.float() * (at.square().mean(-1, keepdim=True) + eps).sqrt()


def _at_the_head(model: StreamedModel, stream: Stream, generator: torch.Generator, labels: Labels) -> Iterator[Tensor]:
    """Per batch, the gradient [batch, time, hidden] of the summed loss at what leaves the last block."""
    parts: list[Tensor] = []
    for number, part, logits in model.differentiable_logits(stream):
        tokens, done = stream.tokens[number], sum(piece.shape[1] for piece in parts)
        if labels == "model":
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
