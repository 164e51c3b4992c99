"""Recovery as a run: two models in memory, and what training found written as the result."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from slimlm.checkpoint.skeleton import parameter_count
from slimlm.device import available_memory
from slimlm.errors import RunFailure, UserError
from slimlm.model.result import Rows
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every
from slimlm.model.whole import whole
from slimlm.recipe import RecoverStep
from slimlm.recover.training import JUDGED, MOMENTS, Schedule, State, Text, Training
from slimlm.run import Outcome, Plan, Run
from slimlm.started import local_size

BYTES = 27  # of each parameter in training: itself, moments, best, gradients of two lanes in fp32; bf16 copy; mask
LOW_RANK_BYTES = 12  # and where changes of low rank are: itself, itself changed, the best
SIDES = ("a", "b")  # of what is kept to go on from, by turns: one is whole while the other is written
KEPT = 16 * len(SIDES) + 4  # bytes of each parameter for it, and of what was found
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
    text = Text.of(run.windows)
    if not text.held or not len(text.tokens):
        raise RunFailure(f"{len(run.windows.tokens)} windows are too few to learn from some and judge by others")
    _require_memory(run)
    progress = run.progress
    progress.stage("loading both models", 2)
    student, teacher = whole(run.model, torch.float32), whole(run.dense)
    stays = _staying(run.model)
    training = Training(student, teacher, text, _schedule(run, text), run.ranks, stays, run.model.matrices)
    if run.recipe.minutes is not None:
        training.schedule = _in_time(run, training)
    _go_on(run, training)
    progress.stage("recovering", training.schedule.steps)
    progress.step(training.state.step)
    training.run(lambda: _keep(run, training), progress)
    run.ranks.share(list(training.best.values()))  # other processors might round otherwise
    notes = {"teacher": str(run.dense.checkpoint.path), **_notes(training)}
    run.journal.keep("recovered", training.best, notes=notes)
    return notes, training.best


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
    each = LOW_RANK_BYTES if run.recipe.lora else BYTES
    needed = each * parameter_count(run.model.model) + run.dense.checkpoint.bytes_on_disk()
    where = "gpu" if run.model.device.type == "cuda" else "host"
    free = available_memory(run.model.device)[where] // (local_size() if where == "host" else 1)
    if needed > free:
        raise RunFailure(
            f"training takes {needed / 1e9:,.1f} GB of {where} memory for weights and what AdamW remembers, and "
            f"{free / 1e9:,.1f} GB are free: use a larger machine"
        )


def _schedule(run: Run[RecoverStep], text: Text) -> Schedule:
    recipe = run.recipe
    steps = max(1, recipe.tokens // (recipe.batch_size * text.tokens.shape[1]))
    return Schedule(steps, recipe.batch_size, recipe.learning_rate, recipe.seed, recipe.objective == "kl", recipe.lora)


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
    return replace(training.schedule, steps=min(training.schedule.steps, most))


def _keep(run: Run[RecoverStep], training: Training) -> None:
    """All that another process needs to go on."""
    last = run.journal.last("training")
    side = SIDES[0] if last is None or last["side"] == SIDES[1] else SIDES[1]
    weights = {name: one.detach() for name, one in training.changed.items()}
    for what, tensors in (("weights", weights), ("best", training.best), *training.moments().items()):
        run.journal.keep(f"{what} {side}", tensors)
    run.journal.commit("training", side=side, state=asdict(training.state))


def _go_on(run: Run[RecoverStep], training: Training) -> None:
    """From where an earlier process kept everything, if one did and it is all there still."""
    last = run.journal.last("training")
    if last is None:
        return
    found = {what: run.journal.recall(f"{what} {last['side']}") for what in ("weights", "best", *MOMENTS)}
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
        "learning_rate": schedule.rate, "windows": len(training.text.tokens), "history": state.history,
        "held_out_windows": {name: len(tokens) for name, tokens in training.text.held.items()},
        "compute_dtype": str(training.dtype).removeprefix("torch."),
    }  # fmt: skip
