"""What slicing costs: sparsity x method x seed on one model, as a table.

    python eval/slicing.py --model ../shared/models/llama-6m --calibration ../shared/data/calibration.txt \
        --texts ../shared/data/books_test.txt ../shared/data/docs_test.txt

Arms: `shared` rotates and cuts hidden_size alone; `refit` refits that; `budget` also chooses the split over all widths;
`refined` is the default: blocks refined, half of the windows the model's own;
`per-block` is SliceGPT as published, its shortcuts counted. Every arm is given the sparsity of all parameters, and is
measured in bf16 as stock transformers loads it. The figure is the rise of the mean log-perplexity over the texts, and
its share of what `per-block` loses, interpolated to the same number of parameters. With `--reference` the published
implementation runs as well, at the widths that `per-block` has.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimlm  # registers the per-block classes
from slimlm.calibration import load_windows
from slimlm.evaluation.perplexity import counted
from slimlm.evaluation.text import load_test_windows
from slimlm.evaluation.tokens import measure_tokens
from slimlm.recipe import one_step
from slimlm.stages import compress

CLOSED = {"self_share": 0, "refine": 0}  # closed forms on the given text
ARMS = {
    "shared": {"refit": False, "weighting": "none"},
    "refit": {"weighting": "none", "budget": "hidden", **CLOSED},
    "budget": CLOSED,
    "refined": {},
    "per-block": {"basis": "per-block", "round_to": 4},
}


def main() -> None:
    parser = parser_of(__doc__, Path("/tmp/slimlm-slicing"), [0, 1, 2])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.1, 0.15, 0.2, 0.25, 0.3, 0.4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    add_reference(parser, "directory that holds the published package slicegpt")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the recipes")
    arguments = parser.parse_args()
    texts, dense = measured_dense(arguments)
    rows = [
        run(arguments, arm, sparsity, seed, texts, dense)
        for sparsity in arguments.sparsities
        for arm in arguments.arms
        for seed in arguments.seeds
    ]
    if arguments.reference:
        rows += [published(arguments, row, texts, dense) for row in rows if row["arm"] == "per-block"]
        arguments.arms.append("reference")
    report(arguments, rows)


def published(arguments: argparse.Namespace, ours: dict, texts: list[torch.Tensor], dense: list[float]) -> dict:
    """The published SliceGPT at the width that `per-block` has, on the same windows."""
    width = ours["widths"].removeprefix("stream=")
    found = run_reference(arguments, "reference_slicegpt.py", ["--widths", width], ours["seed"], texts, dense)
    removed = 1 - found["parameters"] / found["dense_parameters"]
    return {**found, "arm": "reference", "achieved": removed, **{key: ours[key] for key in ("requested", "widths")}}


def run(
    arguments: argparse.Namespace, arm: str, sparsity: float, seed: int, texts: list[torch.Tensor], dense: list[float]
) -> dict:
    output = arguments.work / f"{arm}-{sparsity}-{seed}"
    more = dict(pair.split("=", 1) for pair in arguments.set)
    manifest, row = measured(arguments, output, {"sparsity": sparsity, **ARMS[arm], **more}, seed, texts, dense)
    row = {
        "arm": arm,
        "requested": sparsity,
        "achieved": manifest["sparsity"]["parameters_removed"],
        "widths": manifest["method"].get("widths"),
        **row,
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def parser_of(description: str, work: Path, seeds: list[int], several: bool = False) -> argparse.ArgumentParser:
    """What every benchmark of methods on texts takes; several: models."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models" if several else "--model", nargs="+" if several else None, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--windows", type=int, default=256, help="to calibrate on, and of each text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--work", type=Path, default=work)
    return parser


def add_reference(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--reference", type=Path, help=f"{what}: it is run beside ours, on the same windows")
    parser.add_argument("--reference-python", default=sys.executable, help="of the environment that it runs in")


def run_reference(
    arguments: argparse.Namespace,
    script: str,
    more: list[str],
    seed: int,
    texts: list[torch.Tensor],
    dense: list[float],
) -> dict:
    """A published implementation in its own environment, on the windows that ours are calibrated and measured on."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = load_windows(arguments.calibration, tokenizer, arguments.windows, arguments.window, seed).tokens
    files = []
    for number, tokens in enumerate([windows, *texts]):
        files.append(str(arguments.work / f"tokens-{number}.npy"))
        numpy.save(files[-1], tokens.numpy())
    command = [
        arguments.reference_python, str(Path(__file__).with_name(script)), "--reference", str(arguments.reference),
        "--model", str(arguments.model), "--calibration", files[0], "--tests", *files[1:], *more,
    ]  # fmt: skip
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    loss = mean([math.log(value) - before for value, before in zip(found["perplexities"], dense, strict=True)])
    print(json.dumps({"reference": script, "seed": seed, **found, "loss": loss}), file=sys.stderr, flush=True)
    return {**found, "seed": seed, "loss": loss}


def measured_dense(arguments: argparse.Namespace) -> tuple[list[torch.Tensor], list[float]]:
    """Windows of each text, and what the dense model makes of them."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = [load_test_windows(text, tokenizer, arguments.windows, arguments.window).tokens for text in arguments.texts]
    dense = log_perplexities(Path(arguments.model), texts)
    print(f"dense: {perplexities(dense)}; slimlm {slimlm.__version__}", file=sys.stderr, flush=True)
    return texts, dense


def measured(
    arguments: argparse.Namespace,
    output: Path,
    settings: dict,
    seed: int,
    texts: list[torch.Tensor],
    dense: list[float],
) -> tuple[dict, dict]:
    """Compress and measure: the manifest, and the figures that every benchmark reports."""
    recipe = one_step(
        model=arguments.model, dataset=arguments.calibration, measure=False, seed=seed, output_dir=str(output),
        num_calibration_samples=arguments.windows, max_seq_length=arguments.window, **settings,
    )  # fmt: skip
    start = time.perf_counter()
    manifest = compress(recipe, overwrite=True).manifest
    seconds = time.perf_counter() - start
    found = log_perplexities(output, texts)
    shutil.rmtree(output)
    return manifest, {
        "seed": seed,
        "perplexities": perplexities(found),
        "loss": sum(after - before for after, before in zip(found, dense, strict=True)) / len(dense),
        "seconds": round(seconds, 1),
    }


def log_perplexities(path: Path, texts: list[torch.Tensor]) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=True).eval()
    return [counted(measure_tokens(model, None, tokens, 32)[:, 0], model.dtype).mean for tokens in texts]


def perplexities(means: list[float]) -> list[float]:
    return [round(math.exp(mean), 2) for mean in means]


def report(arguments: argparse.Namespace, rows: list[dict]) -> None:
    """A markdown table: per sparsity and arm, means over seeds."""
    names = " | ".join(Path(text).stem for text in arguments.texts)
    print(f"| asked | arm | removed | {names} | rise of log-perplexity | share of per-block | split | seconds |")
    print(f"| --- | --- | --- | {'--- | ' * len(arguments.texts)}--- | --- | --- | --- |")
    reference = sorted(
        (mean([r["achieved"] for r in same]), mean([r["loss"] for r in same]))
        for sparsity in arguments.sparsities
        if (same := [r for r in rows if r["arm"] == "per-block" and r["requested"] == sparsity])
    )
    for sparsity in arguments.sparsities:
        for arm in arguments.arms:
            same = [row for row in rows if row["arm"] == arm and row["requested"] == sparsity]
            removed, loss = mean([row["achieved"] for row in same]), mean([row["loss"] for row in same])
            spread = max(abs(row["loss"] - loss) for row in same)
            measured = " | ".join(
                f"{mean([row['perplexities'][text] for row in same]):.2f}" for text in range(len(arguments.texts))
            )
            share = f"{loss / interpolated(reference, removed):.2f}" if len(reference) > 1 else ""
            splits = ", ".join(sorted({str(row["widths"]) for row in same if row["widths"]}))
            seconds = mean([row["seconds"] for row in same])
            print(
                f"| {sparsity:.0%} | {arm} | {removed:.1%} | {measured} | {loss:.4f} ± {spread:.4f} | {share} "
                f"| {splits} | {seconds:.0f} |"
            )


def interpolated(reference: list[tuple[float, float]], removed: float) -> float:
    """The reference's loss at a share removed, log-linear through the two nearest of its points."""
    index = next((i for i, (share, _) in enumerate(reference) if share >= removed), len(reference) - 1)
    index = max(1, index)
    (a, low), (b, high) = reference[index - 1], reference[index]
    return math.exp(math.log(low) + (removed - a) / (b - a) * (math.log(high) - math.log(low)))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
