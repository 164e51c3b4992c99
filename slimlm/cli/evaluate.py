"""`slimlm eval`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from slimlm.cli.launch import in_processes
from slimlm.cli.options import FiguresFile, ManyProcesses, Verbosity, command
from slimlm.cli.running import ready_to_tell, require_there, running, tell
from slimlm.imports import importing
from slimlm.settings import EvalSettings
from slimlm.started import own_rank

if TYPE_CHECKING:
    from slimlm.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class EvalOptions(EvalSettings, ManyProcesses, FiguresFile, Verbosity):
    """What is measured, and where the figures go."""


@command(EvalOptions)
def eval_command(options: EvalOptions) -> None:
    """Measure models: perplexity on texts, lm-eval tasks, and what they write.

    With --against, each is compared with the dense model on the same documents: changes with paired standard errors,
    answers that flipped, divergence of next-token distributions, and whether its own text has collapsed.

    Examples:

        slimlm eval llama-slice-25 --against llama

        slimlm eval DIR --against meta-llama/Llama-3.2-3B --tasks arc_easy,hellaswag --text wikitext2 --json result.json

        slimlm eval A B C --against DENSE --tasks none --corrupt typos,case --fragile 5 --log-samples samples

        slimlm eval DIR --num-processes 2
    """
    require_there(*options.model, options.against)
    ready_to_tell(options.json_path)
    if in_processes(options.num_processes, options.device):
        return
    settings = {field.name: getattr(options, field.name) for field in fields(EvalSettings)}
    settings["tasks"] = () if options.tasks == ("none",) else options.tasks
    with running(shown=options) as progress:
        with importing():
            from slimlm.evaluation.evaluate import evaluate

        found = evaluate(**{**settings, "progress": progress})
    if own_rank() == 0:
        _show(found, options.json_path)


def _show(found: "Evaluation", json_path: Path | None) -> None:
    from slimlm.report.evaluation import evaluation_shown
    from slimlm.report.terminal import show

    tell(found.data, json_path, lambda: show(evaluation_shown(found.data)))
    if found.unsaved is not None:
        raise typer.Exit(1)
