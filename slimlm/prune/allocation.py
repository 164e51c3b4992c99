"""How much of the sparsity each matrix takes, one function for each name that `allocation:` in the recipe takes.

uniform: every matrix the same share. global: one threshold for the scores of all matrices. owl, alphapruning: by block,
from outliers among |w| ||x|| and from the spectrum. pq: by matrix, from the PQ Index. solved: by block, from measured
losses (`solved.py`). What each is, and whose, says `linalg/allocation.py`. All prune as many weights as uniform does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.errors import RunFailure, UserError
from slimlm.linalg.allocation import (
    LEAST_KEPT,
    alpha_shares,
    exact_counts,
    global_counts,
    hill_alpha,
    histogram,
    outlier_ratio,
    owl_shares,
    pq_share,
)
from slimlm.linalg.gram import gram_dtype
from slimlm.model.block import Block
from slimlm.model.streamed import StreamedModel
from slimlm.prune.curvature import damped, row_fisher
from slimlm.prune.group import Gradients, Row
from slimlm.prune.masks import taylor
from slimlm.ranks import Ranks

Counts = dict[str, int]  # of weights that go, by a matrix's full name
Scores = Iterable[tuple[str, Tensor]]  # of a block's linears, by name within it: [out, in] each
InputNorms = Callable[[Block], Mapping[str, Tensor]]  # of a block's linears, by name within it: [in] each


@dataclass(frozen=True)
class Matrices:
    """What a sparsity is to be shared out over: sizes of all matrices, and the blocks they are in, by full name."""

    sparsity: float
    sizes: Mapping[str, int]
    block_of: Mapping[str, int]

    @classmethod
    def of(cls, model: StreamedModel, sparsity: float) -> "Matrices":
        """All that methods prune of a model."""
        blocks = {name: group.block.index for group in model.groups for name in group.full_names}
        return cls(sparsity, {name: shape.numel() for name, shape in model.matrices.items()}, blocks)

    @property
    def total(self) -> int:
        """Weights that go in all."""
        return sum(self.uniform().values())

    def uniform(self) -> Counts:
        """The same share of every matrix."""
        return {name: round(self.sparsity * size) for name, size in self.sizes.items()}

    def check(self, allocation: str, most: float = 1.0) -> None:
        """Raises UserError for a sparsity that leaves less of a matrix than it has to."""
        if self.total > (1 - LEAST_KEPT) * sum(self.sizes.values()):
            raise UserError(f"--allocation {allocation} leaves {LEAST_KEPT:.0%} of every matrix: lower --sparsity")
        if self.sparsity > most:
            raise UserError(f"--allocation {allocation} measures blocks up to a sparsity of {most:g}: lower --sparsity")

    def by_block(self, shares: Mapping[int, float], scaled: bool = False) -> Counts:
        """The same share of every matrix of a block, the whole moved, or scaled, to the total.

        A block without a share gets the sparsity.
        """
        of = {name: shares.get(block, self.sparsity) for name, block in self.block_of.items()}
        if scaled:
            return exact_counts(self.sizes, lambda name, c: of[name] * c, self.total, 0.0, 1 / min(shares.values()))
        return exact_counts(self.sizes, lambda name, c: of[name] + c, self.total, -1.0, 1.0)


def by_threshold(scored: Iterable[tuple[Block, Scores]], matrices: Matrices, ranks: Ranks) -> Counts:
    """`global`: one threshold for all scores; a matrix without scores loses its share like in a uniform allocation.

    scored: of all ranks' blocks this one's.
    """
    own = {f"{block.path}.{name}": histogram(found) for block, scores in scored for name, found in scores}
    merged = ranks.merged(own)
    histograms = {name: merged[name] for name in matrices.sizes if name in merged}  # ties are broken by the order
    unknown = {name: count for name, count in matrices.uniform().items() if name not in histograms}
    return {**global_counts(histograms, matrices.total - sum(unknown.values())), **unknown}


def pq(some: Iterable[Block], matrices: Matrices, ranks: Ranks) -> Counts:
    """In proportion to what the PQ Index says can go. some: of all ranks' blocks this one's."""
    own = {name: pq_share(weight) for block in some for name, weight in _weights(block, full=True)}
    kept = ranks.merged(own)
    most, least = max(kept.values()), max(min(kept.values()), 1e-12)
    return exact_counts(
        matrices.sizes, lambda name, c: 1 - (1 - c) * kept[name] / most, matrices.total, 1 - most / least, 1.0
    )


def alphapruning(some: Iterable[Block], matrices: Matrices, ranks: Ranks) -> Counts:
    """Less of blocks whose spectra have heavy tails. some: of all ranks' blocks this one's."""
    own: dict[int, float] = {}
    for block in some:
        found = [hill_alpha(weight) for _, weight in _weights(block)]
        if found:
            own[block.index] = sum(found) / len(found)
    alphas = dict(sorted(ranks.merged(own).items()))
    shares = alpha_shares(list(alphas.values()), matrices.sparsity)
    return matrices.by_block(dict(zip(alphas, shares, strict=True)), scaled=True)


def owl(walk: Iterable[Block], matrices: Matrices, input_norms: InputNorms) -> Counts:
    """Less of blocks with many outliers. input_norms: asked of each block in turn."""
    ratios: dict[int, float] = {}
    for block in walk:
        norms = input_norms(block)
        outliers = [(weight.abs() * norms[name]).flatten() for name, weight in _weights(block) if name in norms]
        if outliers:
            ratios[block.index] = outlier_ratio(torch.cat(outliers))
    shares = owl_shares(list(ratios.values()), matrices.sparsity)
    return matrices.by_block(dict(zip(ratios, shares, strict=True)))


def _weights(block: Block, full: bool = False) -> Iterator[tuple[str, Tensor]]:
    """[out, in] fp32 of all that is pruned of a block; by full name, or by name within it."""
    for name in block.family.linears:
        yield f"{block.path}.{name}" if full else name, block.matrix(name).float()


def global_scores(block: Block, gradients: Gradients, row: Row, damping: float) -> Iterator[tuple[str, Tensor]]:
    """What pruning each weight [out, in] of a block's linears alone is predicted to cost, on one scale for the model.

    |w| without data; w^2 / (2 [F^-1]) for Fisher information; else the inputs' Gram times the mean square of the
    output's gradient, as in K-FAC (Martens & Grosse, arXiv 1503.05671). Both are means over the tokens a linear sees:
    an expert's count by the share of all tokens that reach it, and one that none reached is left out.
    Raises RunFailure with a linear's name. damping: of the Fisher information, in mean diagonals.
    """
    if row.curvature == "none":
        yield from ((name, weight.abs()) for name, weight in _weights(block))
        return
    everyone = max((len(found.x) for found in gradients.values()), default=1)
    last: tuple[Tensor, Tensor] | None = None  # inputs and the diagonal of their inverse Gram: neighbours share them
    for name, weight in _weights(block):
        found = gradients.get(name)
        if found is None:
            continue
        share, full = len(found.x) / everyone, f"{block.path}.{name}"
        if row.sees_fisher:
            fisher = row_fisher(found, damping, row.curvature == "block-fisher")
            if row.mask is taylor:
                yield name, share * weight.double().square() * fisher.squares()
                continue
            try:
                diagonal = fisher.diagonal()
            except ValueError as error:
                raise RunFailure(f"{full} cannot be pruned: {error}") from error
            yield name, share * weight.double().square() / diagonal / 2
            continue
        if last is None or last[0] is not found.x:
            x = found.x.to(gram_dtype(found.x.shape[1]))
            last = found.x, damped(x.T @ x / len(x), full).diagonal()
        yield name, share * found.delta.square().mean(0)[:, None] * weight.square() / last[1] / 2
