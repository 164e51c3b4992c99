"""Slicing with one basis for the whole model (after SliceGPT, arXiv 2401.15024).

SliceGPT gives every block its own PCA basis and pays for it with two dense shortcuts per block that no stock class
has. With one orthonormal basis S: [hidden, width] for the whole residual stream the shortcuts are S^T S = I: the result
is the same architecture with a smaller hidden_size. S holds the leading eigenvectors of the sum, over all norms, of the
Gram matrix of what the readers see, the RMS-normalised stream.
"""

import copy
import math
import time
from collections.abc import Iterator

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
from slimlm.methods.plan import Method, Outcome, Plan
from slimlm.recipe import Recipe
from slimlm.walk import StreamedModel, hooked
from slimlm.work import Rows, Work

_RESIDUAL_AXIS = {"embedding": 1, "norm": 0, "reader": 1, "writer": 0, "final_norm": 0, "head": 1}


def plan_slice(model: StreamedModel, recipe: Recipe) -> Plan:
    """Choose hidden_size for the requested share of all parameters. Raises UserError when rounding cannot reach it."""
    if recipe.pattern:
        raise UserError("--pattern is for methods that set weights to zero; slice removes whole directions")
    hidden = model.config.hidden_size
    dense = parameter_count(model.model)
    tied = model.head_is_tied
    keeps_tie = tied and _constant(model.checkpoint_tensor(f"{model.family.final_norm}.weight"))
    divisor = getattr(model.config, model.family.heads) if model.family.heads else 1

    def parameters(width: int) -> int:
        return sum(torch.Size(shape).numel() for shape in _shapes(model, width, keeps_tie).values())

    choice = choose_width(hidden, parameters, dense, recipe.sparsity, divisor, recipe.round_to)
    if choice is None:
        multiple = math.lcm(divisor, recipe.round_to or 1)
        near = nearest_width(hidden, parameters, dense, recipe.sparsity, multiple)
        hint = f"the nearest is {near.sparsity:.4f} (hidden_size {near.width})" if near else "no smaller one is left"
        raise UserError(
            f"sparsity {recipe.sparsity:g} cannot be reached: "
            f"hidden_size {hidden} shrinks in multiples of {multiple}; {hint}"
        )
    return plan_width(model, choice.width, recipe, keeps_tie)


def plan_width(model: StreamedModel, width: int, recipe: Recipe, keeps_tie: bool = False) -> Plan:
    """The plan for a given hidden_size, up to and including the dense one (a mere rotation)."""
    config = _sliced_config(model, width, keeps_tie)
    shapes = _shapes(model, width, keeps_tie)
    _check_carrier(config, shapes)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors = {
        name: TensorSpec(tuple(tensor.shape), model.stored_dtype(name, recipe.dtype))
        for name, tensor in checkpoint_tensors(model.model, empty).items()
    }
    changes = {"hidden_size": (model.config.hidden_size, width)}
    if model.head_is_tied and not keeps_tie:
        changes["tie_word_embeddings"] = (True, False)
    config.dtype = next(iter(tensors.values())).dtype
    return Plan(config, tensors, sum(torch.Size(spec.shape).numel() for spec in tensors.values()), recipe, changes)


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
    if hasattr(config, "auto_map"):
        del config.auto_map  # the result is stock: no code travels with it
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
def run_slice(model: StreamedModel, plan: Plan, batches: list[Tensor], work: Work) -> Outcome:
    """Collect the Gram in one pass over the blocks, then rewrite them in a second."""
    basis, notes = find_basis(model, plan.config.hidden_size, batches, work)
    rewrite(model, basis, bool(plan.config.tie_word_embeddings), work)
    return Outcome(notes, basis)


def find_basis(model: StreamedModel, width: int, batches: list[Tensor], work: Work) -> tuple[Tensor, dict[str, float]]:
    """The leading eigenvectors of the model's Gram, [hidden, width], and figures about them."""
    record = work.journal.last("basis")
    saved = work.journal.load(record["tensors"]) if record else None
    if record and saved:
        return saved["basis"].to(model.device), record["notes"]
    gram = collect_gram(model, batches, work)
    work.progress.stage("finding the basis", 1)
    full, eigenvalues = principal_basis(gram.matrix)
    basis = full[:, :width].contiguous()
    notes = {
        "calibration_tokens_per_norm": gram.tokens / (len(model.blocks) * len(model.family.norms) + 1),
        "energy_kept": float(eigenvalues[:width].sum() / eigenvalues.sum()),
    }
    work.journal.commit("basis", tensors=work.journal.save("basis", {"basis": basis}), notes=notes)
    return basis, notes


def collect_gram(model: StreamedModel, batches: list[Tensor], work: Work) -> Gram:
    """Sum over all norms of the Gram of the RMS-normalised stream that enters them."""
    eps: float = getattr(model.config, model.family.norm_eps)
    gram = Gram(model.config.hidden_size, model.device)
    work.progress.stage("calibrating", len(model.blocks))
    stream, state, first = work.start_stream(model, "calibration", batches)
    if state:
        gram.matrix, gram.tokens = state["gram"].to(model.device), int(state["tokens"])
        work.progress.step(first)

    def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        gram.add(rms_normalise(args[0], eps))

    for index in range(first, len(model.blocks)):
        start = time.perf_counter()
        with (
            model.block(index) as block,
            hooked((block.get_submodule(norm.name), observe) for norm in model.family.norms),
        ):
            model.advance(index, stream)
        work.save_stream("calibration", index, stream, {"gram": gram.matrix, "tokens": torch.tensor(gram.tokens)})
        work.progress.step()
        work.progress.done("calibrated", model.family.block(index), time.perf_counter() - start)
    for hidden in stream.hidden:
        gram.add(rms_normalise(hidden, eps))
    return gram


@torch.no_grad()
def rewrite(model: StreamedModel, basis: Tensor, keeps_tie: bool, work: Work) -> None:
    """Write every tensor of the model in the basis: [hidden, width], one part at a time."""
    family = model.family
    work.progress.stage("slicing", len(model.blocks) + len(family.embeddings) + 1)
    for name in family.embeddings:
        _write_part(model, work, name, _slice_embedding(model, name, basis))
    _write_part(model, work, family.head, _slice_head(model, basis, keeps_tie))
    for index in range(len(model.blocks)):
        _write_part(model, work, family.block(index), _slice_block_of(model, index, basis))


def _write_part(model: StreamedModel, work: Work, name: str, tensors: Iterator[tuple[str, Tensor | Rows]]) -> None:
    """tensors: a generator, not begun when an earlier process has written the part."""
    start = time.perf_counter()
    if not work.written(name):
        work.write(model, name, tensors)
        work.progress.done("sliced", name, time.perf_counter() - start)
    work.progress.step()


def _slice_block_of(model: StreamedModel, index: int, basis: Tensor) -> Iterator[tuple[str, Tensor]]:
    with model.block(index) as block:
        for name, tensor in slice_block(dict(block.named_parameters()), model.family, basis):
            yield f"{model.family.block(index)}.{name}", tensor


def slice_block(weights: dict[str, Tensor], family: Family, basis: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One block's parameters, (name within the block, fp32 tensor) each, in the basis: [hidden, width]."""
    for name, weight in weights.items():
        if name.rpartition(".")[0] in family.inner:
            yield name, weight
    for norm in family.norms:
        gain = weights[f"{norm.name}.weight"].float()
        yield f"{norm.name}.weight", gain.new_ones(basis.shape[1])
        for reader in norm.readers:
            yield f"{reader}.weight", rotate_reader(weights[f"{reader}.weight"].float(), gain, basis)
            if f"{reader}.bias" in weights:
                yield f"{reader}.bias", weights[f"{reader}.bias"]
    for writer in family.writers:
        for name in (f"{writer}.weight", f"{writer}.bias"):
            if name in weights:
                yield name, rotate_writer(weights[name].float(), basis)


def _slice_embedding(model: StreamedModel, name: str, basis: Tensor) -> Iterator[tuple[str, Rows]]:
    weight = f"{name}.weight"
    yield weight, (rotate_embedding(rows.to(basis.device).float(), basis) for rows in model.chunks(weight))


def _slice_head(model: StreamedModel, basis: Tensor, keeps_tie: bool) -> Iterator[tuple[str, Tensor | Rows]]:
    """Final norm and head. A head that stays tied leaves the constant gain in the norm."""
    family = model.family
    hidden, width = basis.shape
    gain = model.checkpoint_tensor(f"{family.final_norm}.weight").to(basis.device).float()
    if keeps_tie:
        yield f"{family.final_norm}.weight", gain[:1].expand(width) * math.sqrt(hidden / width)
        return
    yield f"{family.final_norm}.weight", gain.new_ones(width)
    weight = f"{family.head}.weight"
    yield weight, (rotate_reader(rows.to(basis.device).float(), gain, basis) for rows in model.chunks(weight))
    if f"{family.head}.bias" in model.key_of:
        yield f"{family.head}.bias", model.checkpoint_tensor(f"{family.head}.bias")


SLICE = Method(
    summary="delete directions of the residual stream: a smaller hidden_size, fewer parameters everywhere",
    paper="https://arxiv.org/abs/2401.15024",
    sparsity_of="parameters",
    calibrates=True,
    plan=plan_slice,
    run=run_slice,
)
