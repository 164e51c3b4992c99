"""Whether a compressed model is faster than its dense one, and where it is not, why: facts -> lines."""

from collections.abc import Iterator
from dataclasses import dataclass

from slimlm.evaluation.speed.timing import Ratio

FASTER = 1.03  # times, from which on it is called so
MANY_ZEROS = 0.2
MOSTLY = 0.5  # of a token's time, spent on what is no product
WHOLE, HALF = 64, 32  # what kernels' widths are multiples of


@dataclass(frozen=True)
class Facts:
    """Of a model and its dense one at the smallest batch size.

    prefill, decode: times as fast. kernels: "as stored", or those that leave zeros out. widths, dense_widths: of their
    products, both ends. zeros: share in linears' weights. dtype: as in "bfloat16". is_fast_dtype: whether the device
    has instructions for it. beside: share of a decoded token's time that is no product's, where it is known. flops:
    per token of a prompt, as a share of the dense model's, where they are known.
    """

    name: str
    prefill: Ratio
    decode: Ratio
    kernels: str = "as stored"
    widths: frozenset[int] = frozenset()
    dense_widths: frozenset[int] = frozenset()
    zeros: float = 0.0
    dtype: str = "float32"
    dense_dtype: str = "float32"
    device: str = "cpu"
    is_fast_dtype: bool = True
    beside: float | None = None
    flops: float | None = None


def verdict(facts: Facts) -> list[str]:
    """The first line says how fast it is; the others, where it is not faster in one or both, what may be why."""
    slow = [name for name, ratio in _both(facts) if ratio.of_medians < FASTER]
    first = f"{_called(facts)}: " + ", ".join(
        f"{ratio.of_medians:.2f} times as fast as dense in {name}" for name, ratio in _both(facts)
    )
    if not slow:
        return [first, *_noise(facts)]
    why = list(_reasons(facts, slow)) or [
        "none of the usual reasons holds: another machine, or more rounds, may differ"
    ]
    return [f"{first}: not faster in {' and '.join(slow)}", *_noise(facts), *why]


def _both(facts: Facts) -> list[tuple[str, Ratio]]:
    return [("prefill", facts.prefill), ("decode", facts.decode)]


def _called(facts: Facts) -> str:
    return facts.name if facts.kernels == "as stored" else f"{facts.name} with {facts.kernels} kernels"


def _noise(facts: Facts) -> Iterator[str]:
    """Where rounds do not say which of the two is faster."""
    unsure = [name for name, ratio in _both(facts) if not ratio.is_sure]
    if unsure:
        yield f"noise: rounds do not agree about which is faster in {' and '.join(unsure)}; more --rounds may settle it"


def _reasons(facts: Facts, slow: list[str]) -> Iterator[str]:
    is_stored = facts.kernels == "as stored"
    if facts.zeros >= MANY_ZEROS and is_stored:
        yield (
            f"zeros: {facts.zeros:.0%} of its linears' weights are zeros that a stock checkpoint stores and multiplies "
            "like any others; they speed up nothing without kernels that leave them out"
        )
    if not is_stored:
        yield f"kernels: {facts.kernels} kernels cost more here than the zeros they leave out save"
    yield from _widths(facts)
    yield from _dtypes(facts)
    if facts.beside is not None and facts.beside > MOSTLY and "decode" in slow:
        yield (
            f"size: {facts.beside:.0%} of a decoded token's time is spent on what is no product (Python, norms, "
            "attention), which fewer or narrower weights do not shorten: the model is too small for this machine"
        )
    if facts.flops is not None and facts.flops > 1 / FASTER and is_stored:
        yield f"work: a token takes {facts.flops:.0%} of the dense model's multiplications, whose shapes it has"


def _widths(facts: Facts) -> Iterator[str]:
    """Of widths that compression made, those that kernels do not take whole."""
    odd = sorted(width for width in facts.widths - facts.dense_widths if width % WHOLE)
    if odd:
        base = HALF if any(width % HALF for width in odd) else WHOLE
        shown = ", ".join(str(width) for width in odd if width % base)
        yield f"widths: kernels want multiples of {base}, and of those that are not the dense model's, not so: {shown}"


def _dtypes(facts: Facts) -> Iterator[str]:
    if facts.dtype != facts.dense_dtype:
        yield f"dtype: it computes in {facts.dtype} and the dense model in {facts.dense_dtype}: give --dtype"
    if not facts.is_fast_dtype:
        known = f"this {facts.device} is not known to have fast products in {facts.dtype}"
        yield f"dtype: {known}: try --dtype float32 or bfloat16"
