"""How much of a sparsity each matrix takes: published figures of merit, and exact counts from them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

BINS = 1 << 16  # of scores, by the leading bits of their fp32: a threshold is exact to 1 in 128
OUTLIER = 5.0  # times a matrix's mean from which on a score is an outlier (OWL, section 3.2: M = 5 or 7)
OWL_SPAN = 0.08  # how far a block's sparsity may be from the mean (OWL, section 4: lambda)
ALPHA_SPAN = 0.3  # the same for AlphaPruning, as a share of the sparsity (section 3.2: tau)
LEAST_KEPT = 0.01  # of a matrix, whatever its figures say


def pq_index(weight: Annotated[Tensor, "..."], with_zeros: bool = False) -> float:
    """PQ Index (Diao et al., arXiv 2302.05601, definition 1) of d weights: 1 - d^(1/q - 1/p) ||w||_p / ||w||_q,
    with p = 1/2 and q = 1.

    0 when all weights are equal; the larger, the fewer weights carry the matrix. As in SAP (algorithm 1) the d weights
    are those that are still active, not zero, unless zeros are to count like the others.
    """
    size = weight.abs().double().flatten()
    size = size if with_zeros else size[size > 0]
    largest = size.max() if size.numel() else 0
    if largest == 0:
        return 0.0
    size = size / largest
    return float(1 - size.numel() ** -1.0 * (size.sqrt().sum().square() / size.sum()))


def pq_kept(index: float) -> float:
    """The share of weights that a PQ index says to keep at least (theorem 2, eta = 0): (1 - I)^(pq / (q - p))."""
    return 1 - index


def pq_share(weight: Annotated[Tensor, "..."]) -> float:
    """The share of a matrix's weights, zeros counted, that the PQ Index of its active ones says to keep."""
    return pq_kept(pq_index(weight)) * int(weight.count_nonzero()) / weight.numel()


def spectrum(weight: Annotated[Tensor, "m n"]) -> Annotated[Tensor, "min(m,n)"]:
    """Eigenvalues of W^T W or W W^T, whichever has fewer, largest first, fp64; to 1e-16 of the largest."""
    weight = weight.double()
    smaller = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    energies: Tensor = torch.linalg.eigvalsh(smaller).flip(0).clamp_min(0)
    return energies


def hill_alpha(weight: Annotated[Tensor, "m n"]) -> float:
    """`tail_exponent` of a matrix's spectrum."""
    return tail_exponent(spectrum(weight))


def tail_exponent(energies: Annotated[Tensor, "n"]) -> float:
    """PL_Alpha_Hill of AlphaPruning (Lu et al., arXiv 2410.10912, eq. 1) for eigenvalues, largest first.

    Fitted to the larger half of the eigenvalues of W^T W. The heavier the tail (the smaller alpha), the better trained.
    """
    energies = energies.flip(0)
    half = max(1, len(energies) // 2)
    tail = energies[-half:] / energies[-half - 1 if half < len(energies) else 0].clamp_min(1e-300)
    return float(1 + half / tail.log().sum().clamp_min(1e-12))


def outlier_ratio(scores: Annotated[Tensor, "..."]) -> float:
    """Share of scores above OUTLIER times their mean (OWL, Yin et al., arXiv 2310.05175, eq. 1)."""
    return float((scores > OUTLIER * scores.mean()).double().mean())


def owl_shares(ratios: Sequence[float], sparsity: float) -> list[float]:
    """Sparsity of each block: more outliers, less of it; spread over 2 OWL_SPAN around the mean (OWL, section 3.3)."""
    low, high = min(ratios), max(ratios)
    scaled = [(ratio - low) / max(high - low, 1e-30) * 2 * OWL_SPAN for ratio in ratios]
    mean = sum(scaled) / len(scaled)
    return [sparsity + mean - value for value in scaled]


def alpha_shares(alphas: Sequence[float], sparsity: float) -> list[float]:
    """Sparsity of each block before it is scaled to the total: linear in alpha (AlphaPruning, eq. 3)."""
    low, high = min(alphas), max(alphas)
    return [sparsity * (1 - ALPHA_SPAN + 2 * ALPHA_SPAN * (alpha - low) / max(high - low, 1e-30)) for alpha in alphas]


def exact_counts(
    sizes: Mapping[str, int], share: Callable[[str, float], float], total: int, low: float, high: float
) -> dict[str, int]:
    """Whole numbers of weights per matrix, `total` in all: round(share(name, c) * size) for the c that gives it.

    share(name, c) rises with c between low and high; it is cut off at 0 and at what LEAST_KEPT leaves. Raises
    ValueError for a total that cannot be had.
    """

    def exact(c: float) -> dict[str, float]:
        return {name: min(max(share(name, c), 0.0), 1 - LEAST_KEPT) * size for name, size in sizes.items()}

    if not 0 <= total <= (1 - LEAST_KEPT) * sum(sizes.values()):
        raise ValueError(f"cannot prune {total} of {sum(sizes.values())} weights")
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(exact(middle).values()) < total else (low, middle)
    wanted = exact(high)
    counts = {name: int(value) for name, value in wanted.items()}
    rest = sorted(counts, key=lambda name: counts[name] - wanted[name])  # the largest remainders first
    for place in range(total - sum(counts.values())):
        counts[rest[place % len(rest)]] += 1
    for name in reversed(rest):
        excess = sum(counts.values()) - total
        counts[name] -= min(max(excess, 0), counts[name])
    return counts


def histogram(scores: Annotated[Tensor, "..."]) -> Annotated[Tensor, "bins", int]:
    """How many scores, none of them negative, fall into each of BINS bins: int64, on the CPU."""
    bits = scores.float().contiguous().view(torch.int32).flatten() >> 15
    return torch.bincount(bits, minlength=BINS).cpu()


def global_counts(histograms: Mapping[str, Annotated[Tensor, "bins", int]], total: int) -> dict[str, int]:
    """Of each matrix, how many of its scores are among the `total` smallest of all, but for what LEAST_KEPT leaves of
    it: a matrix that would go whole cuts the model in two (layer collapse, Tanaka et al., arXiv 2006.05467).

    Exact but for scores in the threshold's own bin, which count as equal and are taken from matrices in proportion.
    Raises ValueError for a total that cannot be had.
    """
    sizes = {name: int(bins.sum()) for name, bins in histograms.items()}
    most = {name: size - max(1, int(LEAST_KEPT * size)) for name, size in sizes.items()}
    if not 0 <= total <= sum(most.values()):
        raise ValueError(f"cannot prune {total} of {sum(sizes.values())} weights")
    full: dict[str, int] = {}  # matrices that give all they may; what they do not give the others do
    while True:
        free = {name: bins for name, bins in histograms.items() if name not in full}
        counts = _below_threshold(free, total - sum(full.values())) if free else {}
        over = {name: most[name] for name, count in counts.items() if count > most[name]}
        if not over:
            return {name: full[name] if name in full else counts[name] for name in histograms}
        full |= over


def _below_threshold(histograms: Mapping[str, Tensor], total: int) -> dict[str, int]:
    whole = torch.stack(list(histograms.values())).sum(0).cumsum(0)
    edge = int(torch.searchsorted(whole, total))  # the first bin by whose end `total` are reached
    counts = {name: int(bins[:edge].sum()) for name, bins in histograms.items()}
    at_edge = {name: int(bins[edge]) for name, bins in histograms.items()} if edge < BINS else dict.fromkeys(counts, 0)
    left, room = total - sum(counts.values()), sum(at_edge.values())
    for name, bins in at_edge.items():
        taken = -(-left * bins // room) if room else 0
        counts[name] += min(taken, left)
        left, room = left - min(taken, left), room - bins
    return counts
