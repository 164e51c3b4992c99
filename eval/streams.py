"""Bytes of hidden states that a compression reads from and writes to files, how often it waits for them, and seconds.

    python eval/streams.py --model llama --method slice --memory 0 2MB 8GB --save-seconds 0 60

Every row is a run in this process, on windows of random tokens, without measuring.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from slimlm.model import hidden
from slimlm.model.saving import Means, Saver
from slimlm.model.waiting import BatchFile
from slimlm.recipe import one_step
from slimlm.stages import compress

COUNTED = {"read": 0, "written": 0}
MEANS: list[Means] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--method", default="slice")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--memory", nargs="+", default=["0", "8GB"])
    parser.add_argument("--save-seconds", type=float, nargs="+", default=[0.0, 60.0])
    arguments = parser.parse_args()
    count()
    names = ("memory", "saved every, s", "read, MB", "written, MB", "waits", "peak of streams, MB", "seconds")
    print(f"| {' | '.join(names)} |\n| {'--- | ' * len(names)}")
    for memory in arguments.memory:
        for seconds in arguments.save_seconds:
            print(row(arguments, memory, seconds), flush=True)


def count() -> None:
    """Have all that goes through files counted."""
    read, write, pieces = BatchFile.read, BatchFile.write, BatchFile.pieces

    def reading(file: BatchFile, offset: int, into: Tensor) -> Tensor:
        COUNTED["read"] += into.nbytes
        return read(file, offset, into)

    def writing(file: BatchFile, offset: int, tensor: Tensor) -> None:
        COUNTED["written"] += tensor.nbytes
        write(file, offset, tensor)

    def hashing(file: BatchFile, offset: int, size: int) -> Iterator[bytes]:
        COUNTED["read"] += size
        return pieces(file, offset, size)

    def made(*given: int) -> Means:
        MEANS.append(Means(*given))
        return MEANS[-1]

    replaced: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (BatchFile, "read", reading),
        (BatchFile, "write", writing),
        (BatchFile, "pieces", hashing),
        (hidden, "Means", made),
    )
    for owner, name, function in replaced:
        setattr(owner, name, function)


def row(arguments: argparse.Namespace, memory: str, seconds: float) -> str:
    COUNTED.update(read=0, written=0)
    MEANS.clear()
    setattr(Saver, "seconds", seconds)  # noqa: B010  # a class variable of another module
    with tempfile.TemporaryDirectory() as folder:
        tokens = numpy.random.default_rng(0).integers(1, arguments.vocab, (arguments.windows, arguments.window))
        numpy.save(Path(folder, "tokens.npy"), tokens)
        recipe = one_step(
            model=arguments.model, dataset=f"{folder}/tokens.npy", method=arguments.method, measure=False,
            sparsity=arguments.sparsity, num_calibration_samples=arguments.windows, max_seq_length=arguments.window,
            batch_size=arguments.batch_size, output_dir=f"{folder}/out",
        )  # fmt: skip
        start = time.perf_counter()
        compress(recipe, stream_memory=memory)
        took = time.perf_counter() - start
    waits, peak = sum(means.waits for means in MEANS), max(means.memory.peak for means in MEANS)
    return (
        f"| {memory} | {seconds:g} | {COUNTED['read'] / 1e6:.1f} | {COUNTED['written'] / 1e6:.1f} | {waits} "
        f"| {peak / 1e6:.1f} | {took:.1f} |"
    )


if __name__ == "__main__":
    main()
