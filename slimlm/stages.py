"""A recipe carried out: its only step, or several, each on what the one before gave.

What an earlier step gives stands in the place where the output is built until the last one is done.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from slimlm.check import How, Job, check, journalled, require_tokenizer, spilled
from slimlm.checkpoint.disk import disk_errors
from slimlm.checkpoint.hub import Access
from slimlm.checkpoint.journal import Journal, finished_steps
from slimlm.checkpoint.manifest import Manifest
from slimlm.checkpoint.output import staged_output
from slimlm.checkpoint.push import Push
from slimlm.checkpoint.shared import shared
from slimlm.checkpoint.staging import Staging, check_output, check_space, size_of
from slimlm.compression import (
    LOG_NAME,
    OTHER_RUN,
    CompressResult,
    carry_out,
    compress_step,
    finished,
    publish,
)
from slimlm.device import check_precision
from slimlm.display import usual
from slimlm.errors import UserError, out_of_memory
from slimlm.manifest import Fingerprint, account_for, decisive, fingerprint_of
from slimlm.meeting import start_ranks
from slimlm.methods import method_of
from slimlm.model.skip import skipping
from slimlm.models import teacher_of
from slimlm.progress import Progress
from slimlm.prune.plan import require_room_later
from slimlm.ranks import ALONE, Ranks
from slimlm.recipe import OF_HUB, SELF, AnyStep, PruneStep, Recipe, RecoverStep, SliceStep, Source
from slimlm.recover.run import with_streams
from slimlm.resolve import NO_DATA, output_of, with_data
from slimlm.run import Plan
from slimlm.settings import CompressSettings, PushSettings, RunSettings, by_name
from slimlm.windows import calibration_windows, tokens_wanted
from slimlm.work import with_measuring, work_of

CALIBRATION_NAME = "calibration.npy"
OF_PLACES = ("model", "revision", "output_dir", *OF_HUB, "num_calibration_samples", "max_seq_length")  # in a run


def how_of(settings: RunSettings, ranks: Ranks = ALONE) -> How:
    """How a recipe is run, from what a caller says of it."""
    place = settings.work_dir
    return How(
        progress=usual(settings.progress) if ranks.first else Progress(),
        ranks=ranks,
        overwrite=settings.overwrite,
        resume=settings.resume or settings.resume_anyway,
        anyway=settings.resume_anyway,
        work_dir=None if place is None else Path(place).expanduser().resolve(),
        stream_memory=settings.stream_bytes,
        access=Access(settings.token, settings.cache_dir),
    )


def before_work(settings: PushSettings) -> Push | None:
    """Where the result is uploaded to, if anywhere. Raises UserError where it cannot be, or not from this process."""
    check_precision()
    if not settings.push_to_hub:
        return None
    push = Push(settings.push_to_hub, settings.private, settings.token)
    push.check()
    return push


@by_name(CompressSettings)
def compress(settings: CompressSettings) -> CompressResult:
    """Carry out a recipe; the result is a directory that stock transformers loads.

    resume: go on from what an interrupted run with the same recipe, model, versions and kind of machine left, if there
    is any; resume_anyway: with other versions or on another kind of machine, too, which the manifest then says.
    work_dir: a directory for hidden states that wait on disk, instead of `<output>.partial/`.
    token, cache_dir: for a model on the hub, as `from_pretrained` takes them.
    push_to_hub: a repository to upload the result to when it is whole; private: one that is not there yet.
    Raises UserError for anything wrong with the request, before any work, and RunFailure when the run itself fails.
    Either way nothing is left under the output's name; what a run had finished stays in `<output>.partial/`. Several
    processes, all of which call this, share the work, and all get the result.
    """
    push = before_work(settings)
    with start_ranks(settings.recipe.steps[0].device) as ranks:
        how = how_of(settings, ranks)
        result = compress_recipe(settings.recipe, how)
        if push is not None and ranks.first:
            how.progress.line(f"uploading to {push.repo}")
            how.progress.line(f"it is at {push.upload(result.output_dir)}")
    return result


@out_of_memory(
    "lower --batch-size or --max-seq-length, for slice and slimlm add --self-share 0 --refine 0; --dry-run says more"
)
def compress_recipe(recipe: Recipe, how: How) -> CompressResult:
    """The same where the process is one that slimlm works in. Raises UserError and RunFailure."""
    if len(recipe.steps) == 1:
        return compress_step(recipe.steps[0], how)
    output = output_of(recipe.steps)
    recipe = recipe.updated(output_dir=str(output))
    first = _first(recipe, output, how)
    fingerprint = fingerprint_of_all(first, recipe, how.ranks)
    manifest = finished(first, output, fingerprint, how)
    if manifest is None:
        own = staged_output(output, how.overwrite, how.resume, how.work_dir)
        with shared(how.ranks, output, how.work_dir, own) as staging:
            if how.ranks.writes:
                if not staging.stages.exists() and finished_steps(staging.work):
                    raise UserError(f"cannot resume: {staging.root} holds a single run; {OTHER_RUN}")
                staging.stages.mkdir(exist_ok=True)
            how.ranks.meet()
            # What all of them are, compared before any of them runs.
            Journal(staging.stages, fingerprint, how.anyway, how.ranks)
            steps = [first.recipe.model_copy(update={"output_dir": str(output)}), *later_steps(first, recipe)]
            how.progress.expect([work_of(step, first.model) for step in steps])
            manifest = _Several(first, steps, staging, how).carry_out(fingerprint)
    return CompressResult(output, manifest)


def _first(recipe: Recipe, output: Path, how: How) -> Job:
    """The first step, checked, and all that can be told of the others before it runs. Raises UserError."""
    check_output(output, how.may_replace(output), [], how.work_dir)
    place = Staging(output).stages
    step = recipe.steps[0].model_copy(update={"output_dir": str(place / "1")})
    first = check(step, replace(how, overwrite=True, whole=output))
    check_output(output, how.may_replace(output), first.inputs, how.work_dir)
    if not how.is_there(output):  # all results stand until the last is done, none of them larger than the first
        kept = max(journalled(step, first.model) for step in later_steps(first, recipe))
        needed = len(recipe.steps) * first.result_bytes + kept - (size_of(place) if how.resume else 0)
        check_space(output, needed, how.work_dir, spilled(first.recipe, first.model), how.resume)
    check_later(first, recipe, how.progress, how.access)
    return first


def later_steps(first: Job, recipe: Recipe) -> list[AnyStep]:
    """The steps after the first, the checked one, with what they take over from that: the length of its windows, and
    that the bundled model can do without data; and with what their models are to write among their data."""
    own = {"dataset": SELF} if first.source.origin == "bundled" else {}
    window = first.recipe.max_seq_length
    return [
        with_measuring(
            with_data(
                first.can.decided(step).model_copy(
                    update={"max_seq_length": step.max_seq_length or window, **({} if step.dataset else own)}
                ),
                tokens_wanted(step, first.model),
            ),
            first.model,
        )
        for step in recipe.steps[1:]
    ]


def plans_of_later(first: Job, steps: list[AnyStep]) -> Iterator[tuple[AnyStep, Plan | None]]:
    """Each step after the first, the checked one, and its plan where the shapes it will find are known and nothing is
    to be timed; the model leaves out meanwhile what it skips. Raises UserError for one that cannot be."""
    is_kept = first.keeps_shapes
    for step in steps:
        with skipping(first.model, step.skip):
            plan = method_of(step).plan(first.model, step) if is_kept and not getattr(step, "latency", None) else None
            yield step, plan
        is_kept = plan is not None and plan.parameters == first.plan.parameters


def check_later(first: Job, recipe: Recipe, progress: Progress, access: Access | None = None) -> None:
    """Say what the steps after the first, the checked one, leave out. Raises UserError for one that cannot follow."""
    for later in recipe.steps[1:]:
        for line in first.can.said(later):
            progress.line(line)
    slices = [step for step in [first.recipe] if isinstance(step, SliceStep)]
    for step, plan in plans_of_later(first, later_steps(first, recipe)):
        if plan is not None:
            require_tokenizer(step, first.tokenizer, first.model, plan)
        for slicing in slices:
            if isinstance(step, PruneStep):
                require_room_later(first.model, slicing, step)
        if isinstance(step, RecoverStep) and step.teacher:
            teacher = teacher_of(step, first.model, access or Access())
            if step.hidden_weight:
                with_streams(step, first.model, teacher, True, progress)
        if step.dataset is None and method_of(step).calibrates(step, first.source.path):
            raise UserError(f"{NO_DATA}, for the {step.method} that comes later, too")
        slices += [step] if isinstance(step, SliceStep) else []


def fingerprint_of_all(first: Job, recipe: Recipe, ranks: Ranks) -> Fingerprint:
    """What decides the weights of several steps to the last bit: every one's settings, and the data of each.

    Raises UserError for data that is none.
    """
    found = fingerprint_of(first, ranks)
    for number, step in enumerate(later_steps(first, recipe), start=2):
        found |= {f"recipe {name} of run {number}": value for name, value in decisive(step).items()}
        if isinstance(step, RecoverStep):
            found[f"recipe teacher of run {number}"] = step.teacher
        if not method_of(step).calibrates(step, first.source.path):
            continue
        windows = calibration_windows(step, first.tokenizer, first.model.config.vocab_size)
        if windows is not None:
            found[f"recipe dataset of run {number}"] = step.own_windows
            found[f"calibration sha256 of run {number}"] = windows.sha256
    return found


@dataclass(frozen=True)
class _Several:
    """Steps in the place where their output is built. first: the first of them, checked. steps: all, as they are to be
    run but for the model each gets."""

    first: Job
    steps: list[AnyStep]
    staging: Staging
    how: How

    @property
    def places(self) -> list[Path]:
        """Where the steps' results are, the last of which is the output."""
        return [*(self.staging.stages / str(number) for number in range(1, len(self.steps))), self.staging.output]

    def carry_out(self, fingerprint: Fingerprint) -> Manifest:
        """The manifest of all of them. fingerprint: of all."""
        stages: list[Manifest] = []
        ran = []
        for number, place in enumerate(self.places):
            self.how.progress.part(number)
            job = self._ready(number) if number else self.first
            self.how.progress.line(f"step {number + 1} of {len(self.steps)}: {job.recipe.described}")
            ran.append(job.recipe)
            if place != self.staging.output:
                stages.append(self._stage(job, place, number))
        made = carry_out(job, fingerprint_of(job, self.how.ranks), self.staging, self.how)
        made.manifest["fingerprint"] = fingerprint
        account_for(stages, Recipe(steps=list(map(as_asked, self.steps, ran))), made.manifest)
        publish(made, self.staging, self.how, job.source.path / LOG_NAME)
        return made.manifest

    def _ready(self, number: int) -> Job:
        """A step after the first, number 0, on what the one before it gave."""
        before, place, step = self.places[:number], self.places[number], self.steps[number]
        settings: dict[str, Any] = {"output_dir": str(place), "model": str(before[-1]), "revision": None}
        sampled = [where / CALIBRATION_NAME for where in before if (where / CALIBRATION_NAME).exists()]
        if sampled and step.own_windows and not isinstance(step, RecoverStep):
            count, length = numpy.load(sampled[0], mmap_mode="r").shape
            known = {SELF: Source(source=str(sampled[0]), windows=count)}
            sources = [known.get(source) or Source(source=source, windows=windows) for source, windows in step.parts]
            settings |= {"dataset": sources, "max_seq_length": length}
            if {source for source, _ in step.parts} == {SELF}:
                settings |= dict.fromkeys(OF_HUB)
        overwrite = self.how.overwrite or place != self.staging.output
        return check(step.model_copy(update=settings), replace(self.how, overwrite=overwrite))

    def _stage(self, job: Job, place: Path, number: int) -> Manifest:
        """What there is to say of an earlier step, whose result is at `place` then."""
        how = self.how
        fingerprint = fingerprint_of(job, how.ranks)
        manifest = finished(job, place, fingerprint, how)
        if manifest is not None:
            return manifest
        own = staged_output(place, True, how.resume, how.work_dir)
        with shared(how.ranks, place, how.work_dir, own) as staging:
            made = carry_out(job, fingerprint, staging, how)
            written = made.journal.recall("sampled")
            if written is not None and how.ranks.writes and not isinstance(job.recipe, RecoverStep):
                with disk_errors(staging.model):
                    numpy.save(staging.model / CALIBRATION_NAME, written[1]["tokens"].numpy())
            publish(made, staging, how, job.source.path / LOG_NAME if number else None)
        return made.manifest


def as_asked(asked: AnyStep, ran: AnyStep) -> AnyStep:
    """A step that was run, with the model and the data that it was asked for with."""
    update = {name: getattr(asked, name) for name in OF_PLACES}
    return ran.model_copy(update=update | ({} if ran.dataset is None else {"dataset": asked.dataset}))
