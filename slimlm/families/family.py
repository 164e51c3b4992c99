"""What slimlm must know about an architecture: names and axes, no forward passes and no maths."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["embedding", "norm", "reader", "writer", "inner", "final_norm", "head"]


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream inside a block, the linears that read its output, and those that write the result
    back to the stream."""

    name: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """A width inside a block, made of equal units that can be deleted one by one.

    config: attributes that count the units, the first exactly, others in proportion to it.
    rows, columns: linears of which a unit is so many rows (outputs), or columns (inputs).
    """

    config: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """An architecture, keyed by `config.model_type`. Module names inside a block are relative to the block.

    blocks: path of the ModuleList of blocks.
    embeddings: modules whose weight [*, hidden] is added into the residual stream before the first block.
    norms: the block's RMSNorms on the residual stream, in the order they run, each after what the one before it wrote.
    mlp, groups: the MLP's neurons, and key/value groups with their query heads; None where they cannot be deleted.
    inner: modules of a block that touch neither end of the residual stream (head-wise norms, say).
    final_norm, head: the norm after the last block and the linear that reads it.
    norm_eps: config attribute with the epsilon of those norms.
    heads: config attribute whose value must divide `hidden_size`, where the config class checks that.
    """

    model_type: str
    blocks: str
    embeddings: tuple[str, ...]
    norms: tuple[Norm, ...]
    final_norm: str
    head: str
    norm_eps: str
    mlp: Axis | None = None
    groups: Axis | None = None
    inner: tuple[str, ...] = ()
    heads: str | None = None

    @property
    def readers(self) -> tuple[str, ...]:
        return tuple(reader for norm in self.norms for reader in norm.readers)

    @property
    def writers(self) -> tuple[str, ...]:
        return tuple(writer for norm in self.norms for writer in norm.writers)

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.readers, *self.writers)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The linears of a block, those that read the same input together."""
        return tuple(
            names for norm in self.norms for names in (norm.readers, *((writer,) for writer in norm.writers)) if names
        )

    @property
    def first_of(self) -> dict[str, str]:
        """For each linear of a block, the first of those that read the same input."""
        return {name: names[0] for names in self.inputs for name in names}

    def block(self, index: int) -> str:
        return f"{self.blocks}.{index}"

    def role(self, parameter: str) -> Role | None:
        """What a parameter, by its full name, is to the residual stream; None when it is not declared."""
        module = parameter.rpartition(".")[0]
        if module.startswith(self.blocks + "."):
            return self._role_in_block(module.removeprefix(self.blocks + ".").partition(".")[2])
        if module in self.embeddings:
            return "embedding"
        return {self.final_norm: "final_norm", self.head: "head"}.get(module)  # type: ignore[return-value]

    def _role_in_block(self, module: str) -> Role | None:
        if module in {norm.name for norm in self.norms}:
            return "norm"
        if module in self.readers:
            return "reader"
        if module in self.writers:
            return "writer"
        return "inner" if module in self.inner else None
