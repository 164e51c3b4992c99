"""SliceGPT as published (arXiv 2401.15024, Algorithm 1): a PCA basis of its own for every norm's input.

Between one basis and the next the residual stream goes through a dense shortcut, which counts as parameters and which
no stock class has; the modelling file travels with the checkpoint. As in the reference implementation the Grams are of
the raw stream, damped by a hundredth of their mean diagonal, of the model as sliced so far, and what leaves the last
block keeps its full width.
"""

import bisect
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from slimlm.checkpoint.skeleton import build_skeleton, parameter_count
from slimlm.deal import Parts
from slimlm.errors import RunFailure, UserError
from slimlm.families import Family, Norm
from slimlm.linalg.budget import is_near
from slimlm.linalg.gram import Gram, is_wide
from slimlm.linalg.pca import principal_basis
from slimlm.linalg.rotate import rotate_embedding, rotate_writer
from slimlm.linalg.units import damp
from slimlm.model.block import Block
from slimlm.model.result import Rows
from slimlm.model.rotation import final_norm
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel
from slimlm.modeling import OWN_CLASSES
from slimlm.modeling.modeling_sliced import SlicedLlamaConfig, SlicedOPTConfig, SlicedPhiConfig
from slimlm.recipe import SliceStep
from slimlm.run import Plan

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": SlicedLlamaConfig,
    "opt": SlicedOPTConfig,
    "phi": SlicedPhiConfig,
}


def plan_per_block(model: StreamedModel, recipe: SliceStep) -> Plan:
    """One width for all bases. Raises UserError for families without a modelling file, and when no width gives the
    sparsity."""
    if model.config.model_type not in CONFIGS:
        known = ", ".join(CONFIGS)
        raise UserError(f"basis: per-block has a modelling file for {known} only, not for {model.config.model_type!r}")
    if not getattr(model.config, "enable_bias", True) or not getattr(
        model.config, "layer_norm_elementwise_affine", True
    ):
        raise UserError("basis: per-block needs biases and gains, which this model has not")
    if model.family.why_not is not None:
        raise UserError(f"this {model.config.model_type!r} cannot be sliced: {model.family.why_not}")
    hidden, dense = model.config.hidden_size, parameter_count(model.model)
    multiple = recipe.round_to or 8
    if recipe.widths:
        if [set(choice) for choice in recipe.width_choices] != [{"hidden"}]:
            raise UserError("--widths: with basis per-block only hidden can be changed, to one width")
        given = recipe.width_choices[0]["hidden"]
        if given > hidden:
            raise UserError(f"--widths hidden={given}: the model has {hidden}")
        return _plan(model, given, recipe)

    def removed(width: int) -> float:
        return 1 - _parameters(_config(model, width)) / dense

    widths = range(multiple, hidden, multiple)
    narrower = bisect.bisect_left(widths, -recipe.sparsity, key=lambda width: -removed(width))
    shares = {width: removed(width) for width in widths[max(0, narrower - 1) : narrower + 1]}
    width = min(shares, key=lambda width: abs(shares[width] - recipe.sparsity), default=0)
    if not width or not is_near(shares[width], recipe.sparsity):
        near = f": the nearest is {shares[width]:.4f} (hidden={width})" if width else ""
        raise UserError(f"sparsity {recipe.sparsity:g} cannot be reached with basis per-block{near}")
    return _plan(model, width, recipe)


def _config(model: StreamedModel, width: int) -> PretrainedConfig:
    settings = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("model_type", "architectures", "auto_map", "transformers_version", "dtype")
    }
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    if model.config.model_type == "llama":
        settings["head_dim"] = settings.get("head_dim") or hidden // model.config.num_attention_heads
    settings["tie_word_embeddings"] = False
    sliced = CONFIGS[model.config.model_type]
    return sliced(
        **settings,
        stream_widths=[*[width] * (len(_steps(model.family)) * layers), hidden],
        architectures=[OWN_CLASSES[sliced].__name__],
    )


def _steps(family: Family) -> list[tuple[tuple[Norm, ...], str]]:
    """The norms that read the stream together, before it goes through a shortcut of this name."""
    if family.parallel:
        return [(family.norms, "shortcut.weight")]
    return list(zip([(norm,) for norm in family.norms], ("attn_shortcut.weight", "mlp_shortcut.weight"), strict=True))


def _parameters(config: PretrainedConfig) -> int:
    """Counted on one layer and on two, and multiplied; the last one writes to a wider stream."""
    widths = config.stream_widths
    per_layer = (len(widths) - 1) // config.num_hidden_layers

    def count(layers: int) -> int:
        few = copy.deepcopy(config)
        few.num_hidden_layers, few.stream_widths = layers, [*widths[: per_layer * layers], widths[-1]]
        return parameter_count(build_skeleton(few))

    one, layers = count(1), int(config.num_hidden_layers)
    return one + (layers - 1) * (count(2) - one)


def _plan(model: StreamedModel, width: int, recipe: SliceStep) -> Plan:
    config = _config(model, width)
    carrier = build_skeleton(copy.deepcopy(config))
    changes = {
        "model_type": (model.config.model_type, config.model_type),
        "stream width": (model.config.hidden_size, width),
    }
    plan = Plan.of(model, config, carrier, carrier.state_dict(), recipe.dtype)
    return replace(plan, changes=changes, widths=f"hidden={width}")


def embedding_rows(model: StreamedModel, name: str, basis: Tensor) -> Rows:
    """An embedding's table in the basis: [hidden, width], in runs of rows [tokens, width]."""
    for rows in model.chunks(f"{name}.weight"):
        yield rotate_embedding(_centred(rows.to(model.device).float(), -1, model.family), basis)


def head_of(model: StreamedModel, basis: Tensor) -> Iterator[tuple[str, Tensor | Rows]]:
    """The head in the basis: [hidden, width], with the final norm's gain and bias in it."""
    norm, name = final_norm(model, basis.device), model.family.head
    gain, weight = norm["weight"], f"{name}.weight"
    yield weight, ((rows.to(gain) * gain) @ basis.float() for rows in model.chunks(weight))
    if "bias" in norm:
        bias = torch.cat([rows.to(gain) @ norm["bias"] for rows in model.chunks(weight)])
        own = f"{name}.bias"
        yield own, bias + model.checkpoint_tensor(own).to(bias) if own in model.key_of else bias


def _centred(tensor: Tensor, axis: int, family: Family) -> Tensor:
    """What is written to the stream without its mean, where the norms would subtract it."""
    return tensor - tensor.mean(axis, keepdim=True) if family.centred else tensor


def embedding_gram(model: StreamedModel, stream: Stream) -> Tensor:
    """Of what enters the first block: [hidden, hidden] fp64, on the first rank."""
    parts = _grams(model, stream)
    for number, hidden in stream.batches():
        parts.at(number).add(_centred(hidden.float(), -1, model.family))
    return (parts.total() or parts.make()).matrix


def _grams(model: StreamedModel, stream: Stream) -> Parts[Gram]:
    hidden = model.config.hidden_size
    return Parts(stream.deal, partial(Gram, hidden, model.device, torch.float64), whole=is_wide(hidden))


def basis_of(gram: Tensor) -> Tensor:
    """Principal directions of a damped Gram: [hidden, hidden]. Raises RunFailure when it is not finite."""
    try:
        return principal_basis(damp(gram.clone()))[0]
    except ValueError as error:
        raise RunFailure(f"the residual stream overflows: {error}") from error


@dataclass
class Slicer:
    """One block of the sliced model. stream: of the sliced model, before it."""

    small: Block
    stream: Stream

    def slice(self, dense: Block, before: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The block's parameters, fp32, and the basis its output is in; before: [hidden, width], its input's.

        dense: the block beside it, its weights loaded.
        """
        family, weights = dense.model.family, dense.weights()
        norms = {norm.name for norm in family.norms}
        tensors = {name: weight.float() for name, weight in weights.items() if name.rpartition(".")[0] not in norms}
        for name in family.writing:
            if name in tensors:
                tensors[name] = _centred(tensors[name], 0, family)
        steps, basis = _steps(family), before
        first = len(steps) * self.small.index + 1
        widths = self.small.model.config.stream_widths[first : first + len(steps)]
        for place, (together, shortcut) in enumerate(steps):
            for norm in together:
                _read_in(tensors, norm, weights, basis)
            tensors[shortcut] = basis.float()
            following = steps[place + 1][0][0].name if place + 1 < len(steps) else ""
            basis = self._basis(tensors, following, widths[place])
            _write_in(tensors, [writer for norm in together for writer in norm.writers], shortcut, basis)
        return tensors, basis

    def _basis(self, tensors: dict[str, Tensor], name: str, width: int) -> Tensor:
        """The leading directions of the stream, still of full width, that enters module `name`."""
        parts = _grams(self.small.model, self.stream)
        with self.small.placed(tensors):
            for number in range(len(self.stream.tokens)):
                parts.at(number).add(self.small.inputs(self.stream, number, [name])[name])
        gram = (parts.total() or parts.make()).matrix
        ranks = self.stream.deal.ranks
        return ranks.once(basis_of(gram)[:, :width].contiguous() if ranks.first else None)


def _read_in(tensors: dict[str, Tensor], norm: Norm, weights: dict[str, Tensor], basis: Tensor) -> None:
    gain, bias = weights[f"{norm.name}.weight"].float(), weights.get(f"{norm.name}.bias")
    for reader in norm.readers:
        weight = tensors[f"{reader}.weight"]
        if bias is not None:
            tensors[f"{reader}.bias"] = tensors[f"{reader}.bias"] + weight @ bias.float()
        tensors[f"{reader}.weight"] = (weight * gain) @ basis.float()


def _write_in(tensors: dict[str, Tensor], writers: list[str], shortcut: str, basis: Tensor) -> None:
    for writer in writers:
        for name in (f"{writer}.weight", f"{writer}.bias"):
            if name in tensors:
                tensors[name] = rotate_writer(tensors[name], basis)
    tensors[shortcut] = rotate_writer(tensors[shortcut], basis)
