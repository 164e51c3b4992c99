"""lm-eval task definitions that ship with slimlm; `lm_eval --include_path` takes this directory."""

from pathlib import Path

TASKS_PATH = Path(__file__).parent
DEFAULT_TASKS = ("python_reference_continuation",)
