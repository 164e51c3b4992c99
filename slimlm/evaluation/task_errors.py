"""What lm-eval's errors mean to whoever named a task: what is wrong, and what to do, in a line."""

import re
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

from jinja2 import TemplateError, UndefinedError

from slimlm.errors import UserError, one_line

TOO_MANY = "larger than population"  # what drawing examples says


def loading_error(task: str, error: Exception, without_network: str) -> UserError:
    """Why a task cannot be loaded. without_network: tasks that could, always."""
    if isinstance(error, UndefinedError):
        return UserError(f"task {task!r}: a template of it names what its data does not have: {one_line(error)}")
    if isinstance(error, (TemplateError, SyntaxError)):
        return UserError(f"task {task!r}: a template of it is broken: {one_line(error)}")
    if isinstance(error, ImportError):
        return UserError(f"task {task!r} needs what is not installed: {one_line(error)}{_install(error)}")
    if isinstance(error, KeyError) and Path(task).is_file():
        what = "a metric, filter or the like" if error.args == (None,) else str(error)
        return UserError(f"task {task!r} names {what} that lm-eval does not know, or its data does not have")
    if isinstance(error, (ValueError, TypeError, AttributeError)):
        return UserError(f"task {task!r} cannot be loaded: {one_line(error)}")
    return UserError(  # datasets and the hub client raise their HTTP library's own errors
        f"data of task {task!r} could not be fetched ({one_line(error)}): check the network, or use the tasks that "
        f"need none: {without_network}"
    )


def running_error(tasks: str, error: Exception, examples: int | None) -> UserError:
    """Why tasks cannot be run as they are asked for. examples: shown before each question."""
    if examples and TOO_MANY in str(error):
        return UserError(f"--num-fewshot {examples}: a split of {tasks} that examples are drawn from has fewer")
    if isinstance(error, ImportError):
        return UserError(f"tasks {tasks} need what is not installed: {one_line(error)}{_install(error)}")
    return UserError(f"tasks {tasks} cannot be run so: {one_line(error)}")


def _install(error: ImportError) -> str:
    """How to get a package: by lm-eval's own extra where it has one."""
    name = (error.name or "").partition(".")[0]
    extras = sorted(set(_extras(name))) if name else []
    if extras:
        return f": pip install 'lm_eval[{extras[0]}]'"
    return f": pip install {name}" if name and "pip install" not in str(error) else ""


def _extras(package: str) -> Iterator[str]:
    for line in requires("lm_eval") or ():
        found = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line)
        if found and re.sub(r"[-_.]+", "_", found[1]).lower().startswith(package.lower()):
            yield found[2]
