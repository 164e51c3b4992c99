"""Slicing with one basis for the whole model (after SliceGPT, arXiv 2401.15024).

SliceGPT gives every block its own PCA basis and pays for it with two dense shortcuts per block that no stock class
has. With one orthonormal basis S: [hidden, width] for the whole residual stream the shortcuts are S^T S = I: the result
is the same architecture with a smaller hidden_size. S holds the leading eigenvectors of the sum, over all norms, of the
Gram matrix of what the readers see, the RMS-normalised stream.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.skeleton import build_skeleton, parameter_count
from slimlm.checkpoint.writer import TensorSpec
from slimlm.errors import UserError
from slimlm.families import Family
from slimlm.linalg.budget import choose_width, nearest_width
from slimlm.linalg.gram import Gram, rms_normalise
from slimlm.linalg.pca import principal_basis
from slimlm.linalg.rotate import rotate_embedding, rotate_reader, rotate_writer
from slimlm.methods.plan import Method, Outcome, Plan, Write
from slimlm.progress import Progress
from slimlm.recipe import Recipe
from slimlm.walk import Stream, StreamedModel

_RESIDUAL_AXIS = {"embedding": 1, "norm": 0, "reader": 1, "writer": 0, "final_norm": 0, "head": 1}


def plan_slice(model: StreamedModel, recipe: Recipe) -> Plan:
    """Choose hidden_size for the requested share of all parameters. Raises UserError when rounding cannot reach it."""
    hidden = model.config.hidden_size
    dense = parameter_count(model.model)
    tied = _head_is_tied(model)
    keeps_tie = tied and _constant(model.checkpoint_tensor(f"{model.family.final_norm}.weight"))
    divisor = getattr(model.config, model.family.heads) if model.family.heads else 1

    def parameters(width: int) -> int:
        return sum(torch.Size(shape).numel() for shape in _shapes(model, width, keeps_tie).values())

    choice = choose_width(hidden, parameters, dense, recipe.sparsity, divisor, recipe.round_to)
    if choice is None:
        near = nearest_width(hidden, parameters, dense, recipe.sparsity, divisor)
        hint = (
            f"the nearest that can be is {near.sparsity:.4f} (hidden_size {near.width})" if near else "nothing can be"
        )
        rounding = f"multiples of {recipe.round_to}" if recipe.round_to else f"multiples of {divisor}"
        raise UserError(
            f"sparsity {recipe.sparsity:g} cannot be reached within 0.01: "
            f"hidden_size {hidden} shrinks in {rounding}; {hint}"
        )
    return plan_width(model, choice.width, recipe.dtype, keeps_tie)


def plan_width(model: StreamedModel, width: int, dtype: str = "auto", keeps_tie: bool = False) -> Plan:
    """The plan for a given hidden_size, up to and including the dense one (a mere rotation)."""
    config = _sliced_config(model, width, keeps_tie)
    shapes = _shapes(model, width, keeps_tie)
    _check_carrier(config, shapes)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors = {
        name: TensorSpec(tuple(tensor.shape), model.stored_dtype(name, dtype))
        for name, tensor in checkpoint_tensors(model.model, empty).items()
    }
    changes = {"hidden_size": (model.config.hidden_size, width)}
    if _head_is_tied(model) and not keeps_tie:
        changes["tie_word_embeddings"] = (True, False)
    config.dtype = next(iter(tensors.values())).dtype
    return Plan(config, tensors, sum(torch.Size(spec.shape).numel() for spec in tensors.values()), changes)


def _head_is_tied(model: StreamedModel) -> bool:
    return f"{model.family.head}.weight" in model.model.all_tied_weights_keys


def _constant(gain: Tensor) -> bool:
    """A head tied to the embedding can stay so only if the final norm scales all directions alike."""
    return bool((gain == gain[0]).all())


def _shapes(model: StreamedModel, width: int, keeps_tie: bool) -> dict[str, tuple[int, ...]]:
    """Module tensor -> shape in the sliced model. Raises UserError for weights the family does not declare."""
    shapes = {}
    for name, tensor in model.model.state_dict().items():
        if name in model.model.all_tied_weights_keys and (keeps_tie or not name.startswith(model.family.head + ".")):
            continue
        role = model.family.role(name)
        if role is None:
            raise UserError(f"{model.config.model_type!r} has a weight slimlm does not know how to slice: {name}")
        shape = list(tensor.shape)
        is_reader_bias = role in ("reader", "head") and len(shape) == 1
        if role in _RESIDUAL_AXIS and not is_reader_bias:
            shape[_RESIDUAL_AXIS[role]] = width
        shapes[name] = tuple(shape)
    return shapes


def _sliced_config(model: StreamedModel, width: int, keeps_tie: bool) -> PretrainedConfig:
    config = copy.deepcopy(model.config)
    hidden = config.hidden_size
    heads = config.num_attention_heads
    config.head_dim = getattr(config, "head_dim", None) or hidden // heads
    config.hidden_size = width
    # The norm's mean runs over fewer components; with the readers' sqrt(hidden / width) this keeps it exact.
    setattr(config, model.family.norm_eps, getattr(config, model.family.norm_eps) * hidden / width)
    config.tie_word_embeddings = keeps_tie
    return config


def _check_carrier(config: PretrainedConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """The stock class must want exactly the tensors we are about to write."""
    carrier = build_skeleton(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in carrier.state_dict().items()}
    for name, shape in shapes.items():
        if wanted.get(name) != shape:
            raise UserError(
                f"{type(carrier).__name__} cannot carry hidden_size {config.hidden_size}: it wants {name} as "
                f"{wanted.get(name)}, slicing gives {shape}"
            )


@torch.no_grad()
def run_slice(model: StreamedModel, plan: Plan, batches: list[Tensor], write: Write, progress: Progress) -> Outcome:
    """Collect the Gram in one pass over the blocks, then rewrite them in a second."""
    gram = collect_gram(model, batches, progress)
    basis, eigenvalues = principal_basis(gram.matrix)
    width: int = plan.config.hidden_size
    basis = basis[:, :width].contiguous()
    rewrite(model, basis, bool(plan.config.tie_word_embeddings), write, progress)
    kept = float(eigenvalues[:width].sum() / eigenvalues.sum())
    return Outcome({"calibration_tokens_per_norm": gram.tokens // _norm_count(model), "energy_kept": kept}, basis)


def _norm_count(model: StreamedModel) -> int:
    return len(model.blocks) * len(model.family.norms) + 1


def collect_gram(model: StreamedModel, batches: list[Tensor], progress: Progress) -> Gram:
    """Sum over all norms of the Gram of the RMS-normalised stream that enters them."""
    eps: float = getattr(model.config, model.family.norm_eps)
    gram = Gram(model.config.hidden_size, model.device)
    progress.stage("calibrating", len(model.blocks))
    stream = model.embed(batches)
    for index in range(len(model.blocks)):
        start = time.perf_counter()
        with model.block(index) as block, _observed(block, model.family, gram, eps):
            model.advance(index, stream)
        progress.step()
        progress.line(f"{model.family.block(index)}  calibrated in {time.perf_counter() - start:.1f} s")
    _add_final(stream, gram, eps)
    return gram


def _add_final(stream: Stream, gram: Gram, eps: float) -> None:
    for hidden in stream.hidden:
        gram.add(rms_normalise(hidden, eps))


@contextmanager
def _observed(block: nn.Module, family: Family, gram: Gram, eps: float) -> Iterator[None]:
    def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        gram.add(rms_normalise(args[0], eps))

    handles = [block.get_submodule(norm.name).register_forward_pre_hook(observe) for norm in family.norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def rewrite(model: StreamedModel, basis: Tensor, keeps_tie: bool, write: Write, progress: Progress) -> None:
    """Write every tensor of the model in the basis: [hidden, width], one part at a time."""
    progress.stage("slicing", len(model.blocks) + 1)
    with model.loaded(model.outside):
        write(checkpoint_tensors(model.model, _slice_outside(model, basis, keeps_tie)))
    progress.step()
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            sliced = slice_block(dict(block.named_parameters()), model.family, basis)
            prefix = model.family.block(index)
            write(checkpoint_tensors(model.model, {f"{prefix}.{name}": value for name, value in sliced.items()}))
        progress.step()


def slice_block(weights: dict[str, Tensor], family: Family, basis: Tensor) -> dict[str, Tensor]:
    """One block's parameters, by name within the block, in the basis: [hidden, width]; fp32."""
    sliced = {name: weight for name, weight in weights.items() if name.rpartition(".")[0] in family.inner}
    for norm in family.norms:
        gain = weights[f"{norm.name}.weight"].float()
        sliced[f"{norm.name}.weight"] = gain.new_ones(basis.shape[1])
        for reader in norm.readers:
            sliced[f"{reader}.weight"] = rotate_reader(weights[f"{reader}.weight"].float(), gain, basis)
            if f"{reader}.bias" in weights:
                sliced[f"{reader}.bias"] = weights[f"{reader}.bias"]
    for writer in family.writers:
        for kind in ("weight", "bias"):
            if f"{writer}.{kind}" in weights:
                sliced[f"{writer}.{kind}"] = rotate_writer(weights[f"{writer}.{kind}"].float(), basis)
    return sliced


def _slice_outside(model: StreamedModel, basis: Tensor, keeps_tie: bool) -> dict[str, Tensor]:
    """Embeddings, final norm and head. A head that stays tied leaves the constant gain in the norm."""
    family, network = model.family, model.model
    hidden, width = basis.shape
    sliced = {
        f"{name}.weight": rotate_embedding(network.get_submodule(name).weight.float(), basis)
        for name in family.embeddings
    }
    gain = network.get_submodule(family.final_norm).weight.float()
    if keeps_tie:
        sliced[f"{family.final_norm}.weight"] = gain[:1].expand(width) * (hidden / width) ** 0.5
        return sliced
    head = network.get_submodule(family.head)
    sliced[f"{family.final_norm}.weight"] = gain.new_ones(width)
    sliced[f"{family.head}.weight"] = rotate_reader(head.weight.float(), gain, basis)
    if head.bias is not None:
        sliced[f"{family.head}.bias"] = head.bias
    return sliced


SLICE = Method(
    summary="delete directions of the residual stream: a smaller hidden_size, fewer parameters everywhere",
    paper="https://arxiv.org/abs/2401.15024",
    plan=plan_slice,
    run=run_slice,
)
