"""A step with every default that depends on its model filled in: Step -> Step, once, before anything uses it."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy
from transformers import PretrainedConfig

from slimlm.checkpoint.manifest import read_manifest
from slimlm.checkpoint.resolve import BUNDLED_CONTEXT, ResolvedModel
from slimlm.errors import UserError
from slimlm.evaluation.text import DEFAULT_WINDOW
from slimlm.linalg.regression import HELD_EVERY
from slimlm.methods import method_of
from slimlm.recipe import SELF, AnyStep, RecoverStep, Source

WINDOWS = 128  # of given text, at least, where a step does not say how many
NO_DATA = (
    "no calibration data: pass --dataset with a text file, a hub dataset, wikitext2, c4, alpaca or "
    "fineweb-edu, or --dataset self to let the model write its own (needs the whole model in memory)"
)


def resolve(step: AnyStep, source: ResolvedModel, wanted: int, *configs: PretrainedConfig) -> AnyStep:
    """The step with its data, the length of its windows and its output. Raises UserError where there are none.

    No data where the method does not look at any. wanted: tokens to learn from, at least. configs: of all models that
    are to read the windows.
    """
    dataset = step.dataset or (SELF if source.origin == "bundled" else None)
    if not method_of(step).calibrates(step, source.path):
        dataset = None
    elif dataset is None:
        raise UserError(NO_DATA)
    context: int = min(getattr(one, "max_position_embeddings", DEFAULT_WINDOW) for one in configs)
    default = BUNDLED_CONTEXT if source.origin == "bundled" else min(DEFAULT_WINDOW, context)
    length = step.max_seq_length or _as_windows(dataset) or _as_calibrated(step, source) or default
    if length > context:
        raise UserError(f"--max-seq-length {length} is beyond the model's context of {context} tokens")
    step = step.model_copy(update={"dataset": dataset, "max_seq_length": length, "output_dir": str(output_of([step]))})
    return with_data(step, wanted)


def with_data(step: AnyStep, wanted: int) -> AnyStep:
    """A step, whose windows' length is known, with as many of them as it takes, and those its model is to write.

    wanted: tokens to learn from, at least.
    """
    step = step.beside()
    if step.num_calibration_samples is None:
        assert step.max_seq_length is not None
        is_beside = isinstance(step.dataset, str) and step.dataset != SELF
        needed = wanted * HELD_EVERY / (HELD_EVERY - 1) / step.max_seq_length
        given = math.ceil(needed * (1 - (step.self_share or 0) if is_beside else 1))
        step = step.model_copy(update={"num_calibration_samples": max(WINDOWS, given)})
    return with_own_text(step)


def _as_windows(dataset: str | list[Source] | None) -> int | None:
    """Tokens of windows that are made already: the second size of an array in a .npy file."""
    path = Path(dataset).expanduser() if isinstance(dataset, str) else Path()
    if path.suffix != ".npy" or not path.is_file():
        return None
    try:
        shape = numpy.load(path, mmap_mode="r").shape
    except (OSError, EOFError, ValueError):  # reading it says what is wrong
        return None
    return int(shape[1]) if len(shape) == 2 else None


def _as_calibrated(step: AnyStep, source: ResolvedModel) -> int | None:
    """Tokens of the windows that a model to be recovered was compressed with."""
    manifest = read_manifest(source.path) if isinstance(step, RecoverStep) else None
    calibration = manifest and manifest["calibration"]
    return calibration["window"] if calibration else None


def with_own_text(step: AnyStep) -> AnyStep:
    """The step with what its model is to write among its data."""
    share, given = step.self_share, step.dataset
    if not share or not isinstance(given, str) or given == SELF:
        return step
    count = step.num_calibration_samples
    own = Source(source=SELF, windows=own_beside(count, share))
    return step.model_copy(update={"dataset": [Source(source=given, windows=count), own]})


def own_beside(given: int, share: float) -> int:
    """How many windows the model writes beside the given, to have that share of all."""
    return max(1, round(given * share / (1 - share)))


def output_of(steps: Sequence[AnyStep]) -> Path:
    """Where the result goes; by default `llama-slice-25` (25% sliced off the model llama) in the working directory.

    Of several steps of one method, which are its shots, the last gives the name.
    """
    model = Path(steps[0].model).expanduser()
    parts = [model.resolve().name if model.is_dir() else model.name]
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if following is None or following.method != step.method:
            parts += [step.method, *([step.extent] if step.extent else [])]
    return Path(steps[0].output_dir or "-".join(parts)).expanduser().resolve()
