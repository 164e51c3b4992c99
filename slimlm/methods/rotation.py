"""A model's tensors in another basis of the residual stream, part by part."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from slimlm.families import Family
from slimlm.linalg.rotate import rotate_embedding, rotate_reader, rotate_writer
from slimlm.walk import StreamedModel
from slimlm.work import Rows


def slice_block(weights: dict[str, Tensor], family: Family, basis: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One block's parameters, (name within the block, fp32 tensor) each, in the basis: [hidden, width]."""
    for name, weight in weights.items():
        if name.rpartition(".")[0] in family.inner:
            yield name, weight
    for norm in family.norms:
        gain = weights[f"{norm.name}.weight"].float()
        yield f"{norm.name}.weight", gain.new_ones(basis.shape[1])
        for reader in norm.readers:
            yield f"{reader}.weight", rotate_reader(weights[f"{reader}.weight"].float(), gain, basis)
            if f"{reader}.bias" in weights:
                yield f"{reader}.bias", weights[f"{reader}.bias"]
    for writer in family.writers:
        for name in (f"{writer}.weight", f"{writer}.bias"):
            if name in weights:
                yield name, rotate_writer(weights[name].float(), basis)


def slice_embedding(model: StreamedModel, name: str, basis: Tensor) -> Iterator[tuple[str, Rows]]:
    weight = f"{name}.weight"
    yield weight, (rotate_embedding(rows.to(basis.device).float(), basis) for rows in model.chunks(weight))


def head_map(model: StreamedModel, basis: Tensor) -> Tensor:
    """What the dense head reads, from what the sliced one reads: [hidden, width] fp32, gain and norm scale included."""
    hidden, width = basis.shape
    return final_gain(model, basis)[:, None] * (basis * math.sqrt(hidden / width)).float()


def final_gain(model: StreamedModel, basis: Tensor) -> Tensor:
    return model.checkpoint_tensor(f"{model.family.final_norm}.weight").to(basis.device).float()


def write_head(model: StreamedModel, seen: Tensor) -> Iterator[tuple[str, Tensor | Rows]]:
    """Final norm and head for a sliced stream. seen: [hidden, width], what the dense head is to take for its input."""
    family, weight = model.family, f"{model.family.head}.weight"
    yield f"{family.final_norm}.weight", torch.ones(seen.shape[1], device=seen.device)
    yield weight, (rows.to(seen.device).float() @ seen for rows in model.chunks(weight))
    if f"{family.head}.bias" in model.key_of:
        yield f"{family.head}.bias", model.checkpoint_tensor(f"{family.head}.bias")


def write_tied_norm(model: StreamedModel, basis: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A head that stays tied to the embedding leaves the constant gain in the final norm."""
    hidden, width = basis.shape
    name = f"{model.family.final_norm}.weight"
    yield name, final_gain(model, basis)[:1].expand(width) * math.sqrt(hidden / width)
