"""What a step is going to cost, stage by stage, and what of it an earlier process has done, so that the whole of a run
can be shown while it lasts.

The unit is a plain pass of one calibration window through all blocks of the model the step works on. The costs were
taken from runs on SmolLM2-135M (30 blocks, 256 windows of 256 tokens, CPU); a model of other proportions is off by a
factor that is the same for most stages, which is why times are told by the pace of the run itself.
"""

import math
from dataclasses import dataclass

from slimlm.calibration import sampling_batch, written_for
from slimlm.checkpoint.journal import Journal
from slimlm.fit.lm_head import fits_head
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every
from slimlm.prune import solved
from slimlm.prune.plan import refits_head
from slimlm.recipe import AnyStep, PruneStep, RecoverStep, RotateStep, SliceStep
from slimlm.slice import curves
from slimlm.statistics.sweep import TOKENS

Work = dict[str, float]  # by stage, in their order

SAMPLING, MEASURING = "sampling text", "measuring"
WRITING = 0.45  # a window of the model's own
READING = 14  # windows that cost as much as those written together do once: weights are read for every token
SWEEPING, BACK = 0.75, 1.5  # a window whose gradients are taken, and back
CUTTING = 0.7  # a held-out window through one of the models that are cut alone
REFITTING, REFINING = 3.8, 1.7  # a window of a block beside the dense one; each epoch of refinement
HEAD = 2.0  # a window of the head's fit
DELETING = 4.5  # finding what they do without; see SOLVING
SOLVING = 6.0  # least squares of as many inputs as a window has tokens; d^3 where a pass is d^2
SETTLING = 50.0  # the same for all weights that stay, for each row's mask, swaps included
ONCE = {"left-to-right": 5.0, "none": 1.7}  # the same, by update, of methods that see a block once
ROTATING = 1.0
REPAIRING, SEEING = 7.0, 3.0  # pruning towards the dense block, and by statistics
TRAINING = 1.5  # a window of a step, judging included


MOST_MEASURED, LEAST_MEASURED = 128, 16  # windows, where a step does not say how many

KEPT = {  # steps of a journal
    "sampled": "text that the model wrote",
    "basis": "the basis",
    "influence": "what blocks change",
    "widths": "the widths",
    "allocation": "the allocation",
    "head fitted": "the head",
    "teacher": "what the teacher said",
    "training": "the training up to the last time it was judged",
    "recovered": "the trained weights",
}


def work_of(step: AnyStep, model: StreamedModel) -> Work:
    """Of a resolved step on a model, behind its checks."""
    work: Work = {}
    if step.own_windows:
        work[SAMPLING] = WRITING * _written(step, model)
    if isinstance(step, PruneStep):
        work |= _pruning(step, model)
    elif isinstance(step, RecoverStep):
        work |= _recovering(step)
    else:
        work |= _slicing(step, model)
    if step.measure:
        work[MEASURING] = 2.0 * step.eval_windows
    return work


def pass_cost(step: AnyStep, model: StreamedModel) -> float:
    """What the unit is, in tokens' products with the weights: a window's, and what its tokens attend to, by operations
    and a half, as these are slower ones."""
    length = step.max_seq_length
    assert length is not None
    heads = getattr(model.config, "num_attention_heads", None) or 0
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // max(1, heads)
    attended: float = 1.5 * length * heads * width / max(1.0, Passed.of(model).weights)
    return length * (1 + attended)


@dataclass(frozen=True)
class Passed:
    """What a token goes through in a block, on the average of them. numbers: that matrices and norms take in and give.
    weights: of the matrices; all: experts' that it is not sent to, too."""

    numbers: float
    weights: float
    all: float

    @classmethod
    def of(cls, model: StreamedModel) -> "Passed":
        """By the shapes of a model's matrices; all experts' where its config does not say to how many a token goes."""
        counts = every(model, lambda block: block.family.experts.count if block.family.experts else 0)
        used, blocks = getattr(model.config, "num_experts_per_tok", None), len(model.blocks)
        share = used / max(counts) if used and any(counts) else 1.0
        shares = {name: share if name.rpartition(".")[2].isdigit() else 1.0 for name in model.matrices}
        numbers = sum(shares[name] * sum(size) for name, size in model.matrices.items())
        sizes = {name: math.prod(size) for name, size in model.matrices.items()}
        weights = sum(shares[name] * size for name, size in sizes.items())
        around: int = 4 * model.config.hidden_size
        return cls(numbers / blocks + around, weights / blocks, sum(sizes.values()) / blocks)


def with_measuring(step: AnyStep, model: StreamedModel) -> AnyStep:
    """The step, measured on as many windows, where it does not say, as take no longer than the rest of it."""
    if step.eval_windows is not None:
        return step
    rest = sum(work_of(step.model_copy(update={"measure": False}), model).values())
    count = max(LEAST_MEASURED, min(MOST_MEASURED, int(rest / 2)))
    return step.model_copy(update={"eval_windows": count})


def kept_of(journal: Journal, blocks: int) -> list[str]:
    """What an earlier process finished, in words; nothing where there was none. blocks: of the model."""
    kept = [words for step, words in KEPT.items() if journal.last(step)]
    for name in dict.fromkeys(record["step"] for record in journal.records if record["step"].startswith("streams ")):
        record = journal.last(name)
        assert record is not None
        kept.append(f"hidden states behind block {record['block'] + 1} of {blocks} ({name.removeprefix('streams ')})")
    parts = {record["step"] for record in journal.records if record["step"].startswith("written ")}
    gradients = {record["step"] for record in journal.records if record["step"].startswith("gradients-")}
    kept += [f"gradients of {len(gradients)} blocks"] if gradients else []
    return kept + ([f"{len(parts)} parts of the result"] if parts else [])


def _slicing(step: SliceStep | RotateStep, model: StreamedModel) -> Work:
    windows = float(step.num_windows)
    if isinstance(step, SliceStep) and step.basis == "per-block":
        return {"slicing": 2 * windows + _solving(step, model, ROTATING)}
    work = {"calibrating": windows}
    if step.weighting == "loss":
        work |= _sweeping(step)
    if isinstance(step, SliceStep) and step.measures_widths:
        held = curves.measured_on(step.num_windows)
        work["measuring widths"] = CUTTING * curves.CUTS * held + _solving(step, model, DELETING)
    if not isinstance(step, SliceStep) or not step.refit:
        return work | {"slicing": _solving(step, model, ROTATING)}
    work["refitting"] = (REFITTING + REFINING * step.refine) * windows + _solving(step, model, SOLVING)
    return work | ({"refitting the head": HEAD * windows} if fits_head(model) else {})


def _pruning(step: PruneStep, model: StreamedModel) -> Work:
    windows = float(step.num_windows)
    work = _sweeping(step) if step.needs_gradients else {}
    if step.allocation == "solved":
        chunks = len(model.blocks) / solved.TOGETHER
        work["measuring blocks"] = SEEING * min(2 * solved.WINDOWS, windows) * (1 + chunks) / 2
    elif step.allocation != "uniform":
        work["allocating"] = windows
    if step.repairs:
        work["pruning"] = (REPAIRING + REFINING * step.refine) * windows + _solving(step, model, SETTLING)
        return work | ({"refitting the head": HEAD * windows} if refits_head(model) else {})
    if not step.dataset:
        return work | {"pruning": 1.0}
    return work | {"pruning": max(1.0, SEEING * windows) + _solving(step, model, ONCE.get(step.update, 0.0))}


def _recovering(step: RecoverStep) -> Work:
    assert step.max_seq_length is not None
    work = {"asking the teacher": float(step.num_windows)} if step.teacher_top_k else {}
    return work | {"recovering": TRAINING * step.tokens / step.max_seq_length, "writing": 1.0}


def _written(step: AnyStep, model: StreamedModel) -> int:
    """Windows that the model writes, and what it costs that so few at a time are written."""
    assert step.max_seq_length is not None
    windows = written_for(step.own_windows)
    return windows + READING * -(-windows // sampling_batch(model.config, step.max_seq_length))


def _solving(step: AnyStep, model: StreamedModel, each: float) -> float:
    """What is done once, however many windows there are."""
    passed = Passed.of(model)
    return each * model.widest * (passed.all / max(1.0, passed.weights)) / pass_cost(step, model)


def _sweeping(step: AnyStep) -> Work:
    assert step.max_seq_length is not None
    windows = float(min(step.num_windows, max(1, TOKENS // step.max_seq_length)))
    return {"gradients": SWEEPING * windows, "gradients back": BACK * windows}
