"""`slimlm inspect`."""

from dataclasses import dataclass, fields

from slimlm.cli.options import FiguresFile, Verbosity, command
from slimlm.cli.running import ready_to_tell, require_there, running, tell
from slimlm.imports import importing
from slimlm.settings import InspectSettings


@dataclass(frozen=True)
class InspectOptions(InspectSettings, FiguresFile, Verbosity):
    """What is looked at, and where the figures go."""


@command(InspectOptions)
def inspect_command(options: InspectOptions) -> None:
    """Show what a model is, what was done to it or what it can become, and what its matrices look like to a pruner.

    Of what slimlm made it says what was done, what was lost and where it loads; of a dense model from which widths a
    slice may choose at each sparsity, and what they leave.

    **pq** and **prunable**: PQ Index of the weights that are not zero, and the share of all that it says can go (of a
    pruned model also the index **with zeros**). **alpha**: how heavy the spectrum's tail
    is; well-trained matrices are below 4. **rank**: stable rank. With `--dataset`, **outliers**: share of |w| ||x||
    above 5 times their mean; **25%, 50%, 75%**: predicted share of the output lost at that sparsity.

    Examples:

        slimlm inspect llama

        slimlm inspect meta-llama/Llama-3.2-1B --dataset wikitext2 --json figures.json
    """
    require_there(options.model)
    ready_to_tell(options.json_path)
    settings = {field.name: getattr(options, field.name) for field in fields(InspectSettings)}
    with running(shown=options) as progress:
        with importing():
            from slimlm.inspection import inspect_model

        found = inspect_model(**{**settings, "progress": progress})
    from slimlm.report.inspection import inspection_shown
    from slimlm.report.terminal import show

    tell(found.describe(), options.json_path, lambda: show(inspection_shown(found)))
