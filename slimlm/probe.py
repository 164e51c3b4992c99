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
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TypedDict

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
from slimlm.few import few, of_windows
from slimlm.model.walk import every
from slimlm.prober import Asked, Prober
from slimlm.recipe import OF_HUB, SELF, AnyStep, Recipe, SliceStep, Source, as_file, dumped, load_recipe
from slimlm.run import Plan
from slimlm.slice.config import BY_BLOCK
from slimlm.slice.plan import rotated_influence
from slimlm.stages import compress_recipe, plans_of_later


class Event(TypedDict):
    """A line of a run's log, as far as it counts here."""

    what: str
    part: str
    seconds: float


def probe(
    job: Job, steps: Sequence[AnyStep], shown: int, place: Path, how: How, prober: Prober
) -> tuple[Manifest, list[Event]]:
    """The manifest and the log of a run of a few of the first blocks, on little text.

    steps: of the whole run, the checked one first. place: an empty directory for all of it. how: as the run, but for a
    work_dir of its own. Raises RunFailure.
    """
    _show_first_blocks(job, shown, place / "model")
    recipe = Recipe(steps=_shown_steps(job, steps, shown, place / "tokens.npy")).updated(
        model=str(place / "model"), output_dir=str(place / "out"), revision=None, trust_remote_code=False
    )
    (place / "recipe.yaml").write_text(yaml.safe_dump(as_file(dumped(recipe))))
    waiting = None if how.work_dir is None else str(how.work_dir)
    prober.carry_out(Asked(str(place / "recipe.yaml"), waiting, job.recipe.trust_remote_code, how.stream_memory))
    manifest: Manifest = json.loads((place / "out" / MANIFEST_NAME).read_text())
    log = (place / "out" / LOG_NAME).read_text()
    return manifest, [json.loads(line) for line in log.splitlines()]


def _shown_steps(job: Job, whole: Sequence[AnyStep], shown: int, tokens: Path) -> list[AnyStep]:
    """All steps on a few windows and the first blocks. tokens: a file for the first one's, and of all that share
    them."""
    first, *later = whole
    steps = [_shown_step(job, first, shown, job.plan)]
    steps += [_shown_step(job, step, shown, plan) for step, plan in plans_of_later(job, later)]
    steps = [few(step, job.model) for step in steps]
    if job.windows is not None:
        numpy.save(tokens, job.windows.tokens.numpy())
        shared = [of_windows(step) == of_windows(first) for step in whole]
        steps = [_on_tokens(step, tokens) if share else step for step, share in zip(steps, shared, strict=True)]
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
    if plan is None or not plan.widths or not isinstance(step, SliceStep):
        return step
    by_hand = step.model_copy(update={"widths": plan.widths, "latency": None})
    return by_hand.model_copy(update={"widths": _widest(by_hand)})


def _widest(step: SliceStep) -> str:
    """Of widths to choose from, those that keep most of the stream, where they are several: what few blocks and windows
    say of the others decides nothing, and a head that is fitted to another stream takes long."""
    choices = (step.widths or "").split("/")
    streams = [choice.get("hidden", 0) for choice in step.width_choices]
    kept = [choice for choice, stream in zip(choices, streams, strict=True) if stream == max(streams)]
    return "/".join(kept if len(kept) > 1 else choices)


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
