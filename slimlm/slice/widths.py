"""The widths slicing can change: what a model has of them, what it may have, and what goes with what."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from slimlm.families import FAMILIES, Axis, Carrier, Family
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every

GROUPED = 8  # elements that rows of experts must be a multiple of, in bf16, for the kernel that batches them
# Quantised formats keep one scale for so many neighbours of a row, and matrices whose rows they do not divide as they
# are: 32 in GGUF's Q8_0 and Q4_0, 64 in bitsandbytes, 256 in GGUF's K-quants, asked for of wide rows alone.
BLOCK, COARSE, COARSEST = 32, 64, 256
WIDE = 2048


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
        """The width of an axis, by name."""
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

    @property
    def family(self) -> Family:
        """The model's."""
        return self.model.family

    @cached_property
    def fixed(self) -> frozenset[str]:
        """Axes that cannot be cut, for modules that are to stay as they are: all blocks are cut alike."""
        skipped = {name for names in every(self.model, lambda block: block.family.skipped) for name in names}
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
        return self.model.head_is_tied and self.family.embedding_norm is None

    def folds(self, widths: Widths) -> bool:
        """Whether the embedding's norm goes into its table."""
        return self.family.embedding_norm is not None and not self.stays(widths)

    @cached_property
    def is_even(self) -> bool:
        """Whether the final norm scales all directions alike, and adds nothing."""
        if self.family.centred:
            return False
        gain = self.model.checkpoint_tensor(f"{self.family.final_norm}.weight")
        return bool((gain == gain[0]).all())

    @property
    def axes(self) -> dict[str, Axis]:
        """What can be deleted inside a block, by name."""
        axes = {"mlp": self.family.mlp, "groups": self.family.groups}
        return {name: axis for name, axis in axes.items() if axis is not None}

    @cached_property
    def dense(self) -> Widths:
        """The model's own."""
        config = self.model.config
        widths = {
            name: getattr(config, axis.config[0], None) or self._inputs_of(axis) for name, axis in self.axes.items()
        }
        return Widths(
            config.hidden_size, widths.get("mlp", 0), widths.get("groups", 0), tuple(range(len(self.model.blocks)))
        )

    def _inputs_of(self, axis: Axis) -> int:
        """For a config that leaves the width of its MLP open: what the linears have."""
        return int(self.model.blocks[0].matrix(axis.columns[0]).shape[1])

    def stacks(self, axis: Axis, linear: str, weight: Tensor) -> list[int]:
        """Rows of the linears that are stacked in one weight: [out, in]; those of one alone."""
        rows, names = weight.shape[0], dict(axis.stacks).get(linear, ())
        counts = [getattr(self.model.config, name) for name in names] or [1]
        return [rows * count // sum(counts) for count in counts]

    def carrier(self, widths: Widths) -> Carrier | None:
        """The class for these widths, where the model's own will not do: heads and stream no longer fit together.

        They do where as large a share of the heads goes as of the stream.
        """
        carrier, dense = self.family.carrier, self.dense
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
        if self.family.experts:
            return GROUPED
        carrier = self.family.carrier
        if not self.family.heads or (carrier and not FAMILIES[carrier.model_type].heads):
            return 1
        heads: int = getattr(self.model.config, self.family.heads)
        return heads * groups // self.dense.groups if self.dense.groups else heads

    def attention(self, groups: int) -> int:
        """Inputs of the linear behind attention, with so many key/value groups."""
        axis = self.family.groups
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
        return GROUPED if self.family.experts else 1
