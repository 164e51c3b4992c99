"""The config of a model of other widths, the class that carries it, and the plan of its checkpoint."""

import copy
import inspect
import math
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slimlm.checkpoint.code import is_own_class
from slimlm.checkpoint.skeleton import build_skeleton
from slimlm.errors import UserError, one_line
from slimlm.families import FAMILIES, Carrier
from slimlm.model.walk import every, picked
from slimlm.modeling import OWN_CLASSES
from slimlm.run import Plan
from slimlm.slice.shapes import Shapes, Sizes
from slimlm.slice.widths import Layout, Widths

BY_BLOCK = ("layer_types", "no_rope_layers", "mlp_layer_types")  # lists in configs with an entry for each block


def config_of(layout: Layout, widths: Widths) -> PretrainedConfig:
    """The dense model's, for these widths."""
    model, config = layout.model, copy.deepcopy(layout.model.config)
    hidden = config.hidden_size
    carrier = layout.carrier(widths)
    if carrier:
        config = carried(config, carrier)
    if carrier or widths.hidden != hidden or widths.groups != layout.dense.groups:
        config.head_dim = getattr(model.config, "head_dim", None) or hidden // config.num_attention_heads
    if widths.hidden != hidden:
        config.hidden_size = widths.hidden
        if hasattr(config, "word_embed_proj_dim"):
            config.word_embed_proj_dim = widths.hidden
        # The norm's mean runs over fewer components; with the readers' sqrt(hidden / width) this keeps it exact.
        setattr(config, FAMILIES[config.model_type].norm_eps, model.norm_eps * hidden / widths.hidden)
    if layout.folds(widths):
        config.embedding_norm = False
    for name, axis in layout.axes.items():
        for attribute in axis.config:
            if hasattr(config, attribute):
                setattr(config, attribute, _count(layout, name, attribute) // layout.dense.of(name) * widths.of(name))
    if len(widths.blocks) != len(layout.dense.blocks):
        _leave_out_blocks(layout, config, widths.blocks)
    if model.head_is_tied:
        config.tie_word_embeddings = layout.keeps_tie(widths)
    if hasattr(config, "auto_map") and not is_own_class(config):
        del config.auto_map  # a stock result needs no code
    return config


def _count(layout: Layout, axis: str, attribute: str) -> int:
    """What the dense config counts of an axis; its width where that is left open."""
    count: int = getattr(layout.model.config, attribute, None) or layout.dense.of(axis)
    return count


def _leave_out_blocks(layout: Layout, config: PretrainedConfig, blocks: tuple[int, ...]) -> None:
    config.num_hidden_layers = len(blocks)
    for name in BY_BLOCK:
        if isinstance(value := getattr(config, name, None), list):
            setattr(config, name, picked(value, blocks))
    if hasattr(config, "mlp_only_layers"):
        plain = every(layout.model, lambda block: not block.family.experts)
        config.mlp_only_layers = [place for place, is_plain in enumerate(picked(plain, blocks)) if is_plain]
        config.decoder_sparse_step = 1


def narrows(layout: Layout) -> bool:
    """Whether hidden_size can be cut: the stream can be rotated, and the config's class allows for it."""
    narrower = replace(layout.dense, hidden=math.lcm(8, layout.divisor(layout.dense.groups)))
    return layout.family.rotates and "hidden" not in layout.fixed and refused(config_of(layout, narrower)) is None


def plan_widths(shapes: Shapes, widths: Widths, dtype: str) -> Plan:
    """The plan for given widths, up to and including the dense ones (a mere rotation). dtype: to write in.

    Raises UserError for what the stock class cannot carry.
    """
    layout, model, config = shapes.layout, shapes.model, config_of(shapes.layout, widths)
    if reason := refused(config):
        raise UserError(f"{type(config).__name__} has no model of {widths}: {reason}")
    found = shapes.of(widths)
    carrier = _check_carrier(config, found, model.trust_remote_code)
    empty = {name: torch.empty(shape, device="meta") for name, shape in found.items()}
    plan = Plan.of(model, config, carrier, empty, dtype)
    return replace(plan, changes=_changes(layout, config), widths=widths.inside)


def _changes(layout: Layout, config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    axes = {attribute: name for name, axis in layout.axes.items() for attribute in axis.config}
    pairs: dict[str, tuple[Any, Any]] = {}
    for name in ("model_type", "hidden_size", *axes, "num_hidden_layers"):
        before = _count(layout, axes[name], name) if name in axes else getattr(layout.model.config, name)
        pairs[name] = (before, getattr(config, name, before))
    if layout.model.head_is_tied:
        pairs["tie_word_embeddings"] = (True, config.tie_word_embeddings)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def refused(config: PretrainedConfig) -> str | None:
    """Why the config's own class would not read it back, if it would not."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # classes validate with whatever exception they please
        return one_line(error)
    return None


def carried(config: PretrainedConfig, carrier: Carrier) -> PretrainedConfig:
    """The config of another class that computes the same."""
    known = CONFIG_MAPPING[carrier.model_type]
    own = {*inspect.signature(known).parameters, "head_dim", "pad_token_id", "bos_token_id", "eos_token_id"}
    values = {name: value for name, value in config.to_dict().items() if name in own and name != "architectures"}
    model = OWN_CLASSES.get(known)
    architecture = model.__name__ if model else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[carrier.model_type]
    return known(**values, **carrier.config, architectures=[architecture])


def _check_carrier(config: PretrainedConfig, shapes: dict[str, Sizes], trust_remote_code: bool) -> PreTrainedModel:
    """The stock class's skeleton, which must want exactly the tensors we are about to write."""
    carrier = build_skeleton(config, trust_remote_code=trust_remote_code)
    wanted = {name: tuple(tensor.shape) for name, tensor in carrier.state_dict().items()}
    for name in wanted.keys() - shapes.keys() - carrier.all_tied_weights_keys.keys():
        raise UserError(f"{type(carrier).__name__} wants {name}, which slicing this model does not give")
    for name, shape in shapes.items():
        if wanted.get(name) != shape:
            raise UserError(
                f"{type(carrier).__name__} cannot carry hidden_size {config.hidden_size}: it wants {name} as "
                f"{wanted.get(name)}, slicing gives {shape}"
            )
    return carrier
