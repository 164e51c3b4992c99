"""Recovery as a run: two models in memory, and what training found written as the result."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimlm.checkpoint.kin import KIN, Kin, is_moved, kin_files, read_kin
from slimlm.checkpoint.manifest import read_manifest
from slimlm.deal import Deal
from slimlm.device import available_memory, keep_freed_memory, training_dtype
from slimlm.errors import RunFailure, UserError
from slimlm.linalg.likelihood import Likeliest
from slimlm.model.result import Rows
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every
from slimlm.model.whole import recompute, whole
from slimlm.progress import Progress
from slimlm.recipe import RecoverStep
from slimlm.recover.losses import StreamLoss
from slimlm.recover.needs import SIDES, memory_needed
from slimlm.recover.optimizers import MFAC, Adam, Changed, Optimizer
from slimlm.recover.teacher import Beside, Remembered, Teacher, likeliest_of
from slimlm.recover.text import Text
from slimlm.recover.training import JUDGED, Schedule, State, Training
from slimlm.run import Outcome, Plan, Run
from slimlm.started import local_size

Found = tuple[dict[str, Any], dict[str, Tensor]]  # notes for the manifest, and trained parameters by name


def plan_recover(model: StreamedModel, recipe: RecoverStep) -> Plan:
    """The same tensors with other numbers. Raises UserError for weights that the family does not declare."""
    model.require_declared("recover")
    if recipe.lora and any(every(model, lambda block: block.family.experts)):
        raise UserError("--lora: a mixture's experts are packed, which no matrix of low rank is added to: leave it out")
    return Plan.like(model, recipe.dtype)


def run_recover(run: Run[RecoverStep]) -> Outcome:
    """Train, and write the best weights there were, or those that came in."""
    run.result.lay_out(run.plan.tensors, run.plan.carrier)
    notes, found = _recalled(run) or _trained(run)
    if not notes["best_step"]:
        run.progress.line("training made held-out text no better: the model stays as it was")
    for part in run.model.outside:
        run.result.write(run.model, part, _outside(run.model, part, found))
    for block in run.walk("writing"):
        weights = {name: found.get(f"{block.path}.{name}", own) for name, own in block.weights().items()}
        run.result.write_block(block, weights)
    run.result.settle()
    return Outcome(run.plan, notes)


def _outside(model: StreamedModel, part: str, found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor | Rows]]:
    """The parameters of a part that is no block, trained or as they were."""
    for name, _ in model.model.get_submodule(part).named_parameters():
        full = f"{part}.{name}"
        if full not in model.model.all_tied_weights_keys:
            yield full, found[full] if full in found else model.chunks(full)


def _recalled(run: Run[RecoverStep]) -> Found | None:
    recalled = run.journal.recall("recovered")
    return (recalled[0]["notes"], recalled[1]) if recalled else None


def _trained(run: Run[RecoverStep]) -> Found:
    """Raises RunFailure for too little memory, or text."""
    assert run.dense is not None
    assert run.windows is not None
    text = Text.of(run.windows, run.recipe.times(len(run.windows.tokens) - run.recipe.own_windows))
    if not text.held or not len(text.learned):
        raise RunFailure(f"{len(run.windows.tokens)} windows are too few to learn from some and judge by others")
    _require_memory(run)
    keep_freed_memory()
    progress = run.progress
    teacher, student = _teacher(run, text), whole(run.model, torch.float32)
    if run.recipe.gradient_checkpointing:
        recompute(every(run.model, lambda block: student.get_submodule(block.path)))
    schedule, stays = _schedule(run, text), _staying(run.model)
    training = Training(student, teacher, text, schedule, run.ranks, stays, run.model.matrices, _streams(run))
    if run.recipe.minutes is not None:
        training.schedule = _in_time(run, training)
    _go_on(run, training)
    progress.stage("recovering", training.schedule.steps, training.state.step)
    training.run(lambda: _keep(run, training), progress)
    run.ranks.share(list(training.best.values()))  # other processors might round otherwise
    notes = {"teacher": str(run.dense.checkpoint.path), **_notes(training)}
    run.journal.keep("recovered", training.best, notes=notes)
    return notes, training.best


def _teacher(run: Run[RecoverStep], text: Text) -> Teacher:
    """The model beside it, or what that one said, by an earlier process even."""
    assert run.dense is not None
    count, recalled = run.recipe.teacher_top_k, run.journal.recall("teacher")
    if not count:
        return Beside(whole(run.dense))
    if recalled is None:
        run.progress.stage("asking the teacher", len(Deal(run.ranks, len(text.tokens)).mine))
        model, dtype = whole(run.dense), training_dtype(run.model.device)
        likeliest = likeliest_of(model, text.tokens, count, dtype, run.ranks, run.progress)
        run.journal.keep("teacher", likeliest._asdict())
        return Remembered(likeliest)
    return Remembered(Likeliest(**{name: one.cpu() for name, one in recalled[1].items()}))


def kin_of(model: StreamedModel, dense: StreamedModel) -> Kin | str:
    """What a model's stream is of its dense one's, or why that cannot be told."""
    path, blocks = model.checkpoint.path, len(dense.blocks)
    found = read_kin(path, model.config.hidden_size, len(model.blocks))
    if len(model.blocks) < 2:
        return "there is nothing behind a single block but the head"
    if found is None or (not kin_files(path) and len(model.blocks) != blocks):
        return f"no {KIN} in {path} says what its stream is of the dense one's"
    if found.basis.shape[0] != dense.config.hidden_size or int(found.blocks.max()) >= blocks:
        return (
            f"{path / KIN} is of a dense model of width {found.basis.shape[0]}, and {dense.checkpoint.path} has "
            f"{dense.config.hidden_size} and {blocks} blocks"
        )
    return found


def with_streams(
    step: RecoverStep, model: StreamedModel, dense: StreamedModel, is_own: bool, progress: Progress
) -> RecoverStep:
    """The step with what streams count for, where it does not say. is_own: whether the model was made of the dense one,
    as far as its manifest says. Raises UserError where they shall count and cannot."""
    kin = kin_of(model, dense)
    if isinstance(kin, str) and step.hidden_weight:
        raise UserError(f"--hidden-weight: {kin}: leave it out")
    unknown = f"the model was not made of {dense.checkpoint.path}, says its slimlm.json"
    why = kin if isinstance(kin, str) else unknown if not is_own or is_moved(dense.checkpoint.path) else ""
    if why and step.hidden_weight is None:
        progress.line(f"predictions alone are learned, not streams (--hidden-weight): {why}")
    return step.with_streams(not why)


def _streams(run: Run[RecoverStep]) -> StreamLoss | None:
    """What the streams are to count for, beside predictions."""
    assert run.dense is not None
    if not run.recipe.hidden_weight:
        return None
    kin = kin_of(run.model, run.dense)
    assert isinstance(kin, Kin)
    kin = kin._replace(basis=kin.basis.to(run.model.device))
    return StreamLoss(run.recipe.hidden_weight, kin, run.model.family.centred)


def _staying(model: StreamedModel) -> dict[str, list[int]]:
    """Parameters of modules that are skipped, and of packed ones which experts'; those of a whole module have none."""
    tied, found = model.model.all_tied_weights_keys, dict[str, list[int]]()
    known = {name for name, _ in model.model.named_parameters()}
    for module in model.skipped:
        packed, _, expert = module.rpartition(".")
        if packed in known:
            found.setdefault(packed, []).append(int(expert))
        names = [tied.get(name, name) for name in (f"{module}.weight", f"{module}.bias")]
        found |= {name: [] for name in names if name in known}
    return found


def _require_memory(run: Run[RecoverStep]) -> None:
    """Raises RunFailure where both models, and what training one takes, are more than is free."""
    assert run.dense is not None
    needed = memory_needed(run.recipe, run.model, run.dense)
    where = "gpu" if run.model.device.type == "cuda" else "host"
    free = available_memory(run.model.device)[where] // (local_size() if where == "host" else 1)
    if needed > free:
        raise RunFailure(
            f"training takes {needed / 1e9:,.1f} GB of {where} memory for weights and what the optimizer remembers, "
            f"and {free / 1e9:,.1f} GB are free: use a larger machine, --lora, --teacher-top-k, --hidden-weight 0 "
            "or fewer mfac_gradients"
        )


def _schedule(run: Run[RecoverStep], text: Text) -> Schedule:
    recipe = run.recipe
    steps = max(1, recipe.tokens // (recipe.batch_size * text.tokens.shape[1]))
    rate, towards = _rate(run, steps), recipe.objective == "kl"
    return Schedule(steps, recipe.batch_size, rate, recipe.seed, towards, recipe.lora, _optimizer(recipe))


def _rate(run: Run[RecoverStep], steps: int) -> float:
    manifest = read_manifest(run.model.checkpoint.path)
    return run.recipe.rate(steps, manifest and manifest["sparsity"]["zeros_in_pruned_matrices"])


def _optimizer(recipe: RecoverStep) -> Callable[[Changed], Optimizer]:
    """Of parameters, [...] by name."""
    if recipe.optimizer == "adamw":
        return Adam
    return partial(MFAC, count=recipe.mfac_gradients, damping=recipe.mfac_damping, size=recipe.mfac_block)


def _in_time(run: Run[RecoverStep], training: Training) -> Schedule:
    """As many steps as there is time for, judging included, as the first process of the run measured both."""
    record = run.journal.last("timed")
    if record is None:
        run.progress.stage("timing the first steps", 1)
        step, judging = max(run.ranks.gather(training.seconds()))
        run.journal.commit("timed", seconds=[step, judging])
    else:
        step, judging = record["seconds"]
    assert run.recipe.minutes is not None
    most = max(1, int((60 * run.recipe.minutes - (1 + JUDGED) * judging) / step))
    steps = min(training.schedule.steps, most)
    return replace(training.schedule, steps=steps, rate=_rate(run, steps))


def _keep(run: Run[RecoverStep], training: Training) -> None:
    """All that another process needs to go on."""
    last = run.journal.last("training")
    side = SIDES[0] if last is None or last["side"] == SIDES[1] else SIDES[1]
    weights = {name: one.detach() for name, one in training.changed.items()}
    for what, tensors in (("weights", weights), ("best", training.best), *training.optimizer.memory().items()):
        run.journal.keep(f"{what} {side}", tensors)
    run.journal.commit("training", side=side, state=asdict(training.state))


def _go_on(run: Run[RecoverStep], training: Training) -> None:
    """From where an earlier process kept everything, if one did and it is all there still."""
    last = run.journal.last("training")
    if last is None:
        return
    kinds = ("weights", "best", *training.optimizer.remembers)
    found = {what: run.journal.recall(f"{what} {last['side']}") for what in kinds}
    kept = {what: one[1] for what, one in found.items() if one is not None}
    if len(kept) == len(found):
        training.go_on(State(**last["state"]), kept.pop("weights"), kept.pop("best"), kept)
    else:
        run.progress.line("what was kept of the training is damaged: it starts over")


def _notes(training: Training) -> dict[str, Any]:
    """What there is to say of it in the manifest."""
    state, schedule = training.state, training.schedule
    tokens = state.step * schedule.size * training.text.tokens.shape[1]
    return {
        "steps": state.step, "best_step": state.best_step, "trained_tokens": tokens, "zeros_kept": training.zeros,
        "learning_rate": schedule.rate, "windows": len(training.text.learned.unique()), "history": state.history,
        "held_out_windows": {name: len(numbers) for name, numbers in training.text.held.items()},
        "compute_dtype": str(training.dtype).removeprefix("torch."),
    }  # fmt: skip
