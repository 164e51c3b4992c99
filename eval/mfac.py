"""M-FAC's static inverse Fisher: slimlm's GEMM form against the published recursion, side by side in one run.

    python eval/mfac.py --gradients 256 --weights 100000

The recursion (Frantar et al., arXiv 2107.03356, section 3.1) adds one gradient after another. Prints
seconds of both, their ratio, and the largest relative difference between their diagonals, products and elements.
"""

import argparse
import time

import torch

from slimlm.linalg.fisher import low_rank_inverse


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
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(arguments.gradients, arguments.weights, dtype=torch.float64, generator=generator)
    damping = arguments.damping * float(gradients.square().mean())
    x = torch.randn(arguments.weights, dtype=torch.float64, generator=generator)
    times: dict[str, list[float]] = {"recursion": [], "slimlm": []}
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        vectors, scales = recursion(gradients, damping)
        times["recursion"].append(time.perf_counter() - start)
        start = time.perf_counter()
        inverse = low_rank_inverse(gradients, damping)
        times["slimlm"].append(time.perf_counter() - start)
    published = {
        "diagonal": 1 / damping - (vectors.square() / scales[:, None]).sum(0),
        "product": x / damping - vectors.T @ ((vectors @ x) / scales),
        "elements": torch.stack([-(vectors[:, 0] * vectors[:, j] / scales).sum() for j in range(1, 1000)]),
    }
    ours = {
        "diagonal": inverse.diagonal(),
        "product": inverse.times(x),
        "elements": torch.stack([inverse.element(0, j) for j in range(1, 1000)]),
    }
    best = {name: min(values) for name, values in times.items()}
    print(f"m = {arguments.gradients}, d = {arguments.weights}, fp64, {torch.get_num_threads()} threads")
    print(
        f"recursion {best['recursion']:.2f} s, slimlm {best['slimlm']:.2f} s: {best['recursion'] / best['slimlm']:.1f}x"
    )
    for name, value in ours.items():
        error = float((value - published[name]).abs().max() / published[name].abs().max())
        print(f"{name}: largest relative difference {error:.1e}")


if __name__ == "__main__":
    main()
