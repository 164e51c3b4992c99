"""How much of the sparsity each matrix takes, as `allocation:` in the recipe says.

uniform: every matrix the same share. global: one threshold for the scores of all matrices: |w| without data, else the
loss that the Fisher information predicts. owl, alphapruning: by block, from outliers among |w| ||x|| and from the
spectrum. pq: by matrix, from the PQ Index. What each is, and whose, says `linalg/allocation.py`. solved: by block, from
measured losses (`methods/solved.py`).
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

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
from slimlm.linalg.ridge import WIDE
from slimlm.matrices import matrix
from slimlm.methods.fisher import TokenGradients, gradients_of, row_fisher
from slimlm.methods.matrix import Choice, curvature_of
from slimlm.methods.solved import MOST, solved_shares
from slimlm.recipe import FISHERS, PruneStep
from slimlm.walk import StreamedModel
from slimlm.work import Work

InputNorms = Callable[[int], dict[str, Tensor]]  # of a block's linears, by name: [in]


def allocate(
    model: StreamedModel,
    recipe: PruneStep,
    choice: Choice,
    work: Work,
    batches: list[Tensor],
    input_norms: InputNorms,
) -> dict[str, int]:
    """How many weights go of each matrix, by full name; as many as uniform sparsity prunes in all.

    input_norms: called for each block in turn, with its weights loaded; it passes the calibration data on.
    """
    record = work.journal.last("allocation")
    if record:
        return dict(record["counts"])
    sizes = {name: shape.numel() for name, shape in model.matrices.items()}
    total = sum(round(recipe.sparsity * size) for size in sizes.values())
    if recipe.allocation != "uniform" and total > (1 - LEAST_KEPT) * sum(sizes.values()):
        raise UserError(f"--allocation {recipe.allocation} leaves {LEAST_KEPT:.0%} of every matrix: lower --sparsity")
    if recipe.allocation == "solved" and recipe.sparsity > MOST:
        raise UserError(f"--allocation solved measures blocks up to a sparsity of {MOST:g}: lower --sparsity")
    if recipe.allocation == "solved":
        shares = solved_shares(model, recipe.sparsity, choice, batches, work)
        of = {name: shares[_block_number(model, name)] for name in sizes}
        counts = exact_counts(sizes, lambda name, c: of[name] + c, total, -1.0, 1.0)
    else:
        counts = _counts(model, recipe, choice, work, input_norms, sizes, total)
    work.journal.commit("allocation", counts=counts)
    return counts


def _counts(
    model: StreamedModel,
    recipe: PruneStep,
    choice: Choice,
    work: Work,
    input_norms: InputNorms,
    sizes: dict[str, int],
    total: int,
) -> dict[str, int]:
    if recipe.allocation == "uniform":
        return {name: round(recipe.sparsity * size) for name, size in sizes.items()}
    work.progress.stage("allocating", len(model.blocks))
    histograms: dict[str, Tensor] = {}
    kept: dict[str, float] = {}  # of matrices, from the PQ Index
    merits: dict[int, float] = {}  # of blocks that have anything to prune
    for index, block in _blocks(model, work):
        weights = {name: matrix(block, name).float() for name in model.anatomy[index].linears}
        part = model.family.block(index)
        if recipe.allocation == "global":
            gradients = gradients_of(model, work, index) if choice.curvature != "none" else {}
            for name, scores in global_scores(weights, gradients, part, recipe, choice):
                histograms[f"{part}.{name}"] = histogram(scores)
        elif recipe.allocation == "pq":
            kept |= {f"{part}.{name}": pq_share(weight) for name, weight in weights.items()}
        elif recipe.allocation == "alphapruning":
            if weights:
                merits[index] = sum(map(hill_alpha, weights.values())) / len(weights)
        else:
            norms = input_norms(index)
            outliers = [(weight.abs() * norms[name]).flatten() for name, weight in weights.items() if name in norms]
            if outliers:
                merits[index] = outlier_ratio(torch.cat(outliers))
    if recipe.allocation == "global":
        # Of a matrix nothing is known of, its share like in a uniform allocation.
        unknown = {name: round(recipe.sparsity * size) for name, size in sizes.items() if name not in histograms}
        return {**global_counts(histograms, total - sum(unknown.values())), **unknown}
    if recipe.allocation == "pq":
        most, least = max(kept.values()), max(min(kept.values()), 1e-12)
        return exact_counts(sizes, lambda name, c: 1 - (1 - c) * kept[name] / most, total, 1 - most / least, 1.0)
    spread = owl_shares if recipe.allocation == "owl" else alpha_shares
    shares = dict(zip(merits, spread(list(merits.values()), recipe.sparsity), strict=True))
    of = {name: shares.get(_block_number(model, name), recipe.sparsity) for name in sizes}
    if recipe.allocation == "owl":
        return exact_counts(sizes, lambda name, c: of[name] + c, total, -1.0, 1.0)
    return exact_counts(sizes, lambda name, c: of[name] * c, total, 0.0, 1 / min(shares.values()))


def global_scores(
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, TokenGradients],
    part: str,
    recipe: PruneStep,
    choice: Choice,
) -> Iterator[tuple[str, Tensor]]:
    """What pruning each weight [out, in] of a block's linears alone is predicted to cost, on one scale for the model.

    |w| without data; w^2 / (2 [F^-1]) for Fisher information; else the inputs' Gram times the mean square of the
    output's gradient, as in K-FAC (Martens & Grosse, arXiv 1503.05671). Both are means over the tokens a linear sees:
    an expert's count by the share of all tokens that reach it, and one that none reached is left out.
    Raises RunFailure with a linear's name.
    """
    everyone = max((len(found.x) for found in gradients.values()), default=1)
    last: tuple[Tensor, Tensor] | None = None  # inputs and the diagonal of their inverse Gram: neighbours share them
    for name, weight in weights.items():
        if choice.curvature == "none":
            yield name, weight.abs()
            continue
        found = gradients.get(name)
        if found is None:
            continue
        share = len(found.x) / everyone
        if choice.curvature in FISHERS:
            try:
                diagonal = row_fisher(found, recipe.fisher_damping, choice.curvature == "block-fisher").diagonal()
            except ValueError as error:
                raise RunFailure(f"{part}.{name} cannot be pruned: {error}") from error
            yield name, share * weight.double().square() / diagonal / 2
            continue
        if last is None or last[0] is not found.x:
            x = found.x.float() if found.x.shape[1] > WIDE else found.x
            last = found.x, curvature_of(x.T @ x / len(x), f"{part}.{name}").diagonal()
        yield name, share * found.delta.square().mean(0)[:, None] * weight.square() / last[1] / 2


def _blocks(model: StreamedModel, work: Work) -> Iterator[tuple[int, nn.Module]]:
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            yield index, block
        work.progress.step()


def _block_number(model: StreamedModel, name: str) -> int:
    return int(name.removeprefix(model.family.blocks + ".").partition(".")[0])
