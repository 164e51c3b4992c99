"""A device that computes as the CPU does, but takes no tensor of another device, as a GPU does not.

    python -m tests.other_device MODELS TEXT OUT

Compresses the models there and on the CPU, and prints what differs: a JSON object per run. In a process of its own, as
torch has room for one such backend and then counts it as this machine's accelerator.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from slimlm import device as slimlm_device
from slimlm.recipe import one_step
from slimlm.stages import compress

NAME = "other"
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)  # indices may be the CPU's

CLOSED = {"self_share": 0, "refine": 0}  # refinement is for the last of these
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"widths": "hidden=24,mlp=40/hidden=28,groups=1", "weighting": "none", **CLOSED}),
    ("llama", {"method": "slimlm", "sparsity": 0.5, "allocation": "solved", **CLOSED}),
    ("llama", {"method": "wanda", "sparsity": 0.5, "allocation": "owl"}),
    ("llama", {"method": "obc", "sparsity": 0.5}),
    ("qwen3_moe", {"method": "slimlm", "sparsity": 0.5, **CLOSED}),
    ("llama", {"method": "mfac", "sparsity": 0.5}),
    ("llama", {"sparsity": 0.25, "dataset": "self"}),
]


class OnOther(Tensor):
    """A tensor of the other device; its numbers are in `inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnOther":
        tensor = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=f"{NAME}:0"
        )
        tensor.inner = inner
        return tensor

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


def _call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnOther)}
    to = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if not there and (to is None or to.type != NAME):
        return function(*args, **kwargs)
    if there and function not in COPIES:
        strays = [tensor for tensor in tensors if not isinstance(tensor, OnOther) and tensor.dim()]
        if not isinstance(tensors[0], OnOther) or any(
            function not in INDEXED or tensor.is_floating_point() for tensor in strays
        ):
            raise RuntimeError(f"{function} gets tensors of two devices")
    on_cpu = {**kwargs, "device": "cpu"} if to is not None else kwargs
    given, named = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnOther) else leaf, (args, on_cpu))
    if function is aten.histc.default:  # the CPU has none for integers
        result = function(given[0].float(), *given[1:], **named).to(given[0].dtype)
    else:
        result = function(*given, **named)
    if function is aten.copy_.default:
        return args[0]
    if to is not None and to.type != NAME:
        return result.clone() if result is given[0] else result

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return there[id(leaf)] if id(leaf) in there else OnOther(leaf)

    return tree_map(wrapped, result)


class _Generator(torch.Generator):
    """One that needs no device to be there."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls)


@contextmanager
def other_device() -> Iterator[str]:
    """Inside, there is another device of the name that comes with it."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")  # for threads and where torch copies below the dispatcher
    library.impl("empty_strided", lambda size, stride, dtype=None, **_: _empty(size, dtype, stride), "PrivateUse1")
    library.impl("empty.memory_format", lambda size, dtype=None, **_: _empty(size, dtype), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    before, torch.Generator = torch.Generator, _Generator  # type: ignore[misc]
    try:
        with _Factories(), sdpa_kernel(SDPBackend.MATH):  # what attention comes to on a device without its own
            yield NAME
    finally:
        torch.Generator = before  # type: ignore[misc]


def _empty(size: Any, dtype: Any, stride: Any = None) -> Tensor:
    return OnOther(torch.empty(size, dtype=dtype) if stride is None else torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    inner = [tensor.inner if isinstance(tensor, OnOther) else tensor for tensor in (source, target)]
    inner[1].copy_(inner[0])
    return target


def compare(models: Path, text: Path, out: Path) -> Iterator[dict[str, Any]]:
    """Each run on the CPU and on the other device: whether the weights are the same, and both perplexities."""
    common = {"dataset": str(text), "num_calibration_samples": 20, "max_seq_length": 32, "eval_windows": 4}
    with other_device() as other:
        slimlm_device.product_dtype = lambda device, dtype=torch.float32: dtype  # the same on both
        for number, (name, settings) in enumerate(RUNS):
            weights, perplexities = [], []
            for device in ("cpu", other):
                place = out / f"{number}-{device}"
                recipe = {**common, "model": str(models / name), "eval_text": str(text), "device": device, **settings}
                manifest = compress(one_step(**recipe, output_dir=str(place))).manifest
                weights.append(load_file(place / "model.safetensors"))
                perplexities.append(manifest["measured"]["compressed"]["perplexity"])
            same = all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
            yield {"model": name, "settings": settings, "same": same, "perplexity": perplexities}


if __name__ == "__main__":
    for found in compare(*map(Path, sys.argv[1:])):
        print(json.dumps(found), flush=True)
