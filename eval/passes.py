"""Where a run's time goes: passes of data through blocks, sums over tokens, factorisations, reading and writing.

    python eval/passes.py --model ../shared/models/llama-6m --calibration ../shared/data/calibration.txt

Stands beside the time of plain forward passes of the same tokens through the dense and the compressed model, in the
same process and batches (--no-plain leaves them out, for models larger than memory). On a GPU each part waits for the
one before, so that the parts add up: nothing overlaps.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from slicing import CLOSED
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimlm import compression
from slimlm.calibration import load_windows
from slimlm.checkpoint.prefetch import Prefetch
from slimlm.checkpoint.writer import CheckpointWriter
from slimlm.fit import beside_dense, lm_head, refine
from slimlm.linalg.gram import Gram
from slimlm.linalg.regression import Moments
from slimlm.linalg.softmax import MapFit
from slimlm.model import streamed
from slimlm.model.block import Block
from slimlm.model.hidden import Spilled
from slimlm.progress import LogProgress
from slimlm.prune import group, towards_dense
from slimlm.recipe import one_step
from slimlm.slice import basis, curves, refit
from slimlm.slice import run as slicing_run
from slimlm.stages import compress

FORWARD = "passes through blocks"
SPENT: dict[str, float] = defaultdict(float)


class Stages(LogProgress):
    """Remembers the stage that a run is in."""

    now = ""

    def stage(self, name: str, total: int, first: int = 0) -> None:
        Stages.now = name
        super().stage(name, total, first)


def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its own time added up by kind; what it calls that is timed as well counts there alone."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wait()
        start, before = time.perf_counter(), sum(SPENT.values())
        try:
            return function(*args, **kwargs)
        finally:
            wait()
            name = f"{kind}, {Stages.now}" if kind == FORWARD else kind
            SPENT[name] += time.perf_counter() - start - (sum(SPENT.values()) - before)

    return wrapper


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--method", default="slice")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--closed", action="store_true", help="slice, slimlm: --self-share 0 --refine 0")
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--window", type=int, default=256)
    arguments = parser.parse_args()
    for name in ("run", "inputs", "before"):
        setattr(Block, name, timed(FORWARD, getattr(Block, name)))
    for kind, owner, name in (
        ("reading", Prefetch, "take"),
        ("reading", streamed, "load_tensors"),
        ("writing", CheckpointWriter, "write"),
        ("hidden states from and to files", Spilled, "__getitem__"),
        ("hidden states from and to files", Spilled, "append"),
        ("hidden states from and to files", Spilled, "replace"),
        ("sums over tokens", Gram, "add"),
        ("sums over tokens", Moments, "add"),
        ("fit of the head", MapFit, "step"),
        ("fit of the head", MapFit, "divergence"),
        ("factorisations", beside_dense, "ridge"),
        ("factorisations", lm_head, "ridge"),
        ("factorisations", refit, "without_units"),
        ("factorisations", basis, "with_kept"),
        ("factorisations", group, "damped"),
        ("factorisations", towards_dense, "damped"),
        ("masks and updates", group, "prune"),
        ("masks and updates", towards_dense, "prune"),
        ("gradients for the basis", slicing_run, "gradient_covariance"),
        ("choice of widths", curves.CutStreams, "curves"),
        ("choice of widths", curves, "choose"),
        ("refinement", refine.Refiner, "refine"),
        ("writing text", compression, "sampled_windows"),
    ):
        setattr(owner, name, timed(kind, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        recipe = one_step(
            model=arguments.model, dataset=arguments.calibration, method=arguments.method,
            sparsity=arguments.sparsity, measure=False,
            num_calibration_samples=arguments.windows, max_seq_length=arguments.window, output_dir=f"{folder}/out",
            **(CLOSED if arguments.closed else {}),
        )  # fmt: skip
        start = time.perf_counter()
        compress(recipe, progress=Stages())
        SPENT["the rest"] = time.perf_counter() - start - sum(SPENT.values())
        paths = () if arguments.no_plain else (arguments.model, f"{folder}/out")
        plain = [f"{plain_pass(path, arguments):.1f}" for path in paths]
    print("| | seconds |\n| --- | --- |")
    for kind, seconds in sorted(SPENT.items(), key=lambda pair: -pair[1]):
        print(f"| {kind} | {seconds:.1f} |")
    if plain:
        print(f"| one plain forward pass of the dense model, of the compressed one | {', '.join(plain)} |")


@torch.no_grad()
def plain_pass(path: str, arguments: argparse.Namespace) -> float:
    """Seconds of the blocks alone, in fp32 on the CPU, as calibration computes there."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    windows = load_windows(arguments.calibration, tokenizer, arguments.windows, arguments.window, 0)
    start = time.perf_counter()
    for batch in windows.batches(8):
        model.base_model(batch)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
