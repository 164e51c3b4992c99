"""Predicted against measured loss: every matrix of a model pruned alone.

    python eval/predicted.py --model ../shared/models/llama-6m --calibration ../shared/data/calibration.txt

Each matrix is pruned by itself (second-order mask, joint update) and the rise of the log-perplexity measured on
calibration windows that were not used for anything else. Predicted from the dense model: by the Gram, the error of the
outputs as a share of their energy; by the Fisher information of token gradients, half the mean of (delta . change x)^2,
which is in units of the loss. Prints rank correlations, and the slope of the measured rise over that prediction.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from slimlm.calibration import load_windows
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.linalg.hessian import hessian
from slimlm.model.hidden import Scratch
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import backwards, walk
from slimlm.models import open_model
from slimlm.progress import Progress
from slimlm.prune import masks, updates
from slimlm.prune.group import Row, prune
from slimlm.prune.quota import Quota
from slimlm.statistics.sweep import Losses, Walks, windows_to_sweep
from slimlm.statistics.token_gradients import Sample, TokenGradients, gather_gradients, gradients_of

ROW = Row("gram", masks.columns, updates.joint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=64, help="to learn from, and as many to measure on")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8192, help="tokens whose gradients are the Fisher information")
    arguments = parser.parse_args()
    windows = load_windows(
        arguments.calibration, load_tokenizer(Path(arguments.model)), 2 * arguments.windows, arguments.window
    ).tokens
    learn, test = windows[: arguments.windows], windows[arguments.windows :]
    model = open_model(Path(arguments.model), torch.device("cpu"), "fast")
    gradients = token_gradients(model, learn, arguments.samples)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    base = loss(dense, test)
    rows = []
    print("| matrix | error of the outputs | predicted rise | measured rise |\n| --- | --- | --- | --- |")
    for index, found in sorted(gradients.items()):
        for name, tokens in found.items():
            path = f"{model.family.block(index)}.{name}"
            rows.append(one(dense, path, tokens, test, base, arguments.sparsity))
            print(f"| {path} | {rows[-1][0]:.2%} | {rows[-1][1]:.5f} | {rows[-1][2]:.5f} |", flush=True)
    table = torch.tensor(rows, dtype=torch.float64)
    by_gram, by_fisher = (rank_correlation(table[:, column], table[:, 2]) for column in (0, 1))
    slope = float((table[:, 1] * table[:, 2]).sum() / table[:, 1].square().sum())
    print(f"\nrank correlation with the measured rise: outputs' error {by_gram:.2f}, Fisher {by_fisher:.2f}")
    print(f"slope of the measured rise over the Fisher's prediction: {slope:.2f}")


@torch.no_grad()
def token_gradients(model: StreamedModel, learn: torch.Tensor, samples: int) -> dict[int, dict[str, TokenGradients]]:
    """Of the dense model's linears, by name within their block and that block's number. learn: [windows, time]."""
    losses, progress = Losses(windows_to_sweep(list(learn.split(8))), seed=0), Progress()
    with tempfile.TemporaryDirectory() as directory:
        back = walk(model, progress, "gradients back", order=backwards(model))
        walks = Walks(walk(model, progress, "gradients"), back, Scratch(Path(directory)))
        found = gather_gradients(model, losses, walks, Sample(samples, by_sequence=False, seed=0))
        return {block.index: gradients_of(block, tensors) for block, tensors in found}


@torch.no_grad()
def one(
    dense: torch.nn.Module, path: str, tokens: TokenGradients, test: torch.Tensor, base: float, sparsity: float
) -> tuple[float, float, float]:
    """Prune a matrix alone and put it back: share of the outputs' energy, predicted and measured rise of the loss."""
    parameter = dense.get_parameter(f"{path}.weight")
    weight = parameter.double()
    gram = tokens.x.T @ tokens.x
    quota = Quota((len(weight),), (round(sparsity * weight.numel()),))
    pruned, _ = prune(weight, hessian(gram.clone()), quota, ROW)
    change = pruned - weight
    error = float(((change @ gram) * change).sum() / ((weight @ gram) * weight).sum())
    predicted = float(((tokens.x @ change.T) * tokens.delta).sum(1).square().mean() / 2)
    kept = parameter.clone()
    parameter.copy_(pruned)
    measured = loss(dense, test) - base
    parameter.copy_(kept)
    return error, predicted, measured


@torch.no_grad()
def loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    total = 0.0
    for batch in windows.split(16):
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        total += float(cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    return total / windows[:, 1:].numel()


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([value.argsort().argsort().double() for value in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main()
