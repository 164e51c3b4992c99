"""Prune a Llama with the published SparseGPT (IST-DASLab/sparsegpt) on a CPU and measure it: a JSON line per amount.

    PYTHON eval/reference_sparsegpt.py --reference sparsegpt --model MODEL --calibration tokens.npy \
        --tests books.npy docs.npy --amounts 0.5 0.7 2:4

PYTHON is that of an environment with torch, numpy and transformers 4.44; `pruning.py --reference` calls it. The
reference's own `llama_sequential` prunes, with its defaults (percdamp 0.01, blocksize 128), one window at a time; what
its files need from CUDA and from older transformers is supplied here. `seconds` is `llama_sequential` alone.
Perplexity is measured in bf16.
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from references import in_bf16, parser_of, perplexities, windows_of
from torch import Tensor, nn
from transformers import LlamaForCausalLM


def main() -> None:
    parser = parser_of(__doc__, "directory that holds the reference's llama.py")
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.7", "2:4"], help="share of zeros, or N:M as in 2:4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="to calibrate and prune in")
    arguments = parser.parse_args()
    reference, windows = load_reference(arguments.reference), windows_of(arguments.calibration)
    tests = [windows_of(path) for path in arguments.tests]
    for amount in arguments.amounts:
        dtype = getattr(torch, arguments.dtype)
        model = LlamaForCausalLM.from_pretrained(arguments.model, torch_dtype=dtype).eval()
        seconds = prune(reference, model, windows, amount)
        row = {
            "amount": amount,
            "seconds": round(seconds, 2),
            "zeros": zeros(model),
            "perplexities": perplexities(in_bf16(model), tests),
        }
        print(json.dumps(row), flush=True)


def load_reference(path: Path) -> ModuleType:
    """The reference's llama.py, made to run without CUDA."""
    sys.path.insert(0, str(path))
    torch.cuda.synchronize = lambda *_: None
    return importlib.import_module("llama")


def prune(reference: ModuleType, model: Any, calibration: Tensor, amount: str) -> float:
    """Prune in place with the reference's own walk over the blocks; seconds it took. calibration: [windows, time]."""
    count, model.seqlen = calibration.shape
    kept, group = (int(part) for part in amount.split(":")) if ":" in amount else (0, 0)
    reference.args = argparse.Namespace(
        nsamples=count, sparsity=0.0 if group else float(amount), percdamp=0.01, blocksize=128, wbits=16,
        prunen=group - kept,  # the reference counts those that go
        prunem=group, minlayer=-1, maxlayer=1000, prune_only="", invert=False, true_sequential=False,
    )  # fmt: skip
    for layer in model.model.layers:
        layer.register_forward_pre_hook(with_positions, with_kwargs=True)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        reference.llama_sequential(model, [(window[None],) for window in calibration], torch.device("cpu"))
    return time.perf_counter() - start


def with_positions(_: nn.Module, inputs: tuple[Tensor, ...], more: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Newer transformers' blocks do not count positions where, as in the reference, they are given none."""
    if more.get("position_ids") is None:
        more = {**more, "position_ids": torch.arange(inputs[0].shape[1])[None]}
    return inputs, more


def zeros(model: Any) -> float:
    """Share of zeros in the linears of the blocks."""
    weights = [module.weight for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


if __name__ == "__main__":
    main()
