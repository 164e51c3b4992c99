"""What comes before and after a model's blocks: tokens to a stream, a stream to logits and losses.

The model's own `forward` does both. With every block's `forward` replaced by a recorder it says how blocks are called:
masks, rotary embeddings and whatever a family passes to its layers are what the model would have used. With the blocks
passing on given states, it scales, caps and projects as it always does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.checkpoint.lookup import looked_up
from slimlm.deal import Deal
from slimlm.device import quick_products
from slimlm.errors import UserError
from slimlm.linalg.likelihood import divergence, window_nll
from slimlm.model.block import Block
from slimlm.model.hidden import HiddenStates, InMemory
from slimlm.model.stream import BlockCall, Stop, Stream, reuse
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every
from slimlm.ranks import ALONE, Ranks

Returned = Tensor | tuple[Tensor, None]  # by a block
LARGE_TABLE = 1 << 26  # bytes of an embedding above which only the rows that are needed are read
LARGE_LOGITS = 1 << 28  # bytes of logits held at once


@torch.no_grad()
def embed(
    model: StreamedModel, batches: Sequence[Tensor], hidden: HiddenStates | None = None, ranks: Ranks = ALONE
) -> Stream:
    """Start a stream for this rank's of all batches of tokens [batch, time]: what enters block 0, and every block's
    arguments.

    hidden: where the hidden states are to wait between blocks; in memory by default.
    """
    deal = Deal(ranks, len(batches))
    own = [batch.to(model.device) for batch in deal.pick(batches)]
    stream = Stream(own, InMemory() if hidden is None else hidden, dealt=deal)
    family = model.family
    large = [name for name in family.embeddings[:1] if _is_large(model, name)]
    others = (family.final_norm, family.head, *large)
    with ExitStack() as stack:
        stack.enter_context(model.loaded([part for part in model.outside if part not in others]))
        for name in large:
            module = model.model.get_submodule(name)
            stored = model.checkpoint.tensors[model.key_of[f"{name}.weight"]]
            stack.enter_context(looked_up(module, stored, model.device, model.dtype))
        for tokens in stream.tokens:
            first, calls = _record(model, tokens)
            stream.hidden.append(first)
            stream.calls.append(reuse(calls, stream.calls))
    return stream


def _is_large(model: StreamedModel, name: str) -> bool:
    """Whether an embedding is to stay on disk while tokens are embedded."""
    stored = model.checkpoint.tensors.get(model.key_of.get(f"{name}.weight", ""))
    is_table = isinstance(model.model.get_submodule(name), nn.Embedding)
    return stored is not None and is_table and stored.nbytes > LARGE_TABLE


def _record(model: StreamedModel, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """What enters the first block, [batch, time, hidden], and what each is called with."""
    calls: dict[int, BlockCall] = {}
    first: list[Tensor] = []

    def recorder(block: Block) -> Callable[..., Returned]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Returned:
            if block.index in calls:
                raise UserError(f"{model.config.model_type!r} calls block {block.index} more than once: not supported")
            calls[block.index] = BlockCall(args, kwargs)
            first.append(hidden_states)
            if len(calls) == len(model.blocks):
                raise Stop
            return _returned(model, hidden_states)

        return forward

    with _replaced(model, recorder):
        try:
            model.model(input_ids=tokens, use_cache=False)
        except Stop:
            return first[0], [call for _, call in sorted(calls.items())]
    raise UserError(f"{model.config.model_type!r} ran {len(calls)} of its {len(model.blocks)} blocks: not supported")


@contextmanager
def _replaced(model: StreamedModel, forward_of: Callable[[Block], Callable[..., Returned]]) -> Iterator[None]:
    every(model, lambda block: setattr(block.module, "forward", forward_of(block)))
    try:
        yield
    finally:
        every(model, lambda block: delattr(block.module, "forward"))


def _returned(model: StreamedModel, hidden: Tensor) -> Returned:
    """Hidden states as this family's blocks return them."""
    return (hidden, None) if model.family.tuples else hidden


@torch.no_grad()
def nll(model: StreamedModel, streams: Iterable[Stream]) -> list[Tensor]:
    """Negative log-likelihood of each of all ranks' windows' tokens 1.. under the model, of streams that went through
    all blocks: fp64 [windows], on the CPU, of each stream."""
    with head_loaded(model):
        return [_nll(model, stream) for stream in streams]


def _nll(model: StreamedModel, stream: Stream) -> Tensor:
    sums = [torch.zeros(tokens.shape[0], dtype=torch.float64, device=model.device) for tokens in stream.tokens]
    for number, positions, found in _logits(model, stream):
        targets = stream.tokens[number][:, 1:][:, positions]
        if targets.shape[1]:
            sums[number] += window_nll(found[:, : targets.shape[1]], targets)
        del found  # before the next are computed
    own = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64, device=model.device)
    return stream.deal.ranks.joined(own).cpu()


def logits(model: StreamedModel, stream: Stream) -> Iterator[tuple[int, slice, Tensor]]:
    """Logits [batch, positions, vocab] of a stream that went through all blocks: (batch number, positions, logits).

    As many positions at a time as make up to LARGE_LOGITS bytes in fp32, of each batch in turn.
    """
    with head_loaded(model):
        yield from _logits(model, stream)


def _logits(model: StreamedModel, stream: Stream) -> Iterator[tuple[int, slice, Tensor]]:
    for number, start, part in _pieces(model, stream):
        with torch.no_grad():
            found = _around_blocks(model, part)
        yield number, slice(start, start + part.shape[1]), found
        del found  # before the next are computed


def differentiable_logits(model: StreamedModel, stream: Stream) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(batch number, states [batch, positions, hidden], logits): the logits as a function of the hidden states, their
    products in what is fastest."""
    with head_loaded(model):
        for number, _, part in _pieces(model, stream):
            leaf = part.detach().clone().requires_grad_()
            with torch.enable_grad(), quick_products(leaf.device, leaf.dtype):
                found = _around_blocks(model, leaf)
            yield number, leaf, found


def divergences(
    model: StreamedModel, x: Tensor, y: Tensor, context: Callable[[], AbstractContextManager[None]]
) -> Iterator[Tensor]:
    """KL divergences of what the head says to y from what it says to x, states [windows, time, hidden] behind the last
    block: summed over some tokens at a time. The head is loaded. context: to compute logits in."""
    step = _positions(model, 4 * len(x))  # so many tensors of this size are there at once
    for one, other in zip(x.split(step, 1), y.split(step, 1), strict=True):
        with context():
            wanted, got = (_around_blocks(model, states) for states in (one, other))
        yield divergence(got, wanted)
        del wanted, got  # before the next are computed


def head_loaded(model: StreamedModel) -> AbstractContextManager[None]:
    """Inside, what is behind the blocks has its weights."""
    others = [part for part in model.outside if part not in (model.family.embeddings[0], *model.head_parts)]
    return model.loaded([*others, *model.head_parts])


def _pieces(model: StreamedModel, stream: Stream) -> Iterator[tuple[int, int, Tensor]]:
    for number, hidden in enumerate(stream.hidden):
        step = _positions(model, len(hidden))
        for start in range(0, hidden.shape[1], step):
            yield number, start, hidden[:, start : start + step]


def _positions(model: StreamedModel, windows: int) -> int:
    """At a time, of so many windows."""
    return max(1, int(LARGE_LOGITS // (4 * windows * model.config.vocab_size)))


def _around_blocks(model: StreamedModel, hidden: Tensor) -> Tensor:
    width = model.model.get_parameter(f"{model.family.embeddings[0]}.weight").shape[1]
    unused = hidden.new_zeros(*hidden.shape[:2], width)
    with _replaced(model, lambda block: lambda *args, **kwargs: _returned(model, hidden)):
        found: Tensor = model.model(inputs_embeds=unused, use_cache=False).logits
        return found
