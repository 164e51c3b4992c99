"""The widths slicing can change, and the checkpoint that has them: shapes, config, parameters."""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig

from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.skeleton import build_skeleton
from slimlm.checkpoint.writer import TensorSpec
from slimlm.errors import UserError
from slimlm.families import Axis
from slimlm.methods.plan import Plan
from slimlm.recipe import Recipe
from slimlm.walk import StreamedModel

_RESIDUAL_AXIS = {"embedding": 1, "norm": 0, "reader": 1, "writer": 0, "final_norm": 0, "head": 1}


@dataclass(frozen=True)
class Widths:
    """hidden_size, MLP neurons, key/value groups, and the dense model's blocks that stay, by number."""

    hidden: int
    mlp: int
    groups: int
    blocks: tuple[int, ...]

    def of(self, axis: str) -> int:
        width: int = getattr(self, axis)
        return width

    def __str__(self) -> str:
        return f"hidden={self.hidden},mlp={self.mlp},groups={self.groups},blocks={len(self.blocks)}"


@dataclass
class Layout:
    """A model's widths, and what any others would make of it."""

    model: StreamedModel

    @cached_property
    def keeps_tie(self) -> bool:
        """A head tied to the embedding can stay so only if the final norm scales all directions alike."""
        if not self.model.head_is_tied:
            return False
        gain = self.model.checkpoint_tensor(f"{self.model.family.final_norm}.weight")
        return bool((gain == gain[0]).all())

    @property
    def axes(self) -> dict[str, Axis]:
        family = self.model.family
        return {name: axis for name, axis in (("mlp", family.mlp), ("groups", family.groups)) if axis is not None}

    @cached_property
    def dense(self) -> Widths:
        config = self.model.config
        widths = {name: getattr(config, axis.config[0]) for name, axis in self.axes.items()}
        return Widths(
            config.hidden_size, widths.get("mlp", 0), widths.get("groups", 0), tuple(range(len(self.model.blocks)))
        )

    def divisor(self, groups: int) -> int:
        """What hidden_size must be a multiple of."""
        if not self.model.family.heads:
            return 1
        heads: int = getattr(self.model.config, self.model.family.heads)
        return heads * groups // self.dense.groups if self.dense.groups else heads

    @cached_property
    def _dense_shapes(self) -> list[tuple[str, str, str, tuple[int, ...]]]:
        """(name, role, module within its block, shape). Raises UserError for weights the family does not declare."""
        model = self.model
        found: list[tuple[str, str, str, tuple[int, ...]]] = []
        for name, tensor in model.model.state_dict().items():
            role = model.family.role(name)
            if role is None:
                raise UserError(f"{model.config.model_type!r} has a weight slimlm does not know how to slice: {name}")
            found.append((name, role, name.removeprefix(model.family.blocks + "."), tuple(tensor.shape)))
        return found

    @cached_property
    def _one_block(self) -> list[tuple[str, str, str, tuple[int, ...]]]:
        first = f"{self.model.family.block(0)}."
        return [entry for entry in self._dense_shapes if entry[0] == entry[2] or entry[0].startswith(first)]

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        """Module tensor -> shape in the model of these widths."""
        return self._shapes_of(self._dense_shapes, widths)

    def _shapes_of(
        self, entries: list[tuple[str, str, str, tuple[int, ...]]], widths: Widths
    ) -> dict[str, tuple[int, ...]]:
        model, shapes = self.model, {}
        number = {str(block): str(index) for index, block in enumerate(widths.blocks)}
        for name, role, inside, dense_shape in entries:
            if name in model.model.all_tied_weights_keys and (
                self.keeps_tie or not name.startswith(model.family.head + ".")
            ):
                continue
            shape = list(dense_shape)
            if role in _RESIDUAL_AXIS and not (role in ("reader", "head") and len(shape) == 1):
                shape[_RESIDUAL_AXIS[role]] = widths.hidden
            if inside != name:
                block, _, rest = inside.partition(".")
                if block not in number:
                    continue
                name = f"{model.family.blocks}.{number[block]}.{rest}"
                self._narrow(shape, rest.rpartition(".")[0], widths)
            shapes[name] = tuple(shape)
        return shapes

    def _narrow(self, shape: list[int], module: str, widths: Widths) -> None:
        for axis_name, axis in self.axes.items():
            full, width = self.dense.of(axis_name), widths.of(axis_name)
            if module in axis.rows:
                shape[0] = shape[0] // full * width
            if module in axis.columns and len(shape) == 2:
                shape[1] = shape[1] // full * width

    def parameters(self, widths: Widths) -> int:
        """As all blocks are alike, one is counted and multiplied."""
        inside = outside = 0
        for name, shape in self._shapes_of(self._one_block, replace(widths, blocks=(0,))).items():
            count = torch.Size(shape).numel()
            if name.startswith(self.model.family.blocks + "."):
                inside += count
            else:
                outside += count
        return outside + inside * len(widths.blocks)

    def config(self, widths: Widths) -> PretrainedConfig:
        model, config = self.model, copy.deepcopy(self.model.config)
        hidden = config.hidden_size
        config.head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        config.hidden_size = widths.hidden
        # The norm's mean runs over fewer components; with the readers' sqrt(hidden / width) this keeps it exact.
        setattr(config, model.family.norm_eps, getattr(config, model.family.norm_eps) * hidden / widths.hidden)
        for name, axis in self.axes.items():
            for attribute in axis.config:
                setattr(config, attribute, getattr(config, attribute) // self.dense.of(name) * widths.of(name))
        config.num_hidden_layers = len(widths.blocks)
        if isinstance(getattr(config, "layer_types", None), list):
            config.layer_types = [config.layer_types[block] for block in widths.blocks]
        config.tie_word_embeddings = self.keeps_tie
        if hasattr(config, "auto_map"):
            del config.auto_map  # the result is stock: no code travels with it
        return config

    def plan(self, widths: Widths, recipe: Recipe) -> Plan:
        """The plan for given widths, up to and including the dense ones (a mere rotation)."""
        model, shapes, config = self.model, self.shapes(widths), self.config(widths)
        carrier = _check_carrier(config, shapes)
        empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        tensors = {
            name: TensorSpec(tuple(tensor.shape), model.stored_dtype(name, recipe.dtype))
            for name, tensor in checkpoint_tensors(carrier, empty).items()
        }
        config.dtype = next(iter(tensors.values())).dtype
        parameters = sum(torch.Size(spec.shape).numel() for spec in tensors.values())
        sizes = {"hidden": widths.hidden, **{name: widths.of(name) for name in self.axes}}
        by_hand = ",".join(f"{name}={size}" for name, size in sizes.items())
        return Plan(config, tensors, parameters, recipe, self._changes(config), widths=by_hand)

    def _changes(self, config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
        names = ["hidden_size", *(name for axis in self.axes.values() for name in axis.config), "num_hidden_layers"]
        pairs = {name: (getattr(self.model.config, name), getattr(config, name)) for name in names}
        if self.model.head_is_tied:
            pairs["tie_word_embeddings"] = (True, config.tie_word_embeddings)
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _check_carrier(config: PretrainedConfig, shapes: dict[str, tuple[int, ...]]) -> Any:
    """The stock class's skeleton, which must want exactly the tensors we are about to write."""
    carrier = build_skeleton(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in carrier.state_dict().items()}
    for name, shape in shapes.items():
        if wanted.get(name) != shape:
            raise UserError(
                f"{type(carrier).__name__} cannot carry hidden_size {config.hidden_size}: it wants {name} as "
                f"{wanted.get(name)}, slicing gives {shape}"
            )
    return carrier
