"""The shapes of all tensors for any widths, and how many parameters they come to."""

import itertools
import math
from collections import Counter
from functools import cached_property

from slimlm.checkpoint.skeleton import parameter_count
from slimlm.model.block import Kind
from slimlm.model.linears import turned_shape
from slimlm.model.walk import every, picked, places
from slimlm.slice.widths import Layout, Widths

_RESIDUAL_AXIS = {"embedding": -1, "norm": 0, "reader": -1, "writer": -2, "final_norm": 0, "head": -1}
Sizes = tuple[int, ...]
Powers = tuple[int, int, int]  # of hidden, mlp and groups
Polynomial = dict[Powers, int]  # how many parameters go with which
Shape = tuple[str, str, str, Sizes]  # name, role, module within its block, sizes


class Shapes:
    """What a model's tensors are in other widths. Raises UserError for weights the family does not declare."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.model = layout.model
        self.dense = layout.dense

    def removed_share(self, widths: Widths) -> float:
        """Of all parameters."""
        return 1 - self.parameters(widths) / self.whole

    @cached_property
    def whole(self) -> int:
        """Parameters of the dense model, which take longer to count than any other's."""
        return parameter_count(self.model.model)

    @cached_property
    def _dense_shapes(self) -> list[Shape]:
        """Raises UserError for weights the family does not declare."""
        model = self.model
        model.require_declared("slice")
        return [
            (name, str(model.family.role(name)), name.removeprefix(model.family.blocks + "."), tuple(tensor.shape))
            for name, tensor in model.model.state_dict().items()
        ]

    def of(self, widths: Widths) -> dict[str, Sizes]:
        """Module tensor -> shape in the model of these widths."""
        model, shapes = self.model, dict[str, Sizes]()
        number = {str(index): str(place) for index, place in places(widths.blocks).items()}
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
            shapes |= {f"{model.family.blocks}.{block}.{name}": (widths.hidden,) for name in self.layout.zeros(widths)}
        return shapes

    def _is_stored(self, name: str, widths: Widths) -> bool:
        if self.layout.folds(widths) and name.rpartition(".")[0] == self.model.family.embedding_norm:
            return False
        tied = name in self.model.model.all_tied_weights_keys
        return not tied or (name.startswith(self.model.family.head + ".") and not self.layout.keeps_tie(widths))

    def _shape_of(self, entry: Shape, widths: Widths) -> Sizes:
        name, role, inside, dense_shape = entry
        shape = list(turned_shape(self.model.model, name, dense_shape))
        moved = role in _RESIDUAL_AXIS and widths.hidden != self.dense.hidden
        if moved and not (role in ("reader", "head") and len(shape) == 1):
            shape[_RESIDUAL_AXIS[role] if len(shape) > 1 else 0] = widths.hidden
        if inside != name:
            self._narrow(shape, inside.partition(".")[2], widths)
        return turned_shape(self.model.model, name, tuple(shape))

    def _narrow(self, shape: list[int], name: str, widths: Widths) -> None:
        """Of a linear's weight [out, in] or bias [out], or a packed parameter [experts, out, in]."""
        names = {name, name.rpartition(".")[0]}
        for axis_name, axis in self.layout.axes.items():
            full, width = self.dense.of(axis_name), widths.of(axis_name)
            if names & {*axis.rows}:
                place = max(0, len(shape) - 2)
                shape[place] = shape[place] // full * width
            if names & {*axis.columns} and len(shape) > 1:
                shape[-1] = shape[-1] // full * width

    def counted(self, blocks: tuple[int, ...]) -> Counter[Kind]:
        """How many of these blocks are of each kind."""
        return Counter(picked(self._kinds, blocks))

    def products(self, kind: Kind, widths: Widths) -> Counter[tuple[int, int]]:
        """Of the linears in a block of a kind, and how many there are of each: [out, in]."""
        linears = [entry for entry in self._of_kind[kind] if entry[1] in ("reader", "writer") and len(entry[3]) == 2]
        return Counter(self._product(entry, widths) for entry in linears)

    def head_product(self, widths: Widths) -> tuple[int, int]:
        """The head's: [out, in]."""
        name = f"{self.model.family.head}.weight"
        return self._product(next(entry for entry in self._outside if entry[0] == name), widths)

    def _product(self, entry: Shape, widths: Widths) -> tuple[int, int]:
        out, inner = turned_shape(self.model.model, entry[0], self._shape_of(entry, widths))
        return out, inner

    def parameters(self, widths: Widths) -> int:
        """Counted without listing tensors: there may be very many widths to choose from."""
        hidden, mlp, groups = widths.hidden, widths.mlp, widths.groups
        if widths.blocks not in self._polynomials:
            self._polynomials[widths.blocks] = self._polynomial(widths.blocks)
        inside: int = sum(
            count * hidden**h * mlp**m * groups**g for (h, m, g), count in self._polynomials[widths.blocks].items()
        )
        zeros = len(self.layout.zeros(widths)) * widths.hidden * len(widths.blocks)
        outside = (
            math.prod(self._shape_of(entry, widths)) for entry in self._outside if self._is_stored(entry[0], widths)
        )
        return sum(outside) + inside + zeros

    @cached_property
    def _outside(self) -> list[Shape]:
        return [entry for entry in self._dense_shapes if entry[0] == entry[2]]

    @cached_property
    def _polynomials(self) -> dict[tuple[int, ...], Polynomial]:
        return {}

    def _polynomial(self, blocks: tuple[int, ...]) -> Polynomial:
        """Parameters inside some blocks, by powers of hidden, MLP and groups."""
        total: Counter[Powers] = Counter()
        for kind, count in self.counted(blocks).items():
            total.update({powers: count * one for powers, one in self._corners[kind].items()})
        return {powers: count for powers, count in total.items() if count}

    @cached_property
    def _kinds(self) -> list[Kind]:
        return every(self.model, lambda block: block.kind)

    @cached_property
    def _of_kind(self) -> dict[Kind, list[Shape]]:
        """What the first block of every kind has."""
        inside: dict[str, list[Shape]] = {}
        for entry in self._dense_shapes:
            if entry[0] != entry[2]:
                inside.setdefault(entry[2].partition(".")[0], []).append(entry)
        return {kind: inside[str(self._kinds.index(kind))] for kind in self._kinds}

    @cached_property
    def _corners(self) -> dict[Kind, Polynomial]:
        """Parameters of each kind of block as a polynomial, no power above one, in hidden, MLP and groups."""
        found: dict[Kind, Polynomial] = {}
        for kind, entries in self._of_kind.items():
            values = {
                (h, m, g): sum(math.prod(self._shape_of(entry, Widths(h, m, g, ()))) for entry in entries)
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
