"""Steps on so little text that they are soon done, which tell what the whole ones take."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from slimlm.check import Job
from slimlm.model.streamed import StreamedModel
from slimlm.recipe import OF_HUB, SELF, AnyStep, PruneStep, Source
from slimlm.work import ONCE

FEW = 6  # windows at least: every fifth is held out
REPAIRED, SEEN = 2048, 8192  # tokens that say on a CPU how long steps take that repair what they do, and others
OF_WINDOWS = ("dataset", "text_column", *OF_HUB, "num_calibration_samples", "max_seq_length", "seed")


def few(step: AnyStep, model: StreamedModel) -> AnyStep:
    """A step on so little text, and refined so little, that `work_of` tells from it what the whole takes, where all
    that takes long is in proportion to that. On a GPU a batch of windows, which says what memory is needed, too."""
    step = step.model_copy(update={"eval_windows": min(step.eval_windows, step.batch_size)})
    if not _is_in_proportion(step, model):
        return step
    assert step.max_seq_length is not None
    count, length, kept = step.num_windows, step.max_seq_length, max(FEW, step.batch_size)
    if model.device.type == "cpu":
        tokens = REPAIRED if step.repairs else SEEN
        kept = max(FEW, tokens // length)
        if model.config._attn_implementation != "eager":  # whose scores are in memory, by the square of a length
            length = min(length, max(2, tokens // kept))
    less: dict[str, Any] = {"max_seq_length": length}
    if count > kept:
        less["dataset"] = [
            Source(source=source, windows=max(1, round(part * kept / count))) for source, part in step.parts
        ]
    if step.repairs:
        less["refine"] = min(1, vars(step)["refine"])
    return step.model_copy(update=less)


def _is_in_proportion(step: AnyStep, model: StreamedModel) -> bool:
    """Whether what takes long is in proportion to the text, but for what `work_of` knows of."""
    if step.repairs or model.device.type != "cpu":
        return step.repairs
    if not isinstance(step, PruneStep) or step.dataset is None:
        return True
    return step.update in ONCE and step.mask != "greedy" and step.allocation == "uniform" and not step.needs_gradients


def of_windows(step: AnyStep) -> list[object]:
    """What decides which windows a step has."""
    return [getattr(step, name) for name in OF_WINDOWS]


def of_test(step: AnyStep) -> list[object]:
    """What decides which windows a step is measured on."""
    return [getattr(step, name) for name in ("eval_text", "eval_windows", "max_seq_length")]


def filled(job: Job, later: Iterable[AnyStep]) -> list[AnyStep]:
    """A run's steps with the windows that there are: its texts may fill fewer than asked for."""
    steps = [job.recipe, *later]
    if job.test is not None:
        first, count = of_test(job.recipe), len(job.test.tokens)
        steps = [step.model_copy(update={"eval_windows": count}) if of_test(step) == first else step for step in steps]
    if job.windows is None:
        return steps
    there, known = Counter(job.windows.of_each), of_windows(job.recipe)
    return [_with_those(step, there) if of_windows(step) == known else step for step in steps]


def _with_those(step: AnyStep, there: Counter[str]) -> AnyStep:
    parts = [Source(source=source, windows=there.get(source, count)) for source, count in step.parts]
    if [part.windows for part in parts] == [count for _, count in step.parts]:
        return step
    return step.model_copy(update={"dataset": parts})


def as_they_go(steps: Iterable[AnyStep]) -> Iterator[AnyStep]:
    """The steps of a run, of which the later ones go by the text that the model wrote in an earlier one."""
    wrote: AnyStep | None = None
    for step in steps:
        if step.own_windows and wrote is not None:
            counts = {**dict(step.parts), SELF: 0, "written": wrote.own_windows}
            parts = [Source(source=source, windows=count) for source, count in counts.items() if count]
            yield step.model_copy(update={"dataset": parts, "max_seq_length": wrote.max_seq_length})
        else:
            wrote = step if step.own_windows else wrote
            yield step
