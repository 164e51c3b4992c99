"""slimlm makes trained language models smaller and hands back a checkpoint that stock transformers loads."""

import sys
from importlib import import_module

__version__ = "0.1.0"
TYPE_CHECKING = False  # typing takes ten times as long to import as all of this, and Ctrl-C is not heeded yet

if TYPE_CHECKING:
    from typing import Any

    from slimlm.api import compress
    from slimlm.compression import CompressResult
    from slimlm.errors import RunFailure, SlimlmError, UserError
    from slimlm.evaluation.evaluate import Evaluation, evaluate
    from slimlm.evaluation.speed.bench import bench
    from slimlm.evaluation.speed.figures import Bench
    from slimlm.inspection import Inspection, inspect_model
    from slimlm.recipe import Recipe, load_recipe, make_recipe, one_step

_HOME = {
    "compress": "slimlm.api",
    "CompressResult": "slimlm.compression",
    "evaluate": "slimlm.evaluation.evaluate",
    "Evaluation": "slimlm.evaluation.evaluate",
    "bench": "slimlm.evaluation.speed.bench",
    "Bench": "slimlm.evaluation.speed.figures",
    "inspect_model": "slimlm.inspection",
    "Inspection": "slimlm.inspection",
    "Recipe": "slimlm.recipe",
    "load_recipe": "slimlm.recipe",
    "make_recipe": "slimlm.recipe",
    "one_step": "slimlm.recipe",
    "SlimlmError": "slimlm.errors",
    "UserError": "slimlm.errors",
    "RunFailure": "slimlm.errors",
}

__all__ = [
    "Bench",
    "CompressResult",
    "Evaluation",
    "Inspection",
    "Recipe",
    "RunFailure",
    "SlimlmError",
    "UserError",
    "__version__",
    "bench",
    "compress",
    "evaluate",
    "inspect_model",
    "load_recipe",
    "make_recipe",
    "one_step",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> "Any":
    # PyTorch and transformers take seconds to import; `slimlm --help` must not wait for them.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'slimlm' has no attribute {name!r}")


if "transformers" in sys.modules:  # else it would be imported here, and `slimlm --help` would wait for it
    import_module("slimlm.modeling")
