"""The widths slicing can change, and the checkpoint that has them: shapes, config, parameters."""

import copy
import inspect
import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slimlm.checkpoint.code import is_own_class
from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.skeleton import build_skeleton
from slimlm.checkpoint.writer import TensorSpec
from slimlm.errors import UserError, one_line
from slimlm.families import FAMILIES, Axis, Carrier
from slimlm.matrices import matrix
from slimlm.methods.plan import Plan, require_declared
from slimlm.modeling import OWN_CLASSES, own_files
from slimlm.recipe import AnyStep
from slimlm.walk import Kind, StreamedModel

_RESIDUAL_AXIS = {"embedding": -1, "norm": 0, "reader": -1, "writer": -2, "final_norm": 0, "head": -1}
GROUPED = 8  # elements that rows of experts must be a multiple of, in bf16, for the kernel that batches them
# Quantised formats keep one scale for so many neighbours of a row, and matrices whose rows they do not divide as they
# are: 32 in GGUF's Q8_0 and Q4_0, 64 in bitsandbytes, 256 in GGUF's K-quants, asked for of wide rows alone.
BLOCK, COARSE, COARSEST = 32, 64, 256
WIDE = 2048
BY_BLOCK = ("layer_types", "no_rope_layers", "mlp_layer_types")  # lists in configs with an entry for each block
Shape = tuple[str, str, str, tuple[int, ...]]  # name, role, module within its block, sizes


@dataclass(frozen=True)
class Widths:
    """hidden_size, MLP neurons, key/value groups, and the dense model's blocks that stay, by number.

    tied: a head tied to the embedding stays so although the stream is rotated.
    """

    hidden: int
    mlp: int
    groups: int
    blocks: tuple[int, ...]
    tied: bool = False

    def of(self, axis: str) -> int:
        width: int = getattr(self, axis)
        return width

    def __str__(self) -> str:
        """As `--widths` takes them."""
        return f"{self.inside},blocks={len(self.blocks)}"

    @property
    def inside(self) -> str:
        """As `--widths` takes them for any number of blocks."""
        axes = ("hidden", "mlp", "groups", "tied")
        return ",".join(f"{name}={int(self.of(name))}" for name in axes if self.of(name))


@dataclass
class Layout:
    """A model's widths, and what any others would make of it.

    turns: whether the stream is moved into another basis even where its width stays.
    """

    model: StreamedModel
    turns: bool = False

    @cached_property
    def fixed(self) -> frozenset[str]:
        """Axes that cannot be cut, for modules that are to stay as they are: all blocks are cut alike."""
        skipped = {name for anatomy in self.model.anatomy for name in anatomy.skipped}
        axes = {
            name
            for name, axis in self.axes.items()
            for linear in skipped
            if any(linear == touched or linear.startswith(f"{touched}.") for touched in (*axis.rows, *axis.columns))
        }
        return frozenset(axes | ({"hidden", "blocks", "tied"} if self.model.skipped else set()))

    def stays(self, widths: Widths) -> bool:
        """Whether the stream stays as it is."""
        return widths.hidden == self.dense.hidden and not self.turns

    def keeps_tie(self, widths: Widths) -> bool:
        """Whether a head tied to the embedding stays so: where the stream does, where no direction counts for more to
        the head, or where the split says so.

        A rotated head has the final norm's gain in it, which the embedding has not; with `tied` it gets it.
        """
        if self.stays(widths):
            return self.model.head_is_tied
        return self.ties_rotated and (self.is_even or widths.tied)

    @property
    def ties_rotated(self) -> bool:
        """Whether one table can serve a rotated stream and its head: not with a norm in it that the head has not."""
        return self.model.head_is_tied and self.model.family.embedding_norm is None

    def folds(self, widths: Widths) -> bool:
        """Whether the embedding's norm goes into its table."""
        return self.model.family.embedding_norm is not None and not self.stays(widths)

    @cached_property
    def is_even(self) -> bool:
        """Whether the final norm scales all directions alike, and adds nothing."""
        if self.model.family.centred:
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
        widths = {
            name: getattr(config, axis.config[0], None) or self._inputs_of(axis) for name, axis in self.axes.items()
        }
        return Widths(
            config.hidden_size, widths.get("mlp", 0), widths.get("groups", 0), tuple(range(len(self.model.blocks)))
        )

    def _inputs_of(self, axis: Axis) -> int:
        """For a config that leaves the width of its MLP open: what the linears have."""
        return matrix(self.model.blocks[0], axis.columns[0]).shape[1]

    def stacks(self, axis: Axis, linear: str, weight: Tensor) -> list[int]:
        """Rows of the linears that are stacked in one; those of one alone."""
        rows, names = weight.shape[0], dict(axis.stacks).get(linear, ())
        counts = [getattr(self.model.config, name) for name in names] or [1]
        return [rows * count // sum(counts) for count in counts]

    def carrier(self, widths: Widths) -> Carrier | None:
        """The class for these widths, where the model's own will not do: heads and stream no longer fit together.

        They do where as large a share of the heads goes as of the stream.
        """
        carrier, dense = self.model.family.carrier, self.dense
        if carrier is None or self.folds(widths):
            return carrier
        in_proportion = widths.hidden * dense.groups == dense.hidden * widths.groups
        fits = in_proportion if dense.groups else widths.hidden == dense.hidden
        return None if fits and (widths.mlp == dense.mlp or not carrier.mlp) else carrier

    def zeros(self, widths: Widths) -> tuple[str, ...]:
        """Biases of a block that only the carrier has."""
        carrier = self.carrier(widths)
        return carrier.zeros if carrier else ()

    def divisor(self, groups: int) -> int:
        """What hidden_size must be a multiple of."""
        if self.model.family.experts:
            return GROUPED
        carrier = self.model.family.carrier
        if not self.model.family.heads or (carrier and not FAMILIES[carrier.model_type].heads):
            return 1
        heads: int = getattr(self.model.config, self.model.family.heads)
        return heads * groups // self.dense.groups if self.dense.groups else heads

    def attention(self, groups: int) -> int:
        """Inputs of the linear behind attention, with so many key/value groups."""
        axis = self.model.family.groups
        return self._inputs_of(axis) // self.dense.groups * groups if axis else 0

    def _rows(self, widths: Widths) -> dict[str, int]:
        """Lengths of rows that differ from the dense model's."""
        dense = self.dense
        rows = {"hidden": widths.hidden, "mlp": widths.mlp, "attention": self.attention(widths.groups)}
        before = {"hidden": dense.hidden, "mlp": dense.mlp, "attention": self.attention(dense.groups)}
        return {name: row for name, row in rows.items() if row != before[name]}

    def suits_all(self, widths: Widths) -> bool:
        """Whether all formats and kernels take the lengths of rows that a split changes."""
        return not any(row % (COARSEST if row >= WIDE else COARSE) for row in self._rows(widths).values())

    def uneven(self, widths: Widths) -> dict[str, int]:
        """Lengths of rows that a split changes to what quantised formats cannot take."""
        return {name: row for name, row in self._rows(widths).items() if row % BLOCK}

    @property
    def mlp_divisor(self) -> int:
        """What the MLP's width must be a multiple of."""
        return GROUPED if self.model.family.experts else 1

    @cached_property
    def _dense_shapes(self) -> list[Shape]:
        """Raises UserError for weights the family does not declare."""
        model = self.model
        require_declared(model, "slice")
        shapes = {name: tuple(tensor.shape) for name, tensor in model.model.state_dict().items()}
        return [
            (name, str(model.family.role(name)), name.removeprefix(model.family.blocks + "."), shape)
            for name, shape in shapes.items()
        ]

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        """Module tensor -> shape in the model of these widths."""
        model, shapes = self.model, dict[str, tuple[int, ...]]()
        number = {str(block): str(index) for index, block in enumerate(widths.blocks)}
        for entry in self._dense_shapes:
            name, _, inside, _ = entry
            if inside == name:
                if self._is_stored(name, widths):
                    shapes[name] = self._shape_of(entry, widths)
                continue
            block, _, rest = inside.partition(".")
            if block in number:
                shapes[f"{model.family.blocks}.{number[block]}.{rest}"] = self._shape_of(entry, widths)
        for block in number.values():
            shapes |= {f"{model.family.blocks}.{block}.{name}": (widths.hidden,) for name in self.zeros(widths)}
        return shapes

    def _is_stored(self, name: str, widths: Widths) -> bool:
        if self.folds(widths) and name.rpartition(".")[0] == self.model.family.embedding_norm:
            return False
        tied = name in self.model.model.all_tied_weights_keys
        return not tied or (name.startswith(self.model.family.head + ".") and not self.keeps_tie(widths))

    def _shape_of(self, entry: Shape, widths: Widths) -> tuple[int, ...]:
        name, role, inside, dense_shape = entry
        turned = len(dense_shape) == 2 and inside != name and self.model.is_turned(name)
        shape = list(dense_shape[::-1] if turned else dense_shape)
        moved = role in _RESIDUAL_AXIS and widths.hidden != self.dense.hidden
        if moved and not (role in ("reader", "head") and len(shape) == 1):
            shape[_RESIDUAL_AXIS[role] if len(shape) > 1 else 0] = widths.hidden
        if inside != name:
            self._narrow(shape, inside.partition(".")[2], widths)
        return tuple(shape[::-1] if turned else shape)

    def _narrow(self, shape: list[int], name: str, widths: Widths) -> None:
        """Of a linear's weight [out, in] or bias [out], or a packed parameter [experts, out, in]."""
        names = {name, name.rpartition(".")[0]}
        for axis_name, axis in self.axes.items():
            full, width = self.dense.of(axis_name), widths.of(axis_name)
            if names & {*axis.rows}:
                place = max(0, len(shape) - 2)
                shape[place] = shape[place] // full * width
            if names & {*axis.columns} and len(shape) > 1:
                shape[-1] = shape[-1] // full * width

    def parameters(self, widths: Widths) -> int:
        """Counted without listing tensors: there may be very many widths to choose from."""
        hidden, mlp, groups = widths.hidden, widths.mlp, widths.groups
        if widths.blocks not in self._polynomials:
            self._polynomials[widths.blocks] = self._polynomial(widths.blocks)
        inside: int = sum(
            count * hidden**h * mlp**m * groups**g for (h, m, g), count in self._polynomials[widths.blocks].items()
        )
        zeros = len(self.zeros(widths)) * widths.hidden * len(widths.blocks)
        outside = (
            math.prod(self._shape_of(entry, widths)) for entry in self._outside if self._is_stored(entry[0], widths)
        )
        return sum(outside) + inside + zeros

    @cached_property
    def _outside(self) -> list[Shape]:
        return [entry for entry in self._dense_shapes if entry[0] == entry[2]]

    @cached_property
    def _polynomials(self) -> dict[tuple[int, ...], dict[tuple[int, int, int], int]]:
        return {}

    def _polynomial(self, blocks: tuple[int, ...]) -> dict[tuple[int, int, int], int]:
        """Parameters inside some blocks, by powers of hidden, MLP and groups."""
        total: Counter[tuple[int, int, int]] = Counter()
        for block in blocks:
            total.update(self._corners[self.model.kinds[block]])
        return {powers: count for powers, count in total.items() if count}

    @cached_property
    def _blocks(self) -> list[list[Shape]]:
        blocks: list[list[Shape]] = [[] for _ in self.dense.blocks]
        for entry in self._dense_shapes:
            if entry[0] != entry[2]:
                blocks[int(entry[2].partition(".")[0])].append(entry)
        return blocks

    @cached_property
    def _corners(self) -> dict[Kind, dict[tuple[int, int, int], int]]:
        """Parameters of each kind of block as a polynomial, no power above one, in hidden, MLP and groups."""
        found: dict[Kind, dict[tuple[int, int, int], int]] = {}
        for kind, block in zip(self.model.kinds, self._blocks, strict=True):
            if kind not in found:
                values = {
                    (h, m, g): sum(math.prod(self._shape_of(entry, Widths(h, m, g, ()))) for entry in block)
                    for h, m, g in itertools.product((0, 1), repeat=3)
                }
                found[kind] = {
                    corner: sum(
                        value * (-1) ** (sum(corner) - sum(lower))
                        for lower, value in values.items()
                        if all(a <= b for a, b in zip(lower, corner, strict=True))
                    )
                    for corner in values
                }
        return found

    def config(self, widths: Widths) -> PretrainedConfig:
        model, config = self.model, copy.deepcopy(self.model.config)
        hidden = config.hidden_size
        carrier = self.carrier(widths)
        if carrier:
            config = carried(config, carrier)
        if carrier or widths.hidden != hidden or widths.groups != self.dense.groups:
            config.head_dim = getattr(model.config, "head_dim", None) or hidden // config.num_attention_heads
        if widths.hidden != hidden:
            config.hidden_size = widths.hidden
            if hasattr(config, "word_embed_proj_dim"):
                config.word_embed_proj_dim = widths.hidden
            # The norm's mean runs over fewer components; with the readers' sqrt(hidden / width) this keeps it exact.
            setattr(config, FAMILIES[config.model_type].norm_eps, model.norm_eps * hidden / widths.hidden)
        if self.folds(widths):
            config.embedding_norm = False
        for name, axis in self.axes.items():
            for attribute in axis.config:
                if hasattr(config, attribute):
                    setattr(config, attribute, self._count(name, attribute) // self.dense.of(name) * widths.of(name))
        if len(widths.blocks) != len(self.dense.blocks):
            self._leave_out_blocks(config, widths.blocks)
        if model.head_is_tied:
            config.tie_word_embeddings = self.keeps_tie(widths)
        if hasattr(config, "auto_map") and not is_own_class(config):
            del config.auto_map  # a stock result needs no code
        return config

    def _count(self, axis: str, attribute: str) -> int:
        """What the dense config counts of an axis; its width where that is left open."""
        count: int = getattr(self.model.config, attribute, None) or self.dense.of(axis)
        return count

    def _leave_out_blocks(self, config: PretrainedConfig, blocks: tuple[int, ...]) -> None:
        config.num_hidden_layers = len(blocks)
        for name in BY_BLOCK:
            if isinstance(value := getattr(config, name, None), list):
                setattr(config, name, [value[block] for block in blocks])
        if hasattr(config, "mlp_only_layers"):
            config.mlp_only_layers = [place for place, at in enumerate(blocks) if not self.model.anatomy[at].experts]
            config.decoder_sparse_step = 1

    @cached_property
    def narrows(self) -> bool:
        """Whether hidden_size can be cut: the stream can be rotated, and the config's class allows for it."""
        narrower = replace(self.dense, hidden=math.lcm(8, self.divisor(self.dense.groups)))
        return self.model.family.rotates and "hidden" not in self.fixed and refused(self.config(narrower)) is None

    def plan(self, widths: Widths, recipe: AnyStep) -> Plan:
        """The plan for given widths, up to and including the dense ones (a mere rotation)."""
        model, shapes, config = self.model, self.shapes(widths), self.config(widths)
        if reason := refused(config):
            raise UserError(f"{type(config).__name__} has no model of {widths}: {reason}")
        carrier = _check_carrier(config, shapes, model.trust_remote_code)
        empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        tensors = {
            name: TensorSpec(tuple(tensor.shape), model.stored_dtype(name, recipe.dtype))
            for name, tensor in checkpoint_tensors(carrier, empty).items()
        }
        config.dtype = next(iter(tensors.values())).dtype
        parameters = sum(torch.Size(spec.shape).numel() for spec in tensors.values())
        changes, files = self._changes(config), own_files(config)
        return Plan(config, tensors, parameters, recipe, carrier, changes, widths=widths.inside, files=files)

    def _changes(self, config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
        axes = {attribute: name for name, axis in self.axes.items() for attribute in axis.config}
        pairs: dict[str, tuple[Any, Any]] = {}
        for name in ("model_type", "hidden_size", *axes, "num_hidden_layers"):
            before = self._count(axes[name], name) if name in axes else getattr(self.model.config, name)
            pairs[name] = (before, getattr(config, name, before))
        if self.model.head_is_tied:
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


def _check_carrier(config: PretrainedConfig, shapes: dict[str, tuple[int, ...]], trust_remote_code: bool) -> Any:
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
