"""The models whose speed is compared, all in memory at once: loaded by transformers, llama.cpp or vLLM."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.checkpoint.manifest import Manifest, read_manifest
from slimlm.checkpoint.skeleton import parameter_count, use_only_known
from slimlm.device import available_memory
from slimlm.errors import UserError
from slimlm.evaluation.found import Found, find_model
from slimlm.evaluation.loading import load_model
from slimlm.evaluation.speed.engines import LlamaCppRunner, VllmRunner, gguf_files
from slimlm.evaluation.speed.sparse_kernels import Swapped, kernels_for, swap_kernels
from slimlm.evaluation.speed.stock import StockRunner, devices_of, zeros_in
from slimlm.evaluation.speed.timing import CLOCKS, Runner
from slimlm.model.decoding import settle
from slimlm.model.shape_times import MOST_BYTES
from slimlm.progress import Progress
from slimlm.settings import BenchSettings, EvalSettings

AS_STORED = "as stored"


@dataclass(frozen=True)
class Source(Found):
    """A checkpoint that can be loaded. kernels: those to run it with besides as it is stored."""

    manifest: Manifest | None
    kernels: str | None


@dataclass(frozen=True)
class Contender:
    """One of those that take turns. bytes: of its files of weights. zeros: share in its linears. swapped: what sparse
    kernels were put in. model: where transformers runs it."""

    name: str
    path: Path
    runner: Runner
    bytes: int
    dtype: str
    parameters: int | None = None
    zeros: float | None = None
    swapped: Swapped | None = None
    model: PreTrainedModel | None = None

    @property
    def kernels(self) -> str:
        """What to call those that it runs with."""
        return self.swapped.kernels if self.swapped else AS_STORED

    @property
    def devices(self) -> list[torch.device]:
        """Where transformers has its weights."""
        return [] if self.model is None else devices_of(self.model)


def sources(settings: BenchSettings, names: Sequence[str], device: torch.device) -> list[Source]:
    """Of every model, the dense one last where there is one. Raises UserError for what is no whole checkpoint."""
    found = [_source(settings, name, settings.revision, settings.kernels, device) for name in names]
    if settings.against is not None:
        found.append(_source(settings, settings.against, settings.against_revision, "none", device))
    return found


def _source(settings: BenchSettings, name: str, revision: str | None, kernels: str, device: torch.device) -> Source:
    found = find_model(name, revision, settings)
    manifest = read_manifest(found.path)
    usual = None if settings.device_map else kernels_for(manifest, device)
    wanted = {"auto": usual, "none": None}.get(kernels, kernels)
    return Source(**vars(found), manifest=manifest, kernels=wanted)


def refuse_too_many(sources: Sequence[Source], device: torch.device, is_spread: bool = False) -> None:
    """Raises UserError unless all models fit into memory together, with what sparse kernels and the timing of shapes
    take besides. is_spread: over all GPUs, where there are any."""
    each = [source.bytes * (2 if source.kernels else 1) + min(source.bytes, MOST_BYTES) for source in sources]
    needed = sum(each)
    everywhere = is_spread and device.type == "cuda"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if everywhere else [device]
    memories = [available_memory(one) for one in devices]
    free = sum(memory.get("gpu", memory["host"]) for memory in memories)
    if needed > free:
        raise UserError(
            f"the models take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB is free on "
            f"{', '.join(map(str, devices))}: they take turns, so all have to be there; give fewer models, or --dtype "
            "bfloat16"
        )


def stock_contenders(
    sources: Sequence[Source], settings: BenchSettings, tokens: Tensor, progress: Progress
) -> list[Contender]:
    """Every model, loaded by transformers, and once more with sparse kernels where these are wanted.

    tokens: [batch, time] on which both have to say the same. Raises UserError for what cannot be loaded or has no such
    zeros, RunFailure where sparse kernels compute something else.
    """
    progress.stage("loading", sum(2 if source.kernels else 1 for source in sources))
    found = []
    for source in sources:
        found.append(_stock(source, settings, None))
        progress.step()
        if source.kernels:
            found += _sparse(source, settings, tokens, progress)
            progress.step()
    return found


def _sparse(source: Source, settings: BenchSettings, tokens: Tensor, progress: Progress) -> list[Contender]:
    """With sparse kernels; tokens: [batch, time]. Raises UserError where these were asked for and are of no use."""
    try:
        return [_stock(source, settings, tokens)]
    except UserError as error:
        if settings.kernels != "auto":
            raise
        progress.line(str(error))
        return []


def _stock(source: Source, settings: BenchSettings, tokens: Tensor | None) -> Contender:
    """tokens: [batch, time], where it is to have sparse kernels."""
    path = source.path
    names = ("dtype", "device", "device_map", "trust_remote_code")
    model = load_model(path, EvalSettings(str(path), **{name: getattr(settings, name) for name in names}))
    if not {one.type for one in devices_of(model)} <= {torch.device(settings.device).type}:
        raise UserError(
            f"--device-map {settings.device_map} leaves parts of {path} elsewhere than on {settings.device}, and what "
            "is fetched at every step would be all that is measured: give fewer models, or --dtype bfloat16"
        )
    settle(model)
    use_only_known(source.checkpoint, model)
    parameters, zeros = parameter_count(model), zeros_in(model)
    swapped = None
    if tokens is not None and source.kernels:
        swapped = swap_kernels(model, source.kernels, source.manifest, tokens.to(model.device))
        gc.collect()  # the dense weights
    dtype = str(model.dtype).removeprefix("torch.")
    size, runner = source.checkpoint.bytes_on_disk(), StockRunner(model, CLOCKS[settings.clock])
    return Contender(source.resolved.name, path, runner, size, dtype, parameters, zeros, swapped, model)


def gguf_contenders(names: Sequence[str], settings: BenchSettings) -> list[Contender]:
    """GGUF files, or directories with one, loaded by llama.cpp. Raises UserError for one that it cannot load."""
    context, threads = settings.prompt_tokens + settings.new_tokens, torch.get_num_threads()
    clock, on_gpu = CLOCKS[settings.clock], settings.device.startswith("cuda")
    found = []
    for name in names:
        files = gguf_files(name)
        runner, size = (
            LlamaCppRunner(files[0], context, threads, on_gpu, clock),
            sum(one.stat().st_size for one in files),
        )
        found.append(Contender(name, files[0], runner, size, "its own"))
    return found


def vllm_contenders(sources: Sequence[Source], settings: BenchSettings) -> list[Contender]:
    """Directories, loaded by vLLM. Raises UserError for one that it cannot load."""
    context = settings.prompt_tokens + settings.new_tokens
    return [
        Contender(
            source.resolved.name,
            source.path,
            VllmRunner(source.path, settings.dtype, context, len(sources), settings.trust_remote_code),
            source.checkpoint.bytes_on_disk(),
            str(source.dtype).removeprefix("torch."),
        )
        for source in sources
    ]
