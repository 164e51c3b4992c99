"""A model's tensors in another basis of the residual stream, part by part.

An RMSNorm without a gain commutes with a rotation, so gains move into the readers. LayerNorm subtracts the mean first:
the basis then leaves the all-ones direction out of the dense stream, and puts what it keeps at right angles to the
all-ones direction of the narrower one (`linalg/pca.py`), where a stock LayerNorm has no mean to subtract either. That
unused direction carries the norm's bias: the new norm's bias is CONSTANT everywhere, and each reader sees `W b` in it.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from slimlm.families import Family
from slimlm.linalg.rotate import rotate_embedding, rotate_writer
from slimlm.model.result import Rows
from slimlm.model.streamed import StreamedModel

CONSTANT = 0.25  # small beside what the norm gives, so that bf16 rounds that no coarser for it


def is_own(basis: Tensor) -> bool:
    """Whether the stream stays in the basis [hidden, width] it is in, and norms therefore as they are."""
    hidden, width = basis.shape
    return hidden == width and int(basis.count_nonzero()) == hidden and bool((basis.diagonal() == 1).all())


def norm_of(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The parameters [hidden] of a block's norm, by name within it."""
    return {kind: weights[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in weights}


def seen_through(norm: Mapping[str, Tensor], family: Family, basis: Tensor) -> Tensor:
    """What the dense readers of a norm see, from what the sliced ones do: [hidden, width] fp32.

    norm: its dense gain and bias [hidden], by name, as stored; the sliced one's are those of `sliced_norm`. It divides
    by the root mean square over width components instead of hidden ones; the factor `sqrt(hidden / width)` that makes
    up for it goes in here rather than into the gain, where bf16 would round it by up to 0.2% for the whole stream.
    """
    if is_own(basis):
        return torch.eye(basis.shape[0], dtype=torch.float32, device=basis.device)
    hidden, width = basis.shape
    seen = (basis * math.sqrt(hidden / width)).float()
    if "weight" in norm:
        seen = (norm["weight"].float() + family.offset)[:, None] * seen
    return seen + norm["bias"].float()[:, None] / (CONSTANT * width) if "bias" in norm else seen


def sliced_norm(norm: Mapping[str, Tensor], family: Family, basis: Tensor) -> dict[str, Tensor]:
    """The parameters [width] of a norm whose gain and bias [hidden] went into its readers; as they were where the
    stream stays."""
    if is_own(basis):
        return dict(norm)
    evenly = {"weight": 1 - family.offset, "bias": CONSTANT}
    return {
        name: torch.full((basis.shape[1],), evenly[name], dtype=torch.float32, device=basis.device) for name in norm
    }


def slice_block(
    weights: Mapping[str, Tensor], family: Family, basis: Tensor, zeros: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    """One block's parameters, (name within the block, tensor) each, in the basis: [hidden, width].

    family: as it is in this block. weights: linears' as [out, in]; readers may be left out. zeros: further biases that
    the result has.
    """
    yield from ((name, torch.zeros(basis.shape[1], dtype=torch.float32, device=basis.device)) for name in zeros)
    if is_own(basis):
        yield from weights.items()
        return
    written: set[str] = set()
    for norm in family.norms:
        dense = norm_of(weights, norm.name)
        seen = seen_through(dense, family, basis)
        sliced = {f"{norm.name}.{kind}": tensor for kind, tensor in sliced_norm(dense, family, basis).items()}
        sliced |= {name: weights[name].float() @ seen for name in family.reading(norm) if name in weights}
        yield from sliced.items()
        written |= sliced.keys()
    for name in family.writing:
        if name in weights:
            yield name, rotate_writer(weights[name].float(), basis)
    for name, weight in weights.items():  # biases of readers, norms of heads
        if name not in written and name not in family.writing:
            yield name, weight


def tied_gain(model: StreamedModel) -> Tensor:
    """What an embedding is multiplied by to serve as head as well: the final norm's gain, its mean being 1: [hidden].

    The head is then exact, and what the gain does to the stream at its start is left to the writers' refit.
    """
    gain = final_norm(model, torch.device("cpu"))["weight"] + model.family.offset
    return gain / gain.mean()


def _tied_map(model: StreamedModel, basis: Tensor) -> Tensor:
    """The table of tokens times this: [hidden, width] is embedding and head. Along the all-ones direction, which norms
    that subtract the mean do not see in the embedding, it says what the final norm's bias adds to the logits."""
    moved = tied_gain(model).to(basis)[:, None] * basis
    bias = final_norm(model, basis.device).get("bias")
    return moved if bias is None else moved + bias.to(basis)[:, None] / (CONSTANT * basis.shape[1])


def slice_embedding(model: StreamedModel, name: str, basis: Tensor, tied: bool) -> Iterator[tuple[str, Rows]]:
    """An embedding's table in the basis: [hidden, width], in runs of rows [tokens, width].

    tied: whether the table of tokens is to be the head's as well, with the final norm's gain and bias in it."""
    hidden, width = basis.shape
    weight = f"{name}.weight"
    if is_own(basis):
        yield weight, model.chunks(weight)
        return
    moved = _tied_map(model, basis) if tied and name == model.family.embeddings[0] else basis
    if model.family.scaled_by_width:
        moved = moved * math.sqrt(hidden / width)
    entering = _entering(model, basis.device)
    yield weight, (rotate_embedding(entering(rows.to(basis.device).float()), moved) for rows in model.chunks(weight))


def _entering(model: StreamedModel, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What becomes of an embedding's rows [tokens, hidden] on their way into the stream."""
    name = model.family.embedding_norm
    if name is None:
        return lambda rows: rows
    norm, eps = _outer_norm(model, name, device), model.norm_eps
    return lambda rows: layer_norm(rows, rows.shape[-1:], norm.get("weight"), norm.get("bias"), eps)


def head_map(model: StreamedModel, basis: Tensor) -> Tensor:
    """What the dense head reads, from what the sliced one reads: [hidden, width] fp32, gain and norm scale included."""
    return seen_through(final_norm(model, basis.device), model.family, basis)


def final_norm(model: StreamedModel, device: torch.device) -> dict[str, Tensor]:
    """The final norm's parameters [hidden], by name within it, fp32."""
    return _outer_norm(model, model.family.final_norm, device)


def _outer_norm(model: StreamedModel, norm: str, device: torch.device) -> dict[str, Tensor]:
    names = {name: f"{norm}.{name}" for name in ("weight", "bias")}
    return {
        name: model.checkpoint_tensor(full).to(device).float() for name, full in names.items() if full in model.key_of
    }


def sliced_final_norm(model: StreamedModel, basis: Tensor) -> dict[str, Tensor]:
    """The final norm's parameters [width], by name within it, for a head that `head_map` went into."""
    return sliced_norm(final_norm(model, basis.device), model.family, basis)


def _head_bias(model: StreamedModel) -> Iterator[tuple[str, Tensor]]:
    name = f"{model.family.head}.bias"
    if name in model.key_of:
        yield name, model.checkpoint_tensor(name)


def write_head(model: StreamedModel, seen: Tensor, basis: Tensor) -> Iterator[tuple[str, Tensor | Rows]]:
    """Final norm and head for a sliced stream. seen: [hidden, width], what the dense head is to take for its input."""
    family, weight = model.family, f"{model.family.head}.weight"
    for name, tensor in sliced_final_norm(model, basis).items():
        yield f"{family.final_norm}.{name}", tensor
    yield weight, (rows.to(seen.device).float() @ seen for rows in model.chunks(weight))
    yield from _head_bias(model)


def write_tied_norm(model: StreamedModel, basis: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The final norm, [width], for a head that stays tied to the embedding: an even gain; the table has the bias."""
    hidden, width = basis.shape
    family, norm = model.family, final_norm(model, basis.device)
    yield from _head_bias(model)
    if is_own(basis):
        yield from ((f"{family.final_norm}.{name}", tensor) for name, tensor in norm.items())
        return
    scale = 1.0 if family.scaled_by_width else math.sqrt(hidden / width)  # else the embedding has it already
    gain = norm["weight"] + family.offset
    yield f"{family.final_norm}.weight", (gain.mean() * scale - family.offset).expand(width)
    if "bias" in norm:
        yield f"{family.final_norm}.bias", torch.full((width,), CONSTANT, dtype=torch.float32, device=basis.device)


def unchanged(model: StreamedModel, part: str) -> Iterator[tuple[str, Rows]]:
    """A part outside the blocks as it is, but for what is tied to another."""
    for name, _ in model.model.get_submodule(part).named_parameters():
        if f"{part}.{name}" not in model.model.all_tied_weights_keys:
            yield f"{part}.{name}", model.chunks(f"{part}.{name}")
