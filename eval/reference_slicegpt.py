"""Slice a Llama with the published SliceGPT (microsoft/TransformerCompression) and measure it: a JSON line per width.

    PYTHON eval/reference_slicegpt.py --reference TransformerCompression/src --model MODEL --calibration tokens.npy \
        --tests books.npy docs.npy --widths 200 160 120

PYTHON is that of an environment with torch, numpy, ml_collections and transformers 4.44; `slicing.py --reference`
calls it. Does what the reference's experiments/run_slicegpt.py does, with its defaults (batches of 16, random final
orientation, the head left whole), in fp32, on tokens that are given; measures in bf16. `parameters` counts every tensor
of the sliced model once, shortcuts included; `seconds` is fusing, rotating and slicing.

The reference subtracts its mean from every embedding, which only LayerNorm allows: --keep-mean leaves that out.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from references import in_bf16, parser_of, perplexities, windows_of
from torch import Tensor

ADAPTER = "meta-llama/Llama-2"  # the name by which the reference picks its adapter for Llama
BATCH = 16


def main() -> None:
    parser = parser_of(__doc__, "directory that holds the package slicegpt")
    parser.add_argument("--widths", type=int, nargs="+", required=True)
    parser.add_argument("--keep-mean", action="store_true", help="do not subtract the means of the embeddings")
    arguments = parser.parse_args()
    load_reference(arguments.reference)
    tests = [windows_of(path) for path in arguments.tests]
    model = load(arguments.model).model
    dense = {"dense_parameters": parameters(model), "dense_perplexities": perplexities(in_bf16(model), tests)}
    for width in arguments.widths:
        print(json.dumps({**dense, **row(arguments, width, tests)}), flush=True)


def row(arguments: argparse.Namespace, width: int, tests: list[Tensor]) -> dict[str, Any]:
    numpy.random.seed(0)
    adapter, start = load(arguments.model), time.perf_counter()
    fuse(adapter, arguments.keep_mean)
    windows = windows_of(arguments.calibration)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(BATCH)]
    scheduler = module("slicing_scheduler").ConstSlicingScheduler(width)
    module("rotate").rotate_and_slice(adapter, batches, scheduler, final_orientation="random")
    return {
        "width": width,
        "seconds": round(time.perf_counter() - start, 2),
        "parameters": parameters(adapter.model),
        "perplexities": perplexities(in_bf16(adapter.model), tests),
    }


def load_reference(path: Path) -> None:
    """Make slicegpt's modules importable without its __init__, which imports every adapter, datasets and lm_eval."""
    package = ModuleType("slicegpt")
    package.__path__ = [str(path / "slicegpt")]
    sys.modules["slicegpt"] = package
    sys.path.insert(0, str(path))
    config = module("config").config
    config.device, config.dtype = torch.device("cpu"), torch.float32
    module("adapters.llama_adapter")


def module(name: str) -> Any:
    return importlib.import_module(f"slicegpt.{name}")


def load(path: Path) -> Any:
    """The reference's adapter around the model, without a key-value cache, as its loader has it."""
    of = module("model_adapter").ModelAdapter
    adapter = of.from_model(ADAPTER, str(path), dtype=torch.float32, local_files_only=True)
    adapter.model.eval()
    adapter.use_cache = False
    return adapter


def fuse(adapter: Any, keep_mean: bool) -> None:
    """Compressible blocks, then norms into the linears after them."""
    embeddings = [embedding.weight.data.clone() for embedding in adapter.get_embeddings()]
    module("layernorm_fusion").replace_layers(adapter)
    module("layernorm_fusion").fuse_modules(adapter)
    if keep_mean:
        for embedding, weight in zip(adapter.get_embeddings(), embeddings, strict=True):
            embedding.weight.data = weight


def parameters(model: Any) -> int:
    """Elements of all tensors but the rotary frequencies, which are computed, not saved."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.numel() for name, tensor in tensors if not name.endswith("inv_freq"))


if __name__ == "__main__":
    main()
