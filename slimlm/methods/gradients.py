"""The covariance of the loss's gradient along the residual stream: which directions matter, not which are large."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimlm.activations import HiddenStates
from slimlm.linalg.gram import Gram
from slimlm.stream import Stream, hooked
from slimlm.walk import StreamedModel
from slimlm.work import Work

TOKENS = 16_384


def gradient_covariance(model: StreamedModel, batches: list[Tensor], seed: int, work: Work) -> Tensor:
    """Sum over all norms and tokens of `g g^T`: [hidden, hidden] fp64, g the gradient of the loss at the norm's input
    times the input's root mean square, which is the gradient with respect to the normalised stream but for the part
    along it.

    The loss is that of tokens drawn from the model's own predictions, which makes this the true Fisher information of
    the stream (Kunstner et al., arXiv 1905.12558, section 2). One sweep forward that leaves every block's input on
    disk, one backward, a block at a time.
    """
    blocks = len(model.blocks)
    work.progress.stage("gradients", 2 * blocks)
    gram = Gram(model.config.hidden_size, model.device)
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
    for number, gradient in enumerate(_at_the_head(model, stream, generator)):
        gram.add(_scaled(gradient, inputs[-1][number]))
        gradients.append(gradient)
    for index in reversed(range(blocks)):
        start = time.perf_counter()
        with model.block(index, step=-1) as block:
            _through_block(model, index, block, stream, inputs[index], gradients, gram)
        gradients.turn()
        work.progress.step()
        work.progress.done("gradients back", model.family.block(index), time.perf_counter() - start)
    work.clear_scratch()
    return gram.matrix


def _scaled(gradient: Tensor, at: Tensor) -> Tensor:
    return gradient.float() * at.float().square().mean(-1, keepdim=True).sqrt()


def _at_the_head(model: StreamedModel, stream: Stream, generator: torch.Generator) -> Iterator[Tensor]:
    """Per batch, the gradient [batch, time, hidden] of the summed loss at what leaves the last block."""
    parts: list[Tensor] = []
    for number, part, logits in model.differentiable_logits(stream):
        labels = torch.multinomial(logits.detach().float().flatten(0, 1).softmax(-1), 1, generator=generator).flatten()
        with torch.enable_grad():
            loss = cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum")
        loss.backward()
        assert part.grad is not None
        parts.append(part.grad)
        if sum(piece.shape[1] for piece in parts) == stream.tokens[number].shape[1]:
            yield torch.cat(parts, dim=1)
            parts = []


def _through_block(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    stream: Stream,
    inputs: HiddenStates,
    gradients: HiddenStates,
    gram: Gram,
) -> None:
    """Replace the gradients leaving a block by those entering it, and add those at its norms to the Gram."""
    for number, hidden in enumerate(inputs):
        seen: list[Tensor] = []

        def tap(_: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            args[0].retain_grad()
            seen.append(args[0])

        hidden.requires_grad_()
        with torch.enable_grad(), hooked((block.get_submodule(norm.name), tap) for norm in model.family.norms):
            out = model.run(index, hidden, stream.calls[number][index])
        out.backward(gradients[number])
        for at in seen:
            assert at.grad is not None
            gram.add(_scaled(at.grad, at.detach()))
        assert hidden.grad is not None
        gradients.replace(number, hidden.grad)
