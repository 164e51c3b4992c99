"""A real run on the first blocks of a model, in a process of its own: what `--dry-run` goes by.

`main` is all that process does: a `Prober`'s. The recipe lies in a directory of its own, and so do the hidden
states that wait: when the dry run dies, and with it standard input, the probe ends and takes its directories along.
"""

import _thread
import gc
import json
import os
import shutil
import signal
import sys
import threading
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import numpy
import yaml

from slimlm.calibration import STANDARD_INPUT
from slimlm.check import How, Job
from slimlm.checkpoint.code import code_files
from slimlm.checkpoint.companions import companions
from slimlm.checkpoint.kinds import INDEX_NAME
from slimlm.checkpoint.manifest import MANIFEST_NAME, Manifest
from slimlm.compression import LOG_NAME
from slimlm.errors import SlimlmError, UserError
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every
from slimlm.prober import Asked, Prober
from slimlm.recipe import OF_HUB, SELF, AnyStep, PruneStep, Recipe, SliceStep, Source, as_file, dumped, load_recipe
from slimlm.run import Plan
from slimlm.slice.config import BY_BLOCK
from slimlm.slice.plan import rotated_influence
from slimlm.stages import compress_recipe, plans_of_later
from slimlm.work import ONCE

FEW = 6  # windows at least: every fifth is held out
REPAIRED, SEEN = 2048, 8192  # tokens that say on a CPU how long steps take that repair what they do, and others
OF_WINDOWS = ("dataset", "text_column", *OF_HUB, "num_calibration_samples", "max_seq_length", "seed")


class Event(TypedDict):
    """A line of a run's log, as far as it counts here."""

    what: str
    part: str
    seconds: float


def probe(
    job: Job, later: list[AnyStep], shown: int, place: Path, how: How, prober: Prober
) -> tuple[Manifest, list[Event]]:
    """The manifest and the log of a run, and of steps later than its own, on the first `shown` blocks.

    place: an empty directory for all of it. how: as the run, but for a work_dir of its own. Raises RunFailure.
    """
    _show_first_blocks(job, shown, place / "model")
    recipe = Recipe(steps=_shown_steps(job, later, shown, place / "tokens.npy")).updated(
        model=str(place / "model"), output_dir=str(place / "out"), revision=None, trust_remote_code=False
    )
    (place / "recipe.yaml").write_text(yaml.safe_dump(as_file(dumped(recipe))))
    waiting = None if how.work_dir is None else str(how.work_dir)
    prober.carry_out(Asked(str(place / "recipe.yaml"), waiting, job.recipe.trust_remote_code, how.stream_memory))
    manifest: Manifest = json.loads((place / "out" / MANIFEST_NAME).read_text())
    log = (place / "out" / LOG_NAME).read_text()
    return manifest, [json.loads(line) for line in log.splitlines()]


def few(step: AnyStep, model: StreamedModel) -> AnyStep:
    """A step on so little text, and refined so little, that `work_of` tells from it what the whole takes, where all
    that takes long is in proportion to that. On a GPU a batch of windows, which says what memory is needed, too."""
    step = step.model_copy(update={"eval_windows": min(step.eval_windows, step.batch_size)})
    if not _is_in_proportion(step, model):
        return step
    assert step.max_seq_length is not None
    count, length, kept = step.num_windows, step.max_seq_length, max(FEW, step.batch_size)
    if model.device.type == "cpu":
        tokens = REPAIRED if step.repairs else SEEN
        kept = max(FEW, tokens // length)
        length = min(length, max(2, tokens // kept))
    less: dict[str, Any] = {"max_seq_length": length}
    if count > kept:
        less["dataset"] = [
            Source(source=source, windows=max(1, round(part * kept / count))) for source, part in step.parts
        ]
    if step.repairs:
        less["refine"] = min(1, vars(step)["refine"])
    return step.model_copy(update=less)


def _is_in_proportion(step: AnyStep, model: StreamedModel) -> bool:
    """Whether what takes long is in proportion to the text, but for what `work_of` knows of."""
    if step.repairs or model.device.type != "cpu":
        return step.repairs
    return not isinstance(step, PruneStep) or step.dataset is None or step.method in ONCE


def _shown_steps(job: Job, later: list[AnyStep], shown: int, tokens: Path) -> list[AnyStep]:
    """All steps on a few windows and the first blocks. tokens: a file for the first one's, and of all that share
    them."""
    whole = [(job.recipe, job.plan), *plans_of_later(job, later)]
    steps = [few(_shown_step(job, step, shown, plan), job.model) for step, plan in whole]
    if job.windows is None:
        return steps
    first, *others = ([getattr(step, name) for name in OF_WINDOWS] for step, _ in whole)
    shared = [step for step, of_windows in zip(steps, [first, *others], strict=True) if of_windows == first]
    numpy.save(tokens, job.windows.tokens[: max(step.num_windows - step.own_windows for step in shared)].numpy())
    steps = [_on_tokens(step, tokens) if step in shared else step for step in steps]
    if any(source == STANDARD_INPUT for step in steps for source, _ in step.parts):
        raise UserError("--dry-run: steps that take different windows of standard input cannot be tried: give a file")
    return steps


def _on_tokens(step: AnyStep, tokens: Path) -> AnyStep:
    """The step on as many windows from a file of tokens, and of its own."""
    counts = {str(tokens): step.num_windows - step.own_windows, SELF: step.own_windows}
    parts = [Source(source=source, windows=count) for source, count in counts.items() if count]
    return step.model_copy(update={"dataset": parts, **dict.fromkeys(OF_HUB)})


def _shown_step(job: Job, step: AnyStep, shown: int, plan: Plan | None) -> AnyStep:
    """A step on the first blocks, with what does not come out of them alone: the widths to choose from."""
    skipped = every(job.model, lambda block: [f"{block.path}.{name}" for name in block.family.skipped])
    inside = {*chain.from_iterable(skipped[:shown])}
    step = step.model_copy(update={"skip": [n for n in job.model.skipped if n in inside | {job.model.family.head}]})
    by_hand = plan.widths if plan is not None and isinstance(step, SliceStep) else None
    return step.model_copy(update={"widths": by_hand, "latency": None}) if by_hand else step


def _show_first_blocks(job: Job, shown: int, directory: Path) -> None:
    """A model directory of links to the real one, whose config and index speak of the first blocks alone."""
    directory.mkdir()
    source, model = job.source.path, job.model
    for file in (*companions(source), *code_files(source)):
        (directory / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    config.pop("transformers_weights", None)  # the index below says it
    config[model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = shown
    for name in BY_BLOCK:
        if isinstance(config.get(name), list):
            config[name] = config[name][:shown]
    (directory / "config.json").write_text(json.dumps(config))
    influence = rotated_influence(source)
    if influence is not None:  # slicing it goes another way
        (directory / MANIFEST_NAME).write_text(json.dumps({"method": {"influence": influence[:shown]}}))
    tensors = model.checkpoint.tensors
    weight_map = {key: tensors[key].path.relative_to(source).as_posix() for key in shown_keys(job, shown)}
    for name in set(weight_map.values()):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).symlink_to((source / name).resolve())
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shown_keys(job: Job, shown: int) -> list[str]:
    """The tensors, by name, of the first blocks and of all that is in none."""
    parts = [*job.model.outside, *map(job.model.family.block, range(shown))]
    return [key for part in parts for key in job.model.keys_of.get(part, [])]


ended = threading.Event()  # whether the dry run is over before the probe is


def end_with_parent() -> None:
    """Wait for the end of standard input, then have the main thread stop and take the probe's directories along."""
    while os.read(0, 1):
        pass
    ended.set()
    _thread.interrupt_main(signal.SIGTERM)  # SIGINT may be ignored, as in a shell's background jobs


def run_probe(asked: Asked) -> None:
    """Carry out a recipe on a part of the model that is meant. Raises UserError and RunFailure."""
    chosen = load_recipe(asked.recipe, {"trust_remote_code": True} if asked.trusted else None)
    work_dir = None if asked.work_dir is None else Path(asked.work_dir)
    compress_recipe(chosen, How(of_checked=True, work_dir=work_dir, stream_memory=asked.stream_memory))


def main() -> None:
    """Wait for what is asked, and do it; nothing where nobody asks any more."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    places: list[str] = json.loads(sys.stdin.readline() or "[]")
    asked = sys.stdin.readline()
    try:
        if asked:
            threading.Thread(target=end_with_parent, daemon=True).start()
            run_probe(Asked(*json.loads(asked)))
    except SlimlmError as error:
        sys.exit(str(error))
    finally:
        for place in places if ended.is_set() or not asked else ():
            shutil.rmtree(place, ignore_errors=True)
        gc.freeze()  # as `slimlm` does
