"""`slimlm eval`: texts, lm-eval tasks and generation, for models on identical documents."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slimlm.calibration import start_token
from slimlm.checkpoint.manifest import versions
from slimlm.device import check_precision, machine
from slimlm.display import usual
from slimlm.errors import RunFailure, UserError, nearest, out_of_memory, require_at_least
from slimlm.evaluation.account import Samples, accounts
from slimlm.evaluation.corrupt import CORRUPTIONS
from slimlm.evaluation.earlier import conditions_of, read_earlier, require_same, with_window
from slimlm.evaluation.harness import load_task_manager
from slimlm.evaluation.measuring import Measuring, Plan
from slimlm.evaluation.samples import check_samples, write_samples
from slimlm.evaluation.subjects import Subject, find_subjects, find_texts, find_writing
from slimlm.evaluation.tasks import DEFAULT_TASKS
from slimlm.meeting import start_ranks
from slimlm.progress import Progress
from slimlm.ranks import Ranks
from slimlm.settings import DTYPES, EvalSettings, by_name
from slimlm.shown import Shown

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation(Shown):
    """What was measured. `data` is JSON-ready: texts, tasks, settings, versions, one entry per model, and one per pair
    of a model and the dense one. unsaved: why the samples that were asked for are not on disk, if they are not."""

    data: dict[str, Any]
    unsaved: RunFailure | None = None

    @property
    def models(self) -> list[dict[str, Any]]:
        """The entries of `data`, one per model, the dense one last."""
        models: list[dict[str, Any]] = self.data["models"]
        return models

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """What changed from the dense model to each other one."""
        pairs: list[dict[str, Any]] = self.data["pairs"]
        return pairs


@by_name(EvalSettings)
@out_of_memory("lower --batch-size or --window, or spread the model with --device-map auto")
def evaluate(settings: EvalSettings) -> Evaluation:
    """Measure `model`, one or several, and `against` on the very same windows, questions and prompts.

    against: the dense model, or a directory that log_samples of an earlier run wrote, with what that measured of it.
    text: files or names of texts; None for the Python language reference and standard library. num_windows: 0 takes all
    of a text. window None takes the length the model was compressed with, else its context up to 2048. tasks: () for
    none. device_map: "auto" spreads a model over several GPUs. token, cache_dir: for models on the hub, as
    `from_pretrained` takes them. Several processes share the work, and all get the result. Raises UserError for models,
    texts or tasks that cannot be used, before any work.
    """
    check_precision()
    with start_ranks(settings.device) as ranks:
        return _evaluate(settings, ranks)


def _evaluate(settings: EvalSettings, ranks: Ranks) -> Evaluation:
    progress = usual(settings.progress) if ranks.first else Progress()
    settings = _checked(settings, ranks)
    earlier = read_earlier(settings)
    settings = settings if earlier is None else with_window(settings, earlier[1])
    models, dense = find_subjects(settings if earlier is None else replace(settings, against=None))
    everyone = [*models, *([] if dense is None else [dense])]
    texts = find_texts(everyone, settings)
    plan = Plan(settings, texts, _manager(everyone, settings), find_writing(everyone, settings))
    conditions = conditions_of(plan, models[0]) if earlier is not None or settings.log_samples is not None else {}
    if earlier is not None:
        require_same(earlier[1], conditions, str(settings.against))
    measuring = Measuring(plan, models, dense, ranks, progress, None if earlier is None else earlier[0])
    samples, dense_samples = _measured(measuring)
    data = {
        **accounts(samples, dense_samples, texts, settings.fragile),
        "texts": [{"name": text.name, **text.describe()} for text in texts],
        "tasks": {"names": list(settings.tasks or ()), "limit": settings.limit, "num_fewshot": settings.num_fewshot},
        "settings": _settings(settings),
        "notes": measuring.notes,
        "machine": machine(ranks.device),
        "ranks": ranks.account(),
        "versions": versions(),
    }
    found = Evaluation(data)
    if settings.log_samples is not None and ranks.first:
        try:
            everything = [*samples, *([] if dense_samples is None else [dense_samples])]
            write_samples(settings.log_samples, data, everything, texts, conditions)
        except RunFailure as error:  # the figures are worth more than what they come from
            logger.error("%s", error)
            return replace(found, unsaved=error)
    return found


def _manager(everyone: Sequence[Subject], settings: EvalSettings) -> "TaskManager | None":
    """Raises UserError for tasks that cannot be had, and models that cannot be asked them."""
    if not settings.tasks:
        return None
    manager = load_task_manager(settings.tasks)
    for one in everyone:
        if start_token(one.tokenizer) is None:
            raise UserError(
                f"tasks begin with BOS or EOS, and the tokenizer of {one.resolved.name} has neither: use --tasks none"
            )
    return manager


def _measured(measuring: Measuring) -> tuple[list[Samples], Samples | None]:
    """Of the models, and of the dense one."""
    models, progress = measuring.models, measuring.progress
    if not measuring.streamed:
        everyone = [*models, *([] if measuring.dense is None else [measuring.dense])]
        progress.expect([measuring.work(one) for one in everyone])
    samples = []
    for number, model in enumerate(models):
        progress.part(number)
        samples.append(measuring.measured(model))
    progress.part(len(models))
    return samples, measuring.of_dense(samples)


def _settings(settings: EvalSettings) -> dict[str, Any]:
    names = ("batch_size", "dtype", "seed", "apply_chat_template", "system_instruction", "gen_kwargs", "generate")
    return {name: getattr(settings, name) for name in names}


def _checked(settings: EvalSettings, ranks: Ranks) -> EvalSettings:
    """The settings with tasks and a device by name. Raises UserError for what cannot be."""
    if settings.device_map and ranks.size > 1:
        raise UserError("--device-map is for one process, and here each has the whole model on a device of its own")
    size = settings.batch_size
    size = int(size) if isinstance(size, str) and size.isdigit() else size
    if isinstance(size, str) and (not size.startswith("auto") or ranks.size > 1):
        raise UserError(f"--batch-size {size!r}: give a number" + (", or `auto`" if ranks.size == 1 else ""))
    require_at_least(1, batch_size=size if isinstance(size, int) else None)
    require_at_least(2, window=settings.window)
    require_at_least(
        0,
        num_windows=settings.num_windows,
        num_fewshot=settings.num_fewshot,
        generate=settings.generate,
        fragile=settings.fragile,
    )
    if settings.dtype not in DTYPES:
        raise UserError(f"--dtype {settings.dtype!r} is none of {', '.join(DTYPES)}")
    if settings.limit is not None and settings.limit <= 0:
        raise UserError(f"--limit {settings.limit:g}: give a number of questions, or a share of them, above 0")
    if unknown := [one for one in settings.corrupt or () if one not in CORRUPTIONS]:
        raise UserError(
            f"--corrupt {unknown[0]!r} is none of {', '.join(CORRUPTIONS)}{nearest(unknown[0], CORRUPTIONS)}"
        )
    if settings.fragile and settings.against is None:
        raise UserError("--fragile names what a model lost: say against which with --against")
    tasks = DEFAULT_TASKS if settings.tasks is None else tuple(settings.tasks)
    if settings.stream and (tasks or settings.device_map):
        raise UserError("--stream is for texts on one device: add --tasks none, and leave out --device-map")
    if settings.log_samples is not None and ranks.first:
        check_samples(settings.log_samples)
    return replace(settings, tasks=tasks, device=str(ranks.device), batch_size=size)
