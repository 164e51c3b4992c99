"""What is measured, on what: models, and texts that all of them tokenise alike. Found before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimlm.calibration import require_known
from slimlm.checkpoint.manifest import read_manifest
from slimlm.checkpoint.resolve import BUNDLED_CONTEXT, ResolvedModel
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.errors import UserError
from slimlm.evaluation.found import Found, find_model, shortest_context
from slimlm.evaluation.generation import Writing, prompts_of
from slimlm.evaluation.sources import PAPERS_WINDOW, Text, default_texts, load_text
from slimlm.evaluation.text import DEFAULT_WINDOW, TestWindows, load_test_windows
from slimlm.settings import EvalSettings

DEFAULT_WINDOWS = 128


@dataclass(frozen=True)
class Subject(Found):
    """A model that is to be measured, with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase


def find_subjects(settings: EvalSettings) -> tuple[list[Subject], Subject | None]:
    """The models, and the dense one. Raises UserError for what is no whole checkpoint, and for models that would not
    be treated alike."""
    names = [settings.model] if isinstance(settings.model, str) else list(settings.model)
    if not names:
        raise UserError("no model is given")
    models = [_subject(name, settings.revision, settings) for name in names]
    dense = None if settings.against is None else _subject(settings.against, settings.against_revision, settings)
    everyone = [*models, *([] if dense is None else [dense])]
    if settings.apply_chat_template and not everyone[0].tokenizer.chat_template:
        raise UserError(f"{everyone[0].resolved.name} has no chat template: leave out --apply-chat-template")
    paths = [one.path.resolve() for one in models]
    if twice := [one.resolved.name for one in models if paths.count(one.path.resolve()) > 1]:
        raise UserError(f"{twice[0]} is given more than once")
    for other in everyone[1:]:
        _require_alike(everyone[0], other, settings)
    return models, dense


def _subject(name: str, revision: str | None, settings: EvalSettings) -> Subject:
    found = find_model(name, revision, settings)
    return Subject(**vars(found), tokenizer=load_tokenizer(found.path, settings.trust_remote_code))


def _require_alike(one: Subject, other: Subject, settings: EvalSettings) -> None:
    names = f"{one.resolved.name} and {other.resolved.name}"
    if one.dtype != other.dtype:
        first, second = (str(dtype).removeprefix("torch.") for dtype in (one.dtype, other.dtype))
        raise UserError(f"{names} compute in {first} and {second}: add --dtype float32, or another that both take")
    if settings.apply_chat_template and one.tokenizer.chat_template != other.tokenizer.chat_template:
        raise UserError(f"{names} have different chat templates: their scores cannot be compared")


def find_texts(models: Sequence[Subject], settings: EvalSettings) -> list[TestWindows]:
    """The same windows for all models: each text, and each of its corruptions.

    Raises UserError for a text that cannot be had, windows beyond what the models take, and tokenizers that disagree.
    """
    given = default_texts() if settings.text is None else settings.text
    texts = [
        load_text(name, models[0].tokenizer) for name in dict.fromkeys([given] if isinstance(given, str) else given)
    ]
    ways = dict.fromkeys((None, *(settings.corrupt or ())))
    return [_shared_windows(models, settings, text, how) for text in texts for how in ways]


def _shared_windows(models: Sequence[Subject], settings: EvalSettings, text: Text, corrupt: str | None) -> TestWindows:
    length = _window_length(models, settings, text.as_papers)
    count = settings.num_windows
    if count is None and not text.as_papers:
        count = DEFAULT_WINDOWS
    found = [
        load_test_windows(text, one.tokenizer, count or None, length, corrupt, settings.seed or 0) for one in models
    ]
    for model, windows in zip(models, found, strict=True):
        if not torch.equal(windows.tokens, found[0].tokens):
            raise UserError(
                f"{models[0].resolved.name} and {model.resolved.name} tokenise the test text differently: "
                "their perplexities cannot be compared"
            )
        require_known(windows.tokens, model.vocabulary, f"{text.name}, for {model.resolved.name},")
    return found[0]


def _window_length(models: Sequence[Subject], settings: EvalSettings, as_papers: bool) -> int:
    """Raises UserError for windows beyond what the models take."""
    context = shortest_context(models)
    if settings.window and context is not None and settings.window > context:
        raise UserError(f"--window {settings.window} is beyond the models' context of {context} tokens")
    if settings.window:
        return settings.window
    length = PAPERS_WINDOW if as_papers else default_window(models[0].resolved, models[0].config)
    return length if context is None else min(length, context)


def find_writing(models: Sequence[Subject], settings: EvalSettings) -> Writing | None:
    """What every model is to write; None where none is to. Raises UserError where there is no room for it, chats that
    the template refuses, and tokenizers that disagree."""
    if not settings.generate or settings.stream:
        return None
    context = shortest_context(models)
    room = (context or 2**20) - settings.generate
    if room < 1:
        raise UserError(f"--generate {settings.generate} is beyond the models' context of {context} tokens")
    how = settings.apply_chat_template, settings.system_instruction, room
    prompts, *others = [prompts_of(one.tokenizer, *how) for one in models]
    for model, other in zip(models[1:], others, strict=True):
        if other != prompts:
            raise UserError(
                f"{models[0].resolved.name} and {model.resolved.name} tokenise prompts differently: "
                "what they write cannot be compared; --generate 0 leaves it out"
            )
    size = settings.batch_size if isinstance(settings.batch_size, int) else len(prompts)
    return Writing(prompts, settings.generate, settings.seed or 0, size)


def default_window(resolved: ResolvedModel, config: PretrainedConfig) -> int:
    """Tokens per window when none are asked for."""
    manifest = read_manifest(resolved.path)
    recipe: dict[str, Any] = (manifest.get("recipe") if manifest else None) or {}
    length = {**recipe, **(recipe.get("steps") or [{}])[-1]}.get("max_seq_length")
    if isinstance(length, int):
        return length
    if resolved.origin == "bundled":
        return BUNDLED_CONTEXT
    return min(DEFAULT_WINDOW, getattr(config, "max_position_embeddings", DEFAULT_WINDOW))
