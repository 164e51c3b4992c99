"""SliceGPT as published (arXiv 2401.15024, Algorithm 1): a PCA basis of its own for every norm's input.

Between one basis and the next the residual stream goes through a dense shortcut, which counts as parameters and which
no stock class has; the modelling file travels with the checkpoint. As in the reference implementation the Grams are of
the raw stream, damped by a hundredth of their mean diagonal, of the model as sliced so far, and what leaves the last
block keeps its full width.
"""

import bisect
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.skeleton import build_skeleton, parameter_count
from slimlm.checkpoint.writer import TensorSpec
from slimlm.errors import RunFailure, UserError
from slimlm.families import Family, Norm, family_of
from slimlm.linalg.budget import is_near
from slimlm.linalg.gram import Gram
from slimlm.linalg.pca import principal_basis
from slimlm.linalg.rotate import rotate_embedding, rotate_writer
from slimlm.linalg.units import damp
from slimlm.methods.plan import Outcome, Plan
from slimlm.methods.rotation import final_norm
from slimlm.modeling import OWN_CLASSES, own_files
from slimlm.modeling.modeling_sliced import SlicedLlamaConfig, SlicedOPTConfig, SlicedPhiConfig
from slimlm.recipe import SliceStep
from slimlm.stream import Stream
from slimlm.walk import StreamedModel
from slimlm.work import Rows, Work

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": SlicedLlamaConfig,
    "opt": SlicedOPTConfig,
    "phi": SlicedPhiConfig,
}


def plan_per_block(model: StreamedModel, recipe: SliceStep) -> Plan:
    """One width for all bases. Raises UserError for families without a modelling file, and when no width gives the
    sparsity."""
    if model.config.model_type not in CONFIGS:
        known = ", ".join(CONFIGS)
        raise UserError(f"basis: per-block has a modelling file for {known} only, not for {model.config.model_type!r}")
    if not getattr(model.config, "enable_bias", True) or not getattr(
        model.config, "layer_norm_elementwise_affine", True
    ):
        raise UserError("basis: per-block needs biases and gains, which this model has not")
    if model.family.why_not is not None:
        raise UserError(f"this {model.config.model_type!r} cannot be sliced: {model.family.why_not}")
    if recipe.widths and [set(choice) for choice in recipe.width_choices] != [{"hidden"}]:
        raise UserError("--widths: with basis per-block only hidden can be changed, to one width")
    hidden, dense = model.config.hidden_size, parameter_count(model.model)
    multiple = recipe.round_to or 8
    given = recipe.width_choices[0]["hidden"] if recipe.widths else None
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


def _config(model: StreamedModel, width: int) -> PretrainedConfig:
    settings = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("model_type", "architectures", "auto_map", "transformers_version", "dtype")
    }
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    if model.config.model_type == "llama":
        settings["head_dim"] = settings.get("head_dim") or hidden // model.config.num_attention_heads
    settings["tie_word_embeddings"] = False
    sliced = CONFIGS[model.config.model_type]
    return sliced(
        **settings,
        stream_widths=[*[width] * (len(_steps(model.family)) * layers), hidden],
        architectures=[OWN_CLASSES[sliced].__name__],
    )


def _steps(family: Family) -> list[tuple[tuple[Norm, ...], str]]:
    """The norms that read the stream together, before it goes through a shortcut of this name."""
    if family.parallel:
        return [(family.norms, "shortcut.weight")]
    return list(zip([(norm,) for norm in family.norms], ("attn_shortcut.weight", "mlp_shortcut.weight"), strict=True))


def _parameters(config: PretrainedConfig) -> int:
    """Counted on one layer and on two, and multiplied; the last one writes to a wider stream."""
    widths = config.stream_widths
    per_layer = (len(widths) - 1) // config.num_hidden_layers

    def count(layers: int) -> int:
        few = copy.deepcopy(config)
        few.num_hidden_layers, few.stream_widths = layers, [*widths[: per_layer * layers], widths[-1]]
        return parameter_count(build_skeleton(few))

    one, layers = count(1), int(config.num_hidden_layers)
    return one + (layers - 1) * (count(2) - one)


def _plan(model: StreamedModel, width: int, recipe: SliceStep) -> Plan:
    config = _config(model, width)
    carrier = build_skeleton(copy.deepcopy(config))
    tensors = {
        name: TensorSpec(tuple(tensor.shape), model.stored_dtype(name, recipe.dtype))
        for name, tensor in checkpoint_tensors(carrier, carrier.state_dict()).items()
    }
    config.dtype = next(iter(tensors.values())).dtype
    changes = {
        "model_type": (model.config.model_type, config.model_type),
        "stream width": (model.config.hidden_size, width),
    }
    files = own_files(config)
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
    for embedding in family.embeddings:
        if not work.written(embedding):
            work.write(model, embedding, [(f"{embedding}.weight", _embedding_rows(model, embedding, start))])
    work.settle()
    small = StreamedModel(Checkpoint(work.output), config, family_of(config), model.device, model.dtype)
    streams, state, first = work.start_streams("sliced", {"sliced": (small, batches)}, work.leading(model))
    basis = state["basis"].to(model.device) if state else start
    work.progress.stage("slicing", len(model.blocks))
    work.progress.step(first)
    for index in range(first, len(model.blocks)):
        begun, part = time.perf_counter(), family.block(index)
        steps = len(_steps(family))
        widths = config.stream_widths[steps * index + 1 : steps * (index + 1) + 1]
        slicer = _Slicer(family, small, index, streams["sliced"], widths)
        with model.block(index):
            tensors, basis = slicer.slice(model.weights(index), basis)
        work.pass_through(small, index, tensors, streams["sliced"])
        work.journal.keep(f"basis {index}", {"basis": basis})
        work.save_streams("sliced", index, streams, {"basis": basis})
        work.progress.step()
        work.progress.done("sliced", part, time.perf_counter() - begun)
    if not work.written(family.head):
        work.write(model, family.head, _head(model, basis))
    work.settle()
    notes = {"widths": f"stream={width}", "basis": "per-block"}
    return Outcome(plan, notes, lambda index: _basis_after(work, index).to(model.device))


def _embedding_rows(model: StreamedModel, name: str, basis: Tensor) -> Rows:
    for rows in model.chunks(f"{name}.weight"):
        yield rotate_embedding(_centred(rows.to(model.device).float(), -1, model.family), basis)


def _head(model: StreamedModel, basis: Tensor) -> Iterator[tuple[str, Tensor | Rows]]:
    """The head, with the final norm's gain and bias in it."""
    norm, name = final_norm(model, basis.device), model.family.head
    gain, weight = norm["weight"], f"{name}.weight"
    yield weight, ((rows.to(gain) * gain) @ basis.float() for rows in model.chunks(weight))
    if "bias" in norm:
        bias = torch.cat([rows.to(gain) @ norm["bias"] for rows in model.chunks(weight)])
        own = f"{name}.bias"
        yield own, bias + model.checkpoint_tensor(own).to(bias) if own in model.key_of else bias


def _centred(tensor: Tensor, axis: int, family: Family) -> Tensor:
    """What is written to the stream without its mean, where the norms would subtract it."""
    return tensor - tensor.mean(axis, keepdim=True) if family.centred else tensor


def _basis_after(work: Work, index: int) -> Tensor:
    recalled = work.journal.recall(f"basis {index}")
    if recalled is None:
        raise RunFailure(f"{work.journal.directory} lost the basis after block {index}: start over without --resume")
    return recalled[1]["basis"]


def _embedding_basis(model: StreamedModel, batches: list[Tensor], work: Work) -> Tensor:
    """Of what enters the first block: [hidden, hidden]."""
    recalled = work.journal.recall("basis")
    if recalled:
        return recalled[1]["basis"].to(model.device)
    gram = Gram(model.config.hidden_size, model.device)
    for hidden in model.embed(batches, work.scratch("embedded", model.device)).hidden:
        gram.add(_centred(hidden.float(), -1, model.family))
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
    """One block of the sliced model. family: the dense one's. widths: of the stream after each of its shortcuts."""

    family: Family
    small: StreamedModel
    index: int
    stream: Stream
    widths: list[int]

    def slice(self, weights: dict[str, Tensor], before: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The block's parameters, fp32, and the basis its output is in; before: [hidden, width], its input's."""
        family = self.family
        norms = {norm.name for norm in family.norms}
        tensors = {name: weight.float() for name, weight in weights.items() if name.rpartition(".")[0] not in norms}
        for name in family.writing:
            if name in tensors:
                tensors[name] = _centred(tensors[name], 0, family)
        steps, basis = _steps(family), before
        for place, (together, shortcut) in enumerate(steps):
            for norm in together:
                _read_in(tensors, norm, weights, basis)
            tensors[shortcut] = basis.float()
            following = steps[place + 1][0][0].name if place + 1 < len(steps) else ""
            basis = self._basis(tensors, following, self.widths[place])
            _write_in(tensors, [writer for norm in together for writer in norm.writers], shortcut, basis)
        return tensors, basis

    def _basis(self, tensors: dict[str, Tensor], name: str, width: int) -> Tensor:
        """The leading directions of the stream, still of full width, that enters module `name`."""
        gram = Gram(self.small.config.hidden_size, self.small.device)
        with self.small.placed(self.small.family.block(self.index), tensors):
            for number in range(len(self.stream.tokens)):
                gram.add(self.small.inputs(self.index, self.stream, number, [name])[name])
        return basis_of(gram.matrix)[:, :width]


def _read_in(tensors: dict[str, Tensor], norm: Norm, weights: dict[str, Tensor], basis: Tensor) -> None:
    gain, bias = weights[f"{norm.name}.weight"].float(), weights.get(f"{norm.name}.bias")
    for reader in norm.readers:
        weight = tensors[f"{reader}.weight"]
        if bias is not None:
            tensors[f"{reader}.bias"] = tensors[f"{reader}.bias"] + weight @ bias.float()
        tensors[f"{reader}.weight"] = (weight * gain) @ basis.float()


def _write_in(tensors: dict[str, Tensor], writers: list[str], shortcut: str, basis: Tensor) -> None:
    for writer in writers:
        for name in (f"{writer}.weight", f"{writer}.bias"):
            if name in tensors:
                tensors[name] = rotate_writer(tensors[name], basis)
    tensors[shortcut] = rotate_writer(tensors[shortcut], basis)
