"""Refit of a sliced block beside the dense one (`fit/beside_dense.py`): ridge regression towards the rotated weights.

Units of narrower axes are deleted when their turn comes, by structured OBS on the compressed model's own activations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.families import Axis, Norm
from slimlm.fit.beside_dense import BlockPair, Writing
from slimlm.fit.pair import Pair
from slimlm.fit.refine import Refiner
from slimlm.linalg.regression import Regression
from slimlm.model.block import Block
from slimlm.model.rotation import norm_of, seen_through, slice_block
from slimlm.slice.narrow import narrow_experts, narrow_rows, without_units
from slimlm.slice.widths import Layout, Widths


@dataclass(frozen=True)
class Refit:
    """How blocks are sliced and refitted: to these widths, in the pair's basis."""

    layout: Layout
    widths: Widths
    pair: Pair
    refiner: Refiner

    def block(self, dense: Block, small: Block) -> dict[str, Tensor]:
        """The compressed block's parameters as they are stored, by name within it, linears' as [out, in]; the dense
        one's weights are loaded and let go of, and its stream goes past it."""
        block = self._begun(dense, small)
        for step in block.in_order():
            match step:
                case Norm():
                    self._fit_readers(block, step)
                case Writing():
                    self._fit_writer(block, step)
        self.refiner.refine(block)
        return block.tensors

    def _begun(self, dense: Block, small: Block) -> BlockPair:
        """With all that is not to be fitted to what readers see."""
        family, block = dense.family, BlockPair(self.pair, dense, small, {})
        fitted = {name for norm in family.norms if norm.readers for name in family.fitting(norm)}
        others = {name: tensor for name, tensor in dense.weights().items() if name not in fitted}
        for name, tensor in slice_block(others, family, self.pair.basis, self.layout.zeros(self.widths)):
            block.store(name, tensor)
        return block

    def _fit_readers(self, block: BlockPair, norm: Norm) -> None:
        """All readers of a norm see the same, so one map T from what they see now to what they saw serves all:
        W' = W T."""
        family = block.dense.family
        if family.fitting(norm):
            self._fit_map(block, norm)
        if family.experts and norm is family.norms[-1] and self.widths.mlp < self.layout.dense.mlp:
            streams = self.pair.streams
            starved = narrow_experts(block.small, streams["small"], family.experts, self.widths.mlp, block.tensors)
            for name, tokens in starved.items():
                streams.figures[f"{block.small.index}.{name} starved_experts"] = float(tokens)
            for parameter in family.experts.parameters:
                block.store(parameter, block.tensors[parameter])

    def _fit_map(self, block: BlockPair, norm: Norm) -> None:
        weights, basis = block.dense.weights(), self.pair.basis
        data = block.reader_data(norm)
        readers = block.dense.family.fitting(norm)
        metric = torch.zeros(len(basis), len(basis), dtype=torch.float32, device=basis.device)
        for name in readers:
            weight = weights[name].float().flatten(0, -2)
            metric.addmm_(weight.T, weight)
            del weight  # one reader in fp32 at a time
        prior = seen_through(norm_of(weights, norm.name), self.pair.dense.family, basis)
        fit = block.fit(norm.label, data, prior, metric)
        del data, metric, prior  # as large together as the readers that are made now
        for name in readers:
            block.store(name, weights[name].float() @ fit.weight)

    def _fit_writer(self, block: BlockPair, writing: Writing) -> None:
        data = block.writer_data(writing)
        for name, axis in self.layout.axes.items():
            if writing.name in axis.columns and self.widths.of(name) < self.layout.dense.of(name):
                data = self._narrow(block, name, axis, writing.name, data)
        weight = f"{writing.name}.weight"
        block.store(weight, block.fit(writing.name, data, block.tensors[weight]).weight)

    def _narrow(self, block: BlockPair, axis_name: str, axis: Axis, linear: str, data: Regression) -> Regression:
        """Delete units of an axis from all its linears; what is left of the data."""
        full, width = self.layout.dense.of(axis_name), self.widths.of(axis_name)
        weight, tensors = f"{linear}.weight", block.tensors
        size = tensors[weight].shape[1] // full
        ranks, found = self.pair.deal.ranks, None
        with data.gram() as gram:
            if ranks.first:
                found = without_units(gram, tensors[weight], size, full - width, linear)
        del gram
        kept, tensors[weight] = ranks.once(found and found[0]), ranks.once(found and found[1])
        narrow_rows(self.layout, axis, kept, tensors)
        return data.take(kept.repeat_interleave(size).nonzero().flatten())
