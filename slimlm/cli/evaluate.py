"""`slimlm eval`."""

from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from slimlm.cli.launch import in_processes
from slimlm.cli.options import ManyProcesses, command
from slimlm.cli.running import kept, running
from slimlm.settings import EvalSettings, described
from slimlm.started import own_rank

if TYPE_CHECKING:
    from slimlm.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class EvalOptions(EvalSettings, ManyProcesses):
    """What is measured, and where the figures go."""

    _: KW_ONLY
    json_path: Path | None = described(None, "also write everything measured to this file", flag="--json")
    verbose: bool = described(False, "log what happens inside")


@command(EvalOptions)
def eval_command(options: EvalOptions) -> None:
    """Measure a model: perplexity on fixed windows, and lm-eval tasks.

    Examples:

        slimlm eval llama-slice-25 --against llama

        slimlm eval DIR --against meta-llama/Llama-3.2-3B --tasks arc_easy,hellaswag --text test.txt --json result.json

        slimlm eval DIR --num-processes 2
    """
    from slimlm.report.results import check_results

    if options.json_path is not None and own_rank() == 0:
        check_results(options.json_path)
    if in_processes(options.num_processes, options.device):
        return
    settings = {field.name: getattr(options, field.name) for field in fields(EvalSettings)}
    settings["tasks"] = () if options.tasks == ("none",) else options.tasks
    settings["num_windows"] = options.num_windows or None
    with running(verbose=options.verbose) as progress:
        from slimlm.evaluation.evaluate import evaluate

        found = evaluate(**{**settings, "progress": progress})
    if own_rank() == 0:
        _show(found, options.json_path)


def _show(found: "Evaluation", json_path: Path | None) -> None:
    from slimlm.report.summary import evaluation_summary
    from slimlm.report.table import comparison_table
    from slimlm.report.terminal import console

    with kept(found.data, json_path):
        console().print(comparison_table(found.models))
        print(evaluation_summary(found.data))
