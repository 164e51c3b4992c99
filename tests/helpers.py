"""Running a method without the flow around it, and slow loops over stock models to compare with."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimlm.checkpoint.journal import Journal
from slimlm.linalg.ridge import GUESS, STRENGTHS
from slimlm.methods import METHODS
from slimlm.model.hidden import Scratch
from slimlm.model.result import Result
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import backwards
from slimlm.progress import LogProgress
from slimlm.recipe import one_step
from slimlm.run import Outcome, Run
from slimlm.statistics.sweep import Walks
from slimlm.statistics.token_gradients import TokenGradients, gradients_of

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
READERS = {
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}
WRITERS = {"input_layernorm": "self_attn.o_proj", "post_attention_layernorm": "mlp.down_proj"}


def run_at(model: StreamedModel, batches: list[Tensor], path: Path, **settings) -> Run:
    """A run of a recipe on calibration batches, planned, that has not begun."""
    (path / "work").mkdir(parents=True)
    (path / "model").mkdir()
    recipe = one_step(model="x", **settings).steps[0]
    result = Result(path / "model", Journal(path / "work", {}))
    scratch = Scratch(path / "work", model.device)
    return Run(recipe, model, METHODS[recipe.method].plan(model, recipe), batches, result, scratch, LogProgress())


def carried_out(run: Run) -> Outcome:
    """What the run's method found out; what it wrote can be loaded."""
    outcome = METHODS[run.recipe.method].run(run)
    run.result.settle()
    run.result.writer.finish()
    outcome.plan.config.save_pretrained(run.result.output)
    return outcome


def run(
    model: StreamedModel, tokens: Tensor, path: Path, batch: int = 4, **settings
) -> tuple[dict[str, Tensor], Outcome, Run]:
    """A method on calibration windows: the tensors it wrote, what it found out, and the run itself."""
    done = run_at(model, list(tokens.split(batch)), path, **{"dtype": "float32", **settings})
    outcome = carried_out(done)
    index = path / "model" / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    tensors = {name: tensor for file in files for name, tensor in load_file(path / "model" / file).items()}
    return tensors, outcome, done


def walks_of(run: Run) -> Walks:
    """There and back."""
    return Walks(run.walk("there"), run.walk("back", order=backwards(run.model)), run.scratch)


def gathered_gradients(run: Run, index: int) -> dict[str, TokenGradients]:
    """What a run gathered of a block's linears."""
    _, saved = run.journal.recall(f"gradients-{index}")
    return gradients_of(run.model.blocks[index], saved)


def stock(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)


@torch.no_grad()
def inputs_of(model: PreTrainedModel, tokens: Tensor, names: list[str]) -> list[Tensor]:
    """What these modules of a stock model get: [windows, time, width] each, fp64."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, args: seen.__setitem__(name, args[0].double())

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    model(tokens)
    for handle in handles:
        handle.remove()
    return [seen[name].view(*tokens.shape, -1) for name in names]


def behind(block: int, norm: str, blocks: int = 3) -> str:
    """The module that gets the stream as the writer that follows a norm leaves it."""
    if norm == "input_layernorm":
        return f"model.layers.{block}.post_attention_layernorm"
    return "model.norm" if block == blocks - 1 else f"model.layers.{block + 1}.input_layernorm"


@torch.no_grad()
def ridge_by_hand(
    x: Tensor,
    y: Tensor,
    prior: Tensor,
    weight: Tensor | None = None,
    metric: Tensor | None = None,
    guess: float = GUESS,
) -> tuple[Tensor, float]:
    """Weighted least squares towards a prior [out, in], from x: [windows, time, in] and y: [windows, time, out].

    Of the strengths the best for every fifth window, which are held out, downhill from `guess` (from GUESS where that
    is infinite); with it a fit to all. Infinite, and the prior, where that is no better.
    """
    if weight is not None:
        x, y = (part * weight.sqrt()[..., None] for part in (x, y))
    held = torch.arange(len(x)) % 5 == 4
    metric = torch.eye(y.shape[-1]).double() if metric is None else metric

    def fitted(x: Tensor, y: Tensor, strength: float) -> Tensor:
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        root = (strength * x.square().sum(0).mean()).sqrt()
        above = torch.cat([x, root * torch.eye(x.shape[1])])
        return torch.linalg.lstsq(above, torch.cat([y, root * prior.double().T])).solution.T

    def loss(solution: Tensor) -> float:
        error = y[held] - x[held] @ solution.T
        return float((error @ metric * error).sum())

    losses = [loss(fitted(x[~held], y[~held], strength)) for strength in STRENGTHS]
    place = STRENGTHS.index(guess if guess < math.inf else GUESS)
    for step in (-1, 1):
        while 0 <= place + step < len(STRENGTHS) and losses[place + step] < losses[place]:
            place += step
    if losses[place] >= loss(prior.double()):
        return prior.double(), math.inf
    return fitted(x, y, STRENGTHS[place]), STRENGTHS[place]


def noted(strengths: dict[str, float]) -> dict[str, float | None]:
    """As the manifest has them: JSON knows no infinity."""
    return {name: strength if strength < math.inf else None for name, strength in strengths.items()}


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram)).double()


def best_on(weight: Tensor, matrix: Tensor, pruned: Tensor) -> Tensor:
    """Row by row what minimises (v - w) H (v - w)^T without what is pruned."""
    found = torch.zeros_like(weight)
    for row, gone in enumerate(pruned):
        kept = ~gone
        found[row, kept] = torch.linalg.solve(matrix[kept][:, kept], (matrix @ weight[row])[kept])
    return found


def sparsegpt_mask(weight: Tensor, matrix: Tensor, count: int) -> Tensor:
    """The smallest w^2 / [H^-1]_cc, H among the columns from c on, as SparseGPT chooses in one block of columns."""
    left = [torch.linalg.inv(matrix[c:, c:])[0, 0] for c in range(len(matrix))]
    scores = weight.square() / torch.stack(left)
    gone = torch.zeros(weight.numel(), dtype=torch.bool)
    gone[scores.flatten().argsort(stable=True)[:count]] = True
    return gone.view_as(weight)


def uneven(path: Path) -> Path:
    """Rewrite a checkpoint so that tokens differ in size, and what its readers look at in importance."""
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensor *= torch.exp(torch.randn(len(tensor), 1, generator=generator))
        elif any(reader in name for readers in READERS.values() for reader in readers) and tensor.ndim == 2:
            tensor[:, ::2] *= 0.05
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def is_linear(name: str) -> bool:
    return name.removesuffix(".weight").endswith(LINEAR)
