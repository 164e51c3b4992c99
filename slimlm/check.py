"""Everything that can be checked before a run, checked before the run."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimlm.calibration import Windows
from slimlm.checkpoint.code import is_own_class
from slimlm.checkpoint.hub import Access
from slimlm.checkpoint.manifest import MANIFEST_NAME
from slimlm.checkpoint.resolve import ResolvedModel
from slimlm.checkpoint.skeleton import load_tokenizer, parameter_count
from slimlm.checkpoint.staging import check_output, check_space
from slimlm.checkpoint.tokenizer import check_tokenizer
from slimlm.device import (
    LEAST_RETURNED,
    MOST_KEPT,
    forget_peak,
    is_large,
    pick_device,
    return_memory_at_once,
)
from slimlm.errors import UserError
from slimlm.evaluation.text import TestWindows
from slimlm.method import Method
from slimlm.methods import method_of
from slimlm.model.hidden import sides
from slimlm.model.skip import skip_modules
from slimlm.model.streamed import StreamedModel
from slimlm.models import is_made_of, open_model, resolve_known, teacher_of
from slimlm.progress import LogProgress, Progress, resident_memory
from slimlm.ranks import ALONE, Ranks
from slimlm.recipe import AnyStep, RecoverStep, SliceStep
from slimlm.recover.run import with_streams
from slimlm.resolve import output_of, resolve
from slimlm.run import Plan
from slimlm.slice.plan import kept_times, time_decoding
from slimlm.unasked import Unasked, unasked
from slimlm.windows import (
    also_calibrated,
    beside_given,
    calibration_windows,
    evaluation_windows,
    require_held_out,
    said_of_passes,
    said_of_test,
    said_of_tokens,
    tokens_wanted,
)
from slimlm.work import with_measuring

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class How:
    """How a recipe is run, which is none of its business: not a bit of the result depends on it.

    resume: what an earlier run wrote may stand at the output, and is gone on from; anyway: where it is of another
    machine or version, too. work_dir: where hidden states are to wait, if not beside the output. access: to the hub.
    ranks: that share the work. of_checked: whether the model is a part of one that has been checked, and may grow by
    what makes the whole smaller. stream_memory: bytes of memory for hidden states that wait, if not a share of what is
    free. whole: of the first of several steps, where all are to be.
    """

    progress: Progress = field(default_factory=LogProgress)
    overwrite: bool = False
    resume: bool = False
    anyway: bool = False
    work_dir: Path | None = None
    stream_memory: int | None = None
    whole: Path | None = None
    access: Access = field(default_factory=Access)
    ranks: Ranks = ALONE
    of_checked: bool = False

    def is_there(self, output: Path) -> bool:
        """Whether there may be a result that stays; whether it is this run's is not decided here."""
        return self.resume and (output / MANIFEST_NAME).is_file()

    def may_replace(self, output: Path) -> bool:
        """Whether what stands there may go, if it is ours."""
        return self.overwrite or self.is_there(output)


@dataclass
class Job:
    """Everything a run needs, checked. windows: those given; None where there are none. can: what it does unasked.
    teacher: the dense model, where the one to work on is not.

    recipe: the step, resolved. started, memory_before: the clock's seconds and the process's resident bytes when all
    this began. also_calibrated: documents measured on that are in the windows. seconds: what each stage took so far.
    """

    recipe: AnyStep
    source: ResolvedModel
    output: Path
    model: StreamedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    can: Unasked
    teacher: StreamedModel | None
    test: TestWindows | None
    windows: Windows | None
    started: float
    memory_before: int
    also_calibrated: int
    seconds: dict[str, float] = field(default_factory=dict)
    resumed: bool = False

    @property
    def method(self) -> Method[Any]:
        """The step's row in the table."""
        return method_of(self.recipe)

    @property
    def dense(self) -> StreamedModel:
        """What the result is to be like."""
        return self.teacher or self.model

    @property
    def inputs(self) -> list[Path]:
        """Files and directories that are read."""
        return [*inputs_of(self.recipe, self.source), *([self.teacher.checkpoint.path] if self.teacher else [])]

    @property
    def result_bytes(self) -> int:
        """Of the weights that are planned."""
        return sum(spec.nbytes for spec in self.plan.tensors.values())

    @property
    def keeps_shapes(self) -> bool:
        """Whether nothing is going to be smaller, so that what comes later can be planned on the model itself."""
        return self.plan.parameters == parameter_count(self.model.model)


def check(step: AnyStep, how: How) -> Job:
    """Resolve a step, and find every fault that can be found without computing. Raises UserError; writes nothing."""
    started, memory_before = time.perf_counter(), resident_memory()
    output = output_of([step])
    source = resolve_known(step.model, step.revision, step.trust_remote_code, how.access)
    # First of all: what is allocated before stays as it was.
    return_memory_at_once(LEAST_RETURNED if is_large(source.path) else MOST_KEPT)
    check_output(output, how.may_replace(output), inputs_of(step, source), how.work_dir)
    device = how.ranks.device if how.ranks.size > 1 else pick_device(step.device)
    model = open_model(source.path, device, "fast", step.trust_remote_code)
    skip_modules(model, step.skip)
    tokenizer = load_tokenizer(source.path, step.trust_remote_code)
    step, teacher = _taught(step, model, output, how)
    can, asked = unasked(step, teacher or model, tokenizer, how.ranks), step
    wanted = tokens_wanted(step, model)
    step = resolve(can.decided(step), source, wanted, model.config, (teacher or model).config)
    _time(step, model, output, how)
    step, plan = planned(step, model)
    _refuse_other_class(model, plan)
    how.progress.line(f"model: {source}")
    if not how.of_checked:
        _require_less(step, model, plan)
        require_tokenizer(step, tokenizer, model, plan)
    for line in (*describe(step, model, plan), *can.said(asked)):
        how.progress.line(line)
    windows = calibration_windows(step, tokenizer, model.config.vocab_size)
    step = with_measuring(beside_given(step, windows), model)
    test = evaluation_windows(step, tokenizer, model.config.vocab_size)
    require_held_out(step, windows)
    seen = also_calibrated(test, windows) if test else 0
    said = *said_of_tokens(step, model, windows), *said_of_passes(step, windows), *said_of_test(test, seen)
    for line in said:
        logger.warning("%s", line)
    job = Job(step, source, output, model, tokenizer, plan, can, teacher, test, windows, started, memory_before, seen)
    _check_room(job, how)
    _check_weights(job, how)
    forget_peak(model.device)  # that of the run is from here on
    return job


def _check_weights(job: Job, how: How) -> None:
    """The one part of this that grows with the model. Raises UserError for weights that are not finite."""
    how.progress.stage("checking weights", parameter_count(job.model.model))
    start = time.perf_counter()
    job.model.checkpoint.check_finite(how.progress.step, how.ranks)
    if job.teacher is not None:
        job.teacher.checkpoint.check_finite(lambda count: None, how.ranks)
    job.seconds["checking"] = time.perf_counter() - start


def _taught(step: AnyStep, model: StreamedModel, output: Path, how: How) -> tuple[AnyStep, StreamedModel | None]:
    """The step, and what its model is to be like, if anything. Raises UserError for one that it cannot be trained
    towards."""
    if not isinstance(step, RecoverStep):
        return step, None
    teacher = teacher_of(step, model, how.access)
    path = teacher.checkpoint.path
    if path == model.checkpoint.path:
        raise UserError(f"{step.model} cannot be trained towards itself: give --teacher, the dense model")
    check_output(output, how.may_replace(output), [path], how.work_dir)
    how.progress.line(f"towards: {path}")
    return with_streams(step, model, teacher, is_made_of(step, model, teacher, how.access), how.progress), teacher


def _time(step: AnyStep, model: StreamedModel, output: Path, how: How) -> None:
    """Have a model know how long decoding takes, where its latency is asked for: as the run to resume measured it, so
    that this one comes to the same. Raises UserError."""
    if isinstance(step, SliceStep) and step.latency is not None:
        how.progress.stage("timing products", 1)
        model.times = how.ranks.decided(
            lambda: time_decoding(model, step, kept_times(output, how.whole) if how.resume else None)
        )
        how.progress.step()


def planned(step: AnyStep, model: StreamedModel) -> tuple[AnyStep, Plan]:
    """A resolved step, with the sparsity that widths by hand come to, and its plan. Raises UserError."""
    plan = method_of(step).plan(model, step)
    if isinstance(step, SliceStep) and step.widths:
        step = step.model_copy(update={"sparsity": 1 - plan.parameters / parameter_count(model.model)})
    return step, plan


def _require_less(step: AnyStep, model: StreamedModel, plan: Plan) -> None:
    """Raises UserError for widths by hand that remove nothing."""
    if isinstance(step, SliceStep) and step.widths and plan.parameters >= parameter_count(model.model):
        raise UserError(f"--widths {step.widths} removes nothing: {plan.parameters:,} parameters would be left")


def inputs_of(step: AnyStep, source: ResolvedModel) -> list[Path]:
    """Files and directories that a run reads."""
    names = [*(name for name, _ in step.parts), *([step.eval_text] if step.eval_text else [])]
    return [source.path, *(Path(name) for name in names if Path(name).exists())]


def _refuse_other_class(model: StreamedModel, plan: Plan) -> None:
    """Raises UserError where a checkpoint's own class would be left for one that need not compute the same."""
    own, other = type(model.model).__name__, type(plan.carrier).__name__
    if is_own_class(model.config) and type(plan.carrier) is not type(model.model):
        raise UserError(
            f"{own} comes with the checkpoint, and the result would be a {other}: prune it, or leave out "
            "--trust-remote-code if both compute the same"
        )


def require_tokenizer(step: AnyStep, tokenizer: PreTrainedTokenizerBase, model: StreamedModel, plan: Plan) -> None:
    """Raises UserError where the result's class would make another tokenizer of the same files."""
    changes_widths = method_of(step).sparsity_of == "parameters"
    carrier = model.family.carrier if changes_widths else None
    others = {plan.config.model_type, *([carrier.model_type] if carrier else [])} - {model.config.model_type}
    for model_type in sorted(others):
        check_tokenizer(model.checkpoint.path, tokenizer, model_type, step.trust_remote_code)


def _check_room(job: Job, how: How) -> None:
    """Raises UserError where the disk has too little; a result that is there already needs none."""
    if how.is_there(job.output):
        return
    written = job.result_bytes + journalled(job.recipe, job.model)
    waiting = spilled(job.recipe, job.model)
    check_space(job.output, written, how.work_dir, waiting, how.resume)


def describe(step: AnyStep, model: StreamedModel, plan: Plan) -> list[str]:
    """What is going to happen, before it does."""
    dense, size = parameter_count(model.model), sum(spec.nbytes for spec in plan.tensors.values())
    skipped = [f"{len(model.skipped)} modules of {sum(model.skipped.values()):,} weights stay as they are"]
    if method_of(step).sparsity_of != "parameters":
        line = f"parameters: {dense:,}, of which some will be zero; weights: {size / 1e6:,.1f} MB, as before"
        return [line, *(skipped if model.skipped else [])]
    return [
        f"parameters: {dense:,} -> {plan.parameters:,} ({plan.parameters / dense - 1:+.1%}); "
        f"weights: {model.checkpoint.bytes_on_disk() / 1e6:,.1f} MB -> {size / 1e6:,.1f} MB",
        *(f"{name}: {before} -> {after}" for name, (before, after) in plan.changes.items()),
        *([plan.remark] if plan.remark else []),
        *(skipped if model.skipped else []),
    ]


def journalled(step: AnyStep, model: StreamedModel) -> int:
    """Bytes that lie beside the result while it is made."""
    return method_of(step).kept(step, model) if step.dataset else 0


def spilled(step: AnyStep, model: StreamedModel) -> int:
    """Bytes of hidden states that wait in pairs of files where there is no memory for them: to calibrate, then two
    streams to measure; and what another process would resume from of each of the calibration's."""
    assert step.max_seq_length is not None
    per_window: int = step.max_seq_length * model.config.hidden_size * model.dtype.itemsize
    count = step.num_windows
    scratch = method_of(step).scratch(step, model)
    saved = (sides() - 2) * (count + min(scratch, 2 * count))
    calibrating = 2 * (count + scratch) + saved if step.dataset else 0
    measuring = 2 * 2 * step.eval_windows if step.measure else 0
    return per_window * (calibrating + measuring)
