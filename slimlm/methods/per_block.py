"""SliceGPT as published (arXiv 2401.15024, Algorithm 1): a PCA basis of its own for every norm's input.

Between one basis and the next the residual stream goes through a dense shortcut, which counts as parameters and which
no stock class has; the modelling file travels with the checkpoint. As in the reference implementation the Grams are of
the raw stream, damped by a hundredth of their mean diagonal, of the model as sliced so far, and what leaves the last
block keeps its full width.
"""

import bisect
import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.skeleton import build_skeleton, parameter_count
from slimlm.checkpoint.writer import TensorSpec
from slimlm.errors import RunFailure, UserError
from slimlm.families import FAMILIES
from slimlm.linalg.budget import is_near
from slimlm.linalg.gram import Gram
from slimlm.linalg.pca import principal_basis
from slimlm.linalg.rotate import rotate_embedding, rotate_writer
from slimlm.linalg.units import damp
from slimlm.methods.plan import Outcome, Plan
from slimlm.methods.rotation import final_norm
from slimlm.modeling import SlicedLlamaConfig, auto_map, own_file
from slimlm.recipe import Recipe
from slimlm.stream import Stream
from slimlm.walk import StreamedModel
from slimlm.work import Work

ATTENTION, MLP = "attn_shortcut.weight", "mlp_shortcut.weight"


def plan_per_block(model: StreamedModel, recipe: Recipe) -> Plan:
    """One width for all bases. Raises UserError for other models than Llamas, and when no width gives the sparsity."""
    if model.config.model_type != "llama":
        raise UserError(f"basis: per-block has a modelling file for llama only, not for {model.config.model_type!r}")
    if recipe.widths and set(recipe.width_sizes) != {"hidden"}:
        raise UserError("--widths: with basis per-block only hidden can be changed")
    hidden, dense = model.config.hidden_size, parameter_count(model.model)
    multiple = recipe.round_to or 8
    given = recipe.width_sizes.get("hidden")
    if given is not None and not 0 < given <= hidden:
        raise UserError(f"--widths hidden={given}: the model has {hidden}")
    if given:
        return _plan(model, given, recipe)

    def removed(width: int) -> float:
        return 1 - _parameters(_config(model, width)) / dense

    widths = range(multiple, hidden, multiple)
    narrower = bisect.bisect_left(widths, -recipe.sparsity, key=lambda width: -removed(width))
    shares = {width: removed(width) for width in widths[max(0, narrower - 1) : narrower + 1]}
    width = min(shares, key=lambda width: abs(shares[width] - recipe.sparsity), default=0)
    if not width or not is_near(shares[width], recipe.sparsity):
        near = f": the nearest is {shares[width]:.4f} (hidden={width})" if width else ""
        raise UserError(f"sparsity {recipe.sparsity:g} cannot be reached with basis per-block{near}")
    return _plan(model, width, recipe)


def _config(model: StreamedModel, width: int) -> SlicedLlamaConfig:
    settings = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("model_type", "architectures", "auto_map", "transformers_version", "dtype")
    }
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    settings["head_dim"] = settings.get("head_dim") or hidden // model.config.num_attention_heads
    settings["tie_word_embeddings"] = False
    return SlicedLlamaConfig(
        **settings,
        stream_widths=[*[width] * (2 * layers), hidden],
        architectures=["SlicedLlamaForCausalLM"],
        auto_map=auto_map(SlicedLlamaConfig),
    )


def _parameters(config: SlicedLlamaConfig) -> int:
    """Counted on one layer and multiplied, the last layer's wider output added."""
    config = copy.deepcopy(config)
    layers: int = config.num_hidden_layers
    vocabulary: int = config.vocab_size
    neurons: int = config.intermediate_size
    widths = config.stream_widths or []
    config.num_hidden_layers, config.stream_widths = 1, [widths[0]] * 3
    one = build_skeleton(config)
    inside = parameter_count(one.model.layers[0])
    wider = widths[-1] - widths[0]
    last = wider * (vocabulary + neurons + widths[0] + (1 if config.mlp_bias else 0))
    return parameter_count(one) + (layers - 1) * inside + last


def _plan(model: StreamedModel, width: int, recipe: Recipe) -> Plan:
    config = _config(model, width)
    carrier = build_skeleton(copy.deepcopy(config))
    tensors = {
        name: TensorSpec(tuple(tensor.shape), model.stored_dtype(name, recipe.dtype))
        for name, tensor in checkpoint_tensors(carrier, carrier.state_dict()).items()
    }
    config.dtype = next(iter(tensors.values())).dtype
    changes = {"model_type": ("llama", config.model_type), "stream width": (model.config.hidden_size, width)}
    files = (own_file(SlicedLlamaConfig),)
    return Plan(
        config, tensors, parameter_count(carrier), recipe, carrier, changes, files=files, widths=f"hidden={width}"
    )


@torch.no_grad()
def run_per_block(model: StreamedModel, plan: Plan, batches: list[Tensor], work: Work) -> Outcome:
    """Slice block after block; each sees what the sliced blocks before it pass on."""
    family, config = model.family, copy.deepcopy(plan.config)
    width = config.stream_widths[0]
    work.lay_out(plan.tensors, plan.carrier)
    start = _embedding_basis(model, batches, work)[:, :width].contiguous()
    (embedding,) = family.embeddings
    if not work.written(embedding):
        weight = f"{embedding}.weight"
        rows = (rotate_embedding(rows.to(model.device).float(), start) for rows in model.chunks(weight))
        work.write(model, embedding, [(weight, rows)])
    work.settle()
    small = StreamedModel(Checkpoint(work.output), config, FAMILIES[config.model_type], model.device, model.dtype)
    streams, state, first = work.start_streams("sliced", {"sliced": (small, batches)}, work.leading(model))
    basis = state["basis"].to(model.device) if state else start
    work.progress.stage("slicing", len(model.blocks))
    work.progress.step(first)
    for index in range(first, len(model.blocks)):
        begun, part = time.perf_counter(), family.block(index)
        slicer = _Slicer(small, index, streams["sliced"], config.stream_widths[2 * index + 1 : 2 * index + 3])
        with model.block(index):
            tensors, basis = slicer.slice(model.weights(index), basis)
        work.pass_through(small, index, tensors, streams["sliced"])
        work.journal.keep(f"basis {index}", {"basis": basis})
        work.save_streams("sliced", index, streams, {"basis": basis})
        work.progress.step()
        work.progress.done("sliced", part, time.perf_counter() - begun)
    if not work.written(family.head):
        weight, gain = f"{family.head}.weight", final_norm(model, basis.device)["weight"]
        work.write(
            model, family.head, [(weight, ((rows.to(gain) * gain) @ basis.float() for rows in model.chunks(weight)))]
        )
    work.settle()
    notes = {"widths": f"stream={width}", "basis": "per-block"}
    return Outcome(plan, notes, lambda index: _basis_after(work, index).to(model.device))


def _basis_after(work: Work, index: int) -> Tensor:
    recalled = work.journal.recall(f"basis {index}")
    if recalled is None:
        raise RunFailure(f"{work.directory} lost the basis after block {index}: start over without --resume")
    return recalled[1]["basis"]


def _embedding_basis(model: StreamedModel, batches: list[Tensor], work: Work) -> Tensor:
    """Of what enters the first block: [hidden, hidden]."""
    recalled = work.journal.recall("basis")
    if recalled:
        return recalled[1]["basis"].to(model.device)
    gram = Gram(model.config.hidden_size, model.device)
    for hidden in model.embed(batches, work.scratch("embedded", model.device)).hidden:
        gram.add(hidden)
    work.clear_scratch()
    basis = basis_of(gram.matrix)
    work.journal.keep("basis", {"basis": basis})
    return basis


def basis_of(gram: Tensor) -> Tensor:
    """Principal directions of a damped Gram: [hidden, hidden]. Raises RunFailure when it is not finite."""
    try:
        return principal_basis(damp(gram.clone()))[0]
    except ValueError as error:
        raise RunFailure(f"the residual stream overflows: {error}") from error


@dataclass
class _Slicer:
    """One block of the sliced model. widths: of the stream between its sublayers, and after it."""

    small: StreamedModel
    index: int
    stream: Stream
    widths: list[int]

    def slice(self, weights: dict[str, Tensor], before: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The block's parameters, fp32, and the basis its output is in; before: [hidden, width], its input's."""
        attention, mlp = self.small.family.norms
        tensors = {name: weight.float() for name, weight in weights.items() if "norm" not in name}
        _read_in(tensors, attention.readers, weights[f"{attention.name}.weight"].float(), before)
        tensors[ATTENTION] = before.float()
        between = self._basis(tensors, mlp.name, self.widths[0])
        _write_in(tensors, attention.writers, ATTENTION, between)
        _read_in(tensors, mlp.readers, weights[f"{mlp.name}.weight"].float(), between)
        tensors[MLP] = between.float()
        after = self._basis(tensors, "", self.widths[1])
        _write_in(tensors, mlp.writers, MLP, after)
        return tensors, after

    def _basis(self, tensors: dict[str, Tensor], name: str, width: int) -> Tensor:
        """The leading directions of the stream, still of full width, that enters module `name`."""
        gram = Gram(self.small.config.hidden_size, self.small.device)
        with self.small.placed(self.small.family.block(self.index), tensors):
            for number in range(len(self.stream.tokens)):
                gram.add(self.small.inputs(self.index, self.stream, number, [name])[name])
        return basis_of(gram.matrix)[:, :width]


def _read_in(tensors: dict[str, Tensor], readers: tuple[str, ...], gain: Tensor, basis: Tensor) -> None:
    for reader in readers:
        tensors[f"{reader}.weight"] = (tensors[f"{reader}.weight"] * gain) @ basis.float()


def _write_in(tensors: dict[str, Tensor], writers: tuple[str, ...], shortcut: str, basis: Tensor) -> None:
    for writer in writers:
        for name in (f"{writer}.weight", f"{writer}.bias"):
            if name in tensors:
                tensors[name] = rotate_writer(tensors[name], basis)
    tensors[shortcut] = rotate_writer(tensors[shortcut], basis)
