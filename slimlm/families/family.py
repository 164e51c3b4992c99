"""What slimlm must know about an architecture: names and axes, no forward passes and no maths."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Role = Literal["embedding", "norm", "reader", "writer", "inner", "final_norm", "head", "outer"]


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream inside a block, the linears that read its output, and those that write the result
    back to the stream, in the order they run. Linears that a block does not have (layers without experts) are left
    out of what is said about that block. name: "" where the linears read the stream as it is.

    after: the norm that what is written goes through before it is added, which no rotation can pass.
    """

    name: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    after: str | None = None

    @property
    def label(self) -> str:
        """A name for it even where there is none."""
        return self.name or f"{self.readers[0]}.input"


@dataclass(frozen=True)
class Axis:
    """A width inside a block, made of equal units that can be deleted one by one.

    config: attributes that count the units, the first exactly, others in proportion to it.
    rows, columns: linears, or packed parameters of experts, of which a unit is so many rows (outputs), or columns
    (inputs).
    stacks: for linears that are several stacked in one, the sizes of these, as multiples of the units or by name of the
    attribute that counts them; rows of a unit are then some of every one.
    """

    config: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    stacks: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Experts:
    """A mixture's experts, packed: parameters [experts, out, in] of one module.

    reads: reads what the norm before it gives to the tokens routed to an expert. writes: writes to the stream.
    count: experts of a block, where it is a block that is spoken of.
    """

    module: str
    reads: str
    writes: str
    count: int = 0

    @property
    def matrices(self) -> tuple[str, ...]:
        """One name for each expert's matrix."""
        return tuple(f"{name}.{expert}" for expert in range(self.count) for name in self.parameters)

    @property
    def writing(self) -> tuple[str, ...]:
        """The names of those that write."""
        return tuple(f"{self.parameters[1]}.{expert}" for expert in range(self.count))

    @property
    def parameters(self) -> tuple[str, str]:
        """The packed parameters: the one that reads and the one that writes."""
        return f"{self.module}.{self.reads}", f"{self.module}.{self.writes}"


@dataclass(frozen=True)
class Carrier:
    """A class that computes the same as another for a checkpoint of other widths.

    config: attributes it needs to. zeros: biases [hidden] inside a block that only it has. unless: attributes of the
    other's config that it has nothing for, when they are true. stock: whether transformers has it, or slimlm
    (`modeling/`). mlp: whether the other derives the width of its MLP from hidden_size.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    stock: bool = True
    mlp: bool = False


@dataclass(frozen=True)
class Family:
    """An architecture, keyed by `config.model_type`. Module names inside a block are relative to the block.

    blocks: path of the ModuleList of blocks.
    embeddings: modules whose weight [*, hidden] is added into the residual stream before the first block, tokens first.
    embedding_norm: a LayerNorm that the rows of the only embedding go through before they enter the residual stream. A
    stream in another basis has it in the table, and its config `embedding_norm=False`.
    norms: the block's norms on the residual stream, in the order they run, each after what the one before it wrote.
    parallel: whether all of them see what enters the block instead, and all is added up at its end.
    centred: whether norms subtract the mean (LayerNorm). offset: what they add to the gain they store.
    mlp, groups: the MLP's neurons, and key/value groups with their query heads; None where they cannot be deleted.
    experts: matrices of a mixture of experts.
    inner: modules of a block that touch neither end of the residual stream (head-wise norms, say).
    unpruned: linears that no method prunes: a router decides too much for the little it weighs.
    skipped: linears and experts' matrices that are to stay as they are in this model.
    matched: writers whose output does not reach the residual stream as it is.
    outer: modules outside the blocks that are neither embedding nor head.
    final_norm, head: the norm after the last block and the linear that reads it; "" without such a norm.
    norm_eps: config attribute with the epsilon of those norms; "" where the class has a constant.
    heads: config attribute whose value must divide `hidden_size`, where the config class checks that.
    residual_scale, logit_divisor: config attributes of a factor on what writers add, and of a divisor of the logits.
    scaled_by_width: whether embeddings are scaled by the square root of hidden_size besides.
    tuples: whether a block returns a tuple. alibi: whether it adds a token's place to scores, unless the config says.
    numbered: whether what a block computes depends on its number, so that none can be left out.
    carrier: the class that carries a sliced result, where that is not its own.
    rotates: whether the residual stream can be moved into another basis; `why_not` says why it cannot.
    variants: what is different where config attributes have certain values; the first that fits counts.
    """

    model_type: str
    blocks: str
    embeddings: tuple[str, ...]
    norms: tuple[Norm, ...]
    final_norm: str
    head: str
    norm_eps: str
    parallel: bool = False
    centred: bool = False
    offset: float = 0.0
    mlp: Axis | None = None
    groups: Axis | None = None
    experts: Experts | None = None
    inner: tuple[str, ...] = ()
    unpruned: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    matched: tuple[str, ...] = ()
    outer: tuple[str, ...] = ()
    embedding_norm: str | None = None
    heads: str | None = None
    residual_scale: str | None = None
    logit_divisor: str | None = None
    scaled_by_width: bool = False
    tuples: bool = False
    alibi: bool = False
    numbered: bool = False
    carrier: Carrier | None = None
    why_not: str | None = None
    variants: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = ()

    def of(self, config: "PretrainedConfig") -> "Family":
        """The declaration for a model of this config."""
        family = self
        for conditions, changes in self.variants:
            if all(getattr(config, name, None) == value for name, value in conditions.items()):
                family = replace(self, **changes)
                break
        if family.carrier and any(getattr(config, name, None) for name in family.carrier.unless):
            family = replace(family, carrier=None)
        return replace(family, variants=())

    def in_block(self, modules: Mapping[str, int]) -> "Family":
        """The declaration for a block that has these modules and packed parameters; the number of experts of those."""

        def had(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name for name in names if name in modules)

        norms = tuple(
            replace(norm, readers=had(norm.readers), writers=had(norm.writers))
            for norm in self.norms
            if not norm.name or norm.name in modules
        )
        count = modules.get(self.experts.parameters[0], 0) if self.experts else 0
        experts = replace(self.experts, count=count) if self.experts and count else None
        return replace(self, norms=norms, experts=experts)

    @property
    def rotates(self) -> bool:
        """Whether its stream can be put into another basis."""
        return self.why_not is None

    @property
    def readers(self) -> tuple[str, ...]:
        """Linears of a block that read the stream, through its norms."""
        return tuple(reader for norm in self.norms for reader in norm.readers)

    @property
    def writers(self) -> tuple[str, ...]:
        """Linears of a block that write to the stream."""
        return tuple(writer for norm in self.norms for writer in norm.writers)

    def reading(self, norm: Norm) -> tuple[str, ...]:
        """Parameters [..., hidden] that read what a norm of a block gives, experts' in the last."""
        experts = self.experts.parameters[:1] if self.experts and norm is self.norms[-1] else ()
        return (*(f"{reader}.weight" for reader in norm.readers), *experts)

    def fitting(self, norm: Norm) -> tuple[str, ...]:
        """Those of them that may be changed."""
        kept = {f"{name}.weight" for name in self.skipped}
        if self.experts and any(name.startswith(f"{self.experts.module}.") for name in self.skipped):
            kept |= set(self.experts.parameters)
        return tuple(name for name in self.reading(norm) if name not in kept)

    @property
    def writing(self) -> tuple[str, ...]:
        """Parameters of a block that write to the stream: [..., hidden, in], and biases [hidden] where it has them."""
        experts = self.experts.parameters[1:] if self.experts else ()
        return (*(f"{writer}.{kind}" for writer in self.writers for kind in ("weight", "bias")), *experts)

    def has(self, axis: Axis) -> bool:
        """Whether a block, the declaration being that for it, has this axis."""
        return axis.columns[0] in (*self.writers, *(self.experts.parameters if self.experts else ()))

    @property
    def between(self) -> dict[str, str]:
        """Writers whose output a norm inside the block reads next, on the stream as they leave it; and that norm."""
        return {
            before.writers[-1]: after.name
            for before, after in pairwise(() if self.parallel else self.norms)
            if after.name and before.writers and before.writers[-1] not in self.matched
        }

    @property
    def linears(self) -> tuple[str, ...]:
        """All that methods prune, matrices of experts included."""
        return tuple(name for names in self.inputs for name in names)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """What methods prune of a block, linears that read the same input together."""
        groups = [names for norm in self.norms for names in (norm.readers, *((writer,) for writer in norm.writers))]
        groups += [(name,) for name in (self.experts.matrices if self.experts else ())]
        pruned = [tuple(name for name in names if name not in self.spared) for names in groups]
        return tuple(filter(None, pruned))

    @property
    def spared(self) -> frozenset[str]:
        """What methods leave as it is."""
        return frozenset((*self.unpruned, *self.skipped))

    @property
    def first_of(self) -> dict[str, str]:
        """For each linear of a block, the first of those that read the same input."""
        return {name: names[0] for names in self.inputs for name in names}

    def block(self, index: int) -> str:
        """The path of a block's module."""
        return f"{self.blocks}.{index}"

    def role(self, parameter: str) -> Role | None:
        """What a parameter, by its full name, is to the residual stream; None when it is not declared."""
        module = parameter.rpartition(".")[0]
        if module.startswith(self.blocks + "."):
            inside = parameter.removeprefix(self.blocks + ".").partition(".")[2]
            return self._role_in_block(inside.rpartition(".")[0], inside)
        if module in self.embeddings:
            return "embedding"
        if module in (*self.outer, self.embedding_norm):
            return "outer"
        return {self.final_norm: "final_norm", self.head: "head"}.get(module)  # type: ignore[return-value]

    def _role_in_block(self, module: str, parameter: str) -> Role | None:
        if module in {norm.name for norm in self.norms}:
            return "norm"
        if module in self.readers:
            return "reader"
        if module in self.writers:
            return "writer"
        if self.experts and parameter in self.experts.parameters:
            return "reader" if parameter == self.experts.parameters[0] else "writer"
        inner = (*self.inner, *(norm.after for norm in self.norms if norm.after))
        return "inner" if any(module == name or module.startswith(f"{name}.") for name in inner) else None
