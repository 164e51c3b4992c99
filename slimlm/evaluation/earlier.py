"""What an earlier run measured of the dense model, read from its samples in place of the model; refused where models of
now would be measured otherwise."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slimlm.checkpoint.manifest import versions
from slimlm.device import device_name
from slimlm.errors import UserError
from slimlm.evaluation.account import Samples
from slimlm.evaluation.harness import QUESTIONS
from slimlm.evaluation.measuring import Plan
from slimlm.evaluation.prompts import PROMPTS
from slimlm.evaluation.quiet import quiet
from slimlm.evaluation.samples import MODELS, are_samples, read_samples
from slimlm.evaluation.subjects import Subject
from slimlm.evaluation.text import TestWindows
from slimlm.plain import Json
from slimlm.settings import EvalSettings

if TYPE_CHECKING:
    from lm_eval.api.task import Task

AS_GIVEN = ("apply_chat_template", "system_instruction", "generate")
OF_TASKS = ("limit", "num_fewshot", "gen_kwargs")  # which nothing else reads
WRITTEN = "prompts"  # not there where nothing was written
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of a function whose source is not to be had
Conditions = Mapping[str, Json]


def read_earlier(settings: EvalSettings) -> tuple[Samples, Conditions] | None:
    """What an earlier run measured of the dense model, or of the one that `models/N` of its directory is, and under
    what conditions; None where `against` is a model. Raises UserError for samples that are not whole, or of several
    models none of which is dense."""
    place = Path(settings.against or "").expanduser()
    number = None
    if place.parent.name == MODELS and place.name.isdecimal() and are_samples(place.parent.parent):
        place, number = place.parent.parent, int(place.name)
    if settings.against is None or not are_samples(place):
        return None
    if settings.against_revision is not None:
        raise UserError(f"{place} holds samples, which have no revisions: leave out --against-revision")
    kept = read_samples(place)
    if number is None and len(kept.models) > 1 and not kept.data["pairs"]:
        raise UserError(f"{place} holds samples of {len(kept.models)} models: name one, as in {place / MODELS / '0'}")
    if number is not None and number >= len(kept.models):
        raise UserError(f"{place} holds samples of {len(kept.models)} models, and none of number {number}")
    found = kept.models[-1 if number is None else number]
    found.figures = {name: figures[:, :1] for name, figures in found.figures.items()}
    return found, kept.data["conditions"]


def with_window(settings: EvalSettings, there: Conditions) -> EvalSettings:
    """With the length of the earlier run's windows, where none is given and all its texts have the same."""
    lengths = there.get("--window")
    if settings.window is not None or not isinstance(lengths, list) or len(set(lengths)) != 1:
        return settings
    return replace(settings, window=lengths[0])


def require_same(there: Conditions, here: Conditions, place: str) -> None:
    """Raises UserError that names every condition that is not the same, with both values. Those that one of them lacks
    follow from others, if any others differ: of a text that is not measured there is nothing to be the same."""
    changed = [name for name in there if name in here and there[name] != here[name]]
    changed = changed or sorted(({*there} ^ {*here}) - {WRITTEN})
    if changed:
        both = "; ".join(f"{name} was {_said(there, name)}, is now {_said(here, name)}" for name in changed)
        raise UserError(
            f"{place} was measured otherwise, and until it is measured again, or this as it was, cannot be compared "
            f"with: {both}"
        )


def _said(conditions: Conditions, name: str) -> str:
    return json.dumps(conditions[name], ensure_ascii=False) if name in conditions else "not there"


def conditions_of(plan: Plan, subject: Subject) -> dict[str, Json]:
    """Everything that decides what is measured of a model, beside the model: by name, as JSON holds it. Texts,
    questions, prompts and tokenizer by what they hold."""
    settings, tokenizer = plan.settings, subject.tokenizer
    asks = plan.manager is not None
    return {
        **_of_texts(plan.texts, settings),
        **(_of_tasks(plan) if asks else {"--tasks": []}),
        **{_flag(name): getattr(settings, name) for name in AS_GIVEN},
        "--seed": settings.seed or 0,
        "--batch-size": plan.batch_size,
        "--dtype": str(subject.dtype).removeprefix("torch."),
        "tokenizer": _digest([tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer(list(PROMPTS)).input_ids]),
        "chat template": _digest([tokenizer.chat_template]) if settings.apply_chat_template else None,
        **({} if plan.writing is None else {WRITTEN: _digest([plan.writing.prompts])}),
        "device": device_name(torch.device(settings.device)),
        **{f"version of {package}": version for package, version in versions().items()},
    }


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _of_texts(texts: Sequence[TestWindows], settings: EvalSettings) -> dict[str, Json]:
    ways = list(dict.fromkeys(settings.corrupt or ()))
    return {
        "--text": [text.name for text in texts[:: 1 + len(ways)]],
        "--corrupt": list[Json](ways),
        "--window": [text.tokens.shape[1] for text in texts[:: 1 + len(ways)]],
        "--num-windows": [len(text.tokens) for text in texts[:: 1 + len(ways)]],
        **{
            f"text {text.name}": _digest(
                [text.bos, *(one.tolist() for one in (text.tokens, text.documents, text.lengths))]
            )
            for text in texts
        },
    }


def _of_tasks(plan: Plan) -> dict[str, Json]:
    """By what tasks are called, wherever their files lie."""
    assert plan.manager is not None
    with quiet():
        found = plan.manager.load(list(plan.settings.tasks or ()))
        tasks: Mapping[str, Task] = found["tasks"]
        return {
            "--tasks": sorted({*tasks, *found["groups"]}),
            **{_flag(name): getattr(plan.settings, name) for name in OF_TASKS},
            "--seed of tasks": plan.settings.seed,  # lm-eval has others of its own where none is given
            "--batch-size of tasks": plan.settings.batch_size or QUESTIONS,
            **{f"version of {name}": str(task.VERSION) for name, task in tasks.items()},
            **{f"questions of {name}": _questions(task, plan.settings.num_fewshot) for name, task in tasks.items()},
        }


def _questions(task: "Task", num_fewshot: int | None) -> str:
    """Of its documents, and how they are asked."""
    config = {**task.dump_config(), "metadata": None}  # which says where its file lies
    has_examples = num_fewshot or (num_fewshot is None and config.get("num_fewshot"))
    return _digest([config, *task.eval_docs, *(task.fewshot_docs() if has_examples else ())])


def _digest(parts: Iterable[Json]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        text = json.dumps(part, sort_keys=True, default=lambda one: sorted(one) if isinstance(one, set) else str(one))
        digest.update(f"{ADDRESS.sub('', text)}\n".encode())
    return digest.hexdigest()[:16]
