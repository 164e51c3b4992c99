"""What Python's calls return, as their commands show it."""

from collections.abc import Sequence

from rich.console import RenderableType

from slimlm.compression import CompressResult
from slimlm.evaluation.evaluate import Evaluation
from slimlm.evaluation.speed.figures import Bench
from slimlm.inspection import Inspection
from slimlm.report.evaluation import evaluation_shown
from slimlm.report.inspection import inspection_shown
from slimlm.report.speed import speed_shown
from slimlm.report.summary import compress_shown
from slimlm.report.terminal import as_text, lines_of


def text_of(found: CompressResult | Evaluation | Bench | Inspection) -> str:
    """As wide as the terminal, without colours."""
    return as_text(_parts(found))


def _parts(found: CompressResult | Evaluation | Bench | Inspection) -> Sequence[RenderableType]:
    if isinstance(found, Evaluation):
        return evaluation_shown(found.data)
    if isinstance(found, Bench):
        return speed_shown(found)
    if isinstance(found, Inspection):
        return inspection_shown(found)
    return [*compress_shown(found.manifest), *lines_of(f"written to {found.output_dir}")]
