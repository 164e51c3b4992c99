"""M-FAC's inverse Fisher matrices: against the published recursion, and what a step of its optimizer costs.

    python eval/mfac.py --gradients 256 --weights 100000

First the static one, that pruning has, beside the recursion (Frantar et al., arXiv 2107.03356, section 3.1), which adds
one gradient after another: CPU seconds of both, and the largest relative difference. Then the window of the optimizer
(section 3.2) over d, its weights, and over m, its gradients: replacing a gradient, factoring, multiplying, and the
lines that fit: linear in d, and in m^2 and m^3 where those count.
"""

import argparse
import time
from collections.abc import Callable

import numpy
import torch

from slimlm.linalg.fisher import low_rank_inverse
from slimlm.linalg.window import GradientWindow

WEIGHTS = (250_000, 500_000, 1_000_000, 2_000_000, 4_000_000)
GRADIENTS = (32, 64, 128, 256, 512, 1024, 2048)


def recursion(gradients: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows v_i = F_(i-1)^-1 g_i and their denominators m + g_i^T v_i."""
    m = len(gradients)
    vectors = torch.empty_like(gradients)
    scales = torch.empty(m, dtype=gradients.dtype)
    for i, gradient in enumerate(gradients):
        vectors[i] = gradient / damping - vectors[:i].T @ ((vectors[:i] @ gradient) / scales[:i])
        scales[i] = m + gradient @ vectors[i]
    return vectors, scales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradients", type=int, default=256, help="m")
    parser.add_argument("--weights", type=int, default=100_000, help="d")
    parser.add_argument("--damping", type=float, default=1e-3, help="in mean diagonals of the Fisher matrix")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"fp64, {torch.get_num_threads()} threads")
    static(arguments)
    sliding(arguments.repeats)


def static(arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(arguments.gradients, arguments.weights, dtype=torch.float64, generator=generator)
    damping = arguments.damping * float(gradients.square().mean())
    x = torch.randn(arguments.weights, dtype=torch.float64, generator=generator)
    slow, (vectors, scales) = best(lambda: recursion(gradients, damping), arguments.repeats)
    fast, inverse = best(lambda: low_rank_inverse(gradients, damping), arguments.repeats)
    window = GradientWindow(x, arguments.gradients, damping)
    for place, gradient in enumerate(gradients):
        window.replace(place, gradient)
    diagonal = 1 / damping - (vectors.square() / scales[:, None]).sum(0)
    product = x / damping - vectors.T @ ((vectors @ x) / scales)
    print(
        f"m = {arguments.gradients}, d = {arguments.weights}: recursion {slow:.2f} s, slimlm {fast:.2f} s, "
        f"{slow / fast:.1f} times as fast"
    )
    for name, ours, published in (
        ("diagonal", inverse.diagonal(), diagonal),
        ("product", inverse.times(x), product),
        ("product of the window", window.times(x), product),
    ):
        print(
            f"{name}: largest relative difference {float((ours - published).abs().max() / published.abs().max()):.1e}"
        )


def sliding(repeats: int) -> None:
    rows = {(64, d): costs(64, d, repeats) for d in WEIGHTS}
    rows |= {(m, 65_536): costs(m, 65_536, repeats) for m in GRADIENTS}
    print("| m | d | replace, ms | factor, ms | times, ms |\n| --- | --- | --- | --- | --- |")
    for (m, d), found in rows.items():
        print(f"| {m} | {d:,} | " + " | ".join(f"{1e3 * one:.2f}" for one in found) + " |")
    for part, name in ((0, "replace"), (2, "times")):
        fit(f"{name} over d at m = 64", [float(d) for d in WEIGHTS], [rows[64, d][part] for d in WEIGHTS], [1])
    fit("factor over m", list(map(float, GRADIENTS)), [rows[m, 65_536][1] for m in GRADIENTS], [2, 3])
    fit("times over m", list(map(float, GRADIENTS)), [rows[m, 65_536][2] for m in GRADIENTS], [1, 2])


def costs(m: int, d: int, repeats: int) -> tuple[float, float, float]:
    """Seconds to replace a gradient, to factor what follows from it, and to multiply with the inverse."""
    window = GradientWindow(torch.zeros(d, dtype=torch.float64), m, 1.0)
    for place in range(m):
        window.replace(place, torch.randn(d, dtype=torch.float64))
    gradient = torch.randn(d, dtype=torch.float64)
    replacing, _ = best(lambda: window.replace(1, gradient), repeats)

    def factored() -> torch.Tensor:
        window._factor = None
        return window.factor()

    factoring, _ = best(factored, repeats)
    multiplying, _ = best(lambda: window.times(gradient), repeats)
    return replacing, factoring, multiplying


def best(run: Callable[[], object], repeats: int) -> tuple[float, object]:
    """CPU seconds of the fastest of some runs, and what the last one gave."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        found = run()
        times.append(time.process_time() - start)
    return min(times), found


def fit(name: str, sizes: list[float], seconds: list[float], powers: list[int]) -> None:
    """seconds = a + sum of b_p size^p, by least squares of relative errors, and how much of the spread it explains."""
    x, y = numpy.array(sizes), numpy.array(seconds)
    columns = numpy.stack([numpy.ones_like(x), *(x**p for p in powers)], 1)
    found, *_ = numpy.linalg.lstsq(columns / y[:, None], numpy.ones_like(y), rcond=None)
    worst = numpy.abs(columns @ found / y - 1).max()
    slope = numpy.polyfit(numpy.log(x[-3:]), numpy.log(y[-3:]), 1)[0]
    terms = " + ".join(f"{value:.2e} x^{p}" for p, value in zip([0, *powers], found, strict=True))
    print(f"{name}: {terms} s, off by at most {worst:.0%}; over the last three sizes it grows with x^{slope:.2f}")


if __name__ == "__main__":
    main()
