"""lm-eval's Python API, quietly."""

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import TypedDict

from slimlm.errors import UserError, nearest, one_line
from slimlm.evaluation.quiet import quiet as _quiet
from slimlm.evaluation.task_errors import loading_error, running_error
from slimlm.evaluation.tasks import TASKS_PATH
from slimlm.ranks import Ranks
from slimlm.settings import EvalSettings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

YAML = (".yaml", ".yml")
QUESTIONS = 16  # at a time: they are shorter than windows
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


class Score(TypedDict):
    """Of one metric of a task; without an error where lm-eval knows none."""

    value: float
    stderr: float | None


def load_task_manager(tasks: Sequence[str]) -> "TaskManager":
    """A TaskManager that knows the tasks asked for; every one is loaded once here, so faults show early.

    tasks: names of lm-eval's tasks or slimlm's, or paths of YAML files. Raises UserError naming the task that is
    unknown, broken or unreachable.
    """
    with _quiet():
        manager = _task_manager(with_lm_evals=not all(map(_stands_alone, tasks)))
        for task in tasks:
            _load(manager, task)
    return manager


@functools.cache
def _task_manager(with_lm_evals: bool) -> "TaskManager":
    """lm-eval reads every one of its own tasks' files, more than ten thousand, to know their names."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS_PATH), include_defaults=with_lm_evals)


def _stands_alone(task: str) -> bool:
    """Whether it is one of slimlm's tasks or a file of one task, rather than of a group, which names others."""
    if not task.endswith(YAML):
        return (TASKS_PATH / f"{task}.yaml").is_file()
    try:
        node = yaml.compose(Path(task).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return True  # loading it says what is wrong
    fields = {key.value: value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
    return "group" not in fields and isinstance(fields.get("task"), yaml.ScalarNode)


def _load(manager: "TaskManager", task: str) -> None:
    if task.endswith(YAML) and not Path(task).is_file():
        raise UserError(f"task file {task} does not exist")
    try:
        manager.load([task])
    except yaml.YAMLError as error:
        raise UserError(f"task {task!r} cannot be loaded: {one_line(error)}") from error
    except Exception as error:  # whatever a task's code, its templates or the network raise
        if isinstance(error, KeyError) and not Path(task).is_file():
            near = nearest(task, manager.all_tasks)
            raise UserError(f"unknown task {task!r}{near}: see `lm_eval ls tasks`") from error
        known = ", ".join(sorted(path.stem for path in TASKS_PATH.glob("*.yaml")))
        raise loading_error(task, error, known) from error


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manager: "TaskManager",
    settings: EvalSettings,
    ranks: Ranks,
) -> dict[str, Any]:
    """lm-eval on a model in memory, or on one of each rank; for all what `lm_eval.simple_evaluate` returns. Raises
    UserError for settings that it refuses."""
    # lm-eval prints, and figures may go to standard output
    with _quiet(), _compiled_once(), redirect_stdout(sys.stderr), ExitStack() as stack:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        how = {"pretrained": model, "tokenizer": tokenizer, "batch_size": settings.batch_size or QUESTIONS}
        if ranks.size == 1:
            wrapped = HFLM(**how)
        else:
            from slimlm.evaluation.dealt import DealtLM, dealt

            wrapped = DealtLM(**how)
            stack.enter_context(dealt(wrapped, ranks))
        try:
            found: dict[str, Any] = simple_evaluate(
                model=wrapped,
                tasks=list(settings.tasks or ()),
                task_manager=manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                system_instruction=settings.system_instruction,
                gen_kwargs=settings.gen_kwargs,
                **({} if settings.seed is None else dict.fromkeys(SEEDS, settings.seed)),
            )
        except (ValueError, TypeError, ImportError) as error:
            raise running_error(", ".join(settings.tasks or ()), error, settings.num_fewshot) from error
    return found


@contextmanager
def _compiled_once() -> Iterator[None]:
    """lm-eval compiles a task's templates anew for every document."""
    from lm_eval.utils import env

    with patch.object(env, "from_string", functools.cache(env.from_string)):
        yield


def task_scores(results: Mapping[str, Mapping[str, float | str]]) -> dict[str, dict[str, Score]]:
    """Scores by task and metric, from lm-eval's flat `metric,filter` keys."""
    scores: dict[str, dict[str, Score]] = {}
    for task, figures in results.items():
        scores[task] = {}
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = figures.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric},{kind}"
            scores[task][name] = {"value": value, "stderr": stderr if isinstance(stderr, (int, float)) else None}
    return scores
