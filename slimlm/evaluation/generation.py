"""Text that models write: side by side, with what tells a model that works from one that has collapsed.

Perplexity and multiple choice give a model the text of others; it may still answer half of the questions when what it
writes by itself has come apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimlm.calibration import go_on, side_by_side, start_token
from slimlm.deal import Deal, seed_of
from slimlm.errors import UserError, one_line
from slimlm.evaluation.prompts import PROMPTS
from slimlm.linalg.likelihood import token_figures
from slimlm.plain import Json
from slimlm.ranks import Ranks

WAYS = {"greedy": 0.0, "sampled": 1.0}  # temperatures
GRAM = 4  # tokens in a row
REPEATS = 0.25  # by how much more of its runs a collapsed model repeats than the dense one
IMPROBABLE = 2.0  # nats a token, by which the dense model finds a collapsed one's text less likely than its own


@dataclass(frozen=True)
class Continuation:
    """What a model wrote. tokens: without those of the prompt, up to EOS. surprise: what the dense model makes of it,
    in nats a token; None where there is none, or nothing was written."""

    way: str
    prompt: str
    tokens: list[int]
    text: str
    surprise: float | None = None


@dataclass(frozen=True)
class Habits:
    """Means over continuations: the share of their runs that repeat, tokens, and surprise to the dense model."""

    repetition: float | None
    tokens: float | None
    surprise: float | None


@dataclass(frozen=True)
class Writing:
    """How texts are written. prompts: tokens of each. tokens: of each continuation. seed: of what is drawn."""

    prompts: list[list[int]]
    tokens: int
    seed: int
    batch_size: int


def prompts_of(tokenizer: PreTrainedTokenizerBase, chat: bool, system: str | None, context: int) -> list[list[int]]:
    """Tokens of each of PROMPTS, as a user's words where `chat`; those that fit into `context` tokens. Raises UserError
    for a template that refuses them."""
    bos = start_token(tokenizer)
    if not chat:
        start = [] if bos is None else [bos]
        found = [[*start, *tokenizer(prompt, add_special_tokens=False).input_ids] for prompt in PROMPTS]
    else:
        turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        first = [{"role": "system", "content": system}] if system else []
        texts = [_rendered(tokenizer, [*first, *turn]) for turn in turns]
        found = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [tokens[:context] for tokens in found]


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    try:
        found: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they please
        raise UserError(
            f"the chat template refuses {', '.join(one['role'] for one in turns)}: {one_line(error)}"
        ) from error
    return found


def continuations(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    writing: Writing,
    ranks: Ranks,
) -> list[Continuation]:
    """Of every prompt one of each of WAYS; whole batches of prompts are dealt out to the ranks. dense: who says how
    likely they are."""
    own = []
    numbers = list(range(0, len(writing.prompts), writing.batch_size))
    ends = _ends(model, tokenizer)
    for way, heat in WAYS.items():
        for start in Deal(ranks, len(numbers)).pick(numbers):
            given = writing.prompts[start : start + writing.batch_size]
            for prompt, tokens in zip(given, _written(model, given, heat, start, writing), strict=True):
                kept = _up_to(tokens, ends)
                surprise = None if dense is None else _surprise(dense, prompt, kept)
                texts = tokenizer.decode(prompt, skip_special_tokens=True), kept, tokenizer.decode(kept)
                own.append((start, Continuation(way, *texts, surprise)))
    ranks.note("continuations", len(own))
    found = ranks.chained(own)
    return [one for way in WAYS for _, one in sorted(found, key=lambda pair: pair[0]) if one.way == way]


def _written(
    model: PreTrainedModel, prompts: list[list[int]], heat: float, start: int, writing: Writing
) -> list[list[int]]:
    generator = torch.Generator(device=model.device).manual_seed(seed_of(writing.seed, start))
    begun = side_by_side(prompts)
    length = begun.shape[1] + writing.tokens
    found = go_on(model, begun, torch.full((len(prompts), 1), heat), length, generator)
    pairs = zip(prompts, found.tolist(), strict=True)
    return [row[len(prompt) : len(prompt) + writing.tokens] for prompt, row in pairs]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    config = getattr(model, "generation_config", None)
    known = getattr(config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}


def _up_to(tokens: list[int], ends: set[int]) -> list[int]:
    """With the end, where there is one."""
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]


@torch.no_grad()
def _surprise(dense: PreTrainedModel, prompt: list[int], tokens: list[int]) -> float | None:
    if not tokens:
        return None
    both = torch.tensor([prompt + tokens], device=dense.device)
    logits = dense(input_ids=both, use_cache=False).logits[:, len(prompt) - 1 : -1]
    return float(token_figures(logits, both[:, len(prompt) :]).double().mean())


def repetition(tokens: Sequence[int]) -> float:
    """The share of runs of GRAM tokens that were there before; 0 of shorter texts."""
    runs = [tuple(tokens[place : place + GRAM]) for place in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def diverges_at(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """The number of the first token that differs, or is missing in one; None where there is no such."""
    if list(tokens) == list(others):
        return None
    pairs = zip(tokens, others, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(others)))


def habits(written: Sequence[Continuation]) -> dict[str, Habits]:
    """By way of writing."""
    found = {}
    for way in WAYS:
        own = [one for one in written if one.way == way]
        found[way] = Habits(
            _mean([repetition(one.tokens) for one in own]),
            _mean([float(len(one.tokens)) for one in own]),
            _mean([one.surprise for one in own if one.surprise is not None]),
        )
    return found


def generation_pair(written: Sequence[Continuation], dense: Sequence[Continuation]) -> dict[str, Json]:
    """How far greedy texts are the dense model's: the share that are to the end, and the mean number of tokens before
    others go their own way; and why the model counts as collapsed, if it does."""
    pairs = [(a, b) for a, b in zip(written, dense, strict=True) if a.way == "greedy"]
    places = [diverges_at(a.tokens, b.tokens) for a, b in pairs]
    return {
        "same": places.count(None) / max(1, len(places)),
        "diverges_at": _mean([float(place) for place in places if place is not None]),
        "collapsed": list(collapse(habits(written), habits(dense))),
    }


def collapse(own: Mapping[str, Habits], dense: Mapping[str, Habits]) -> list[str]:
    """What says that a model's text has come apart; nothing of one that still writes."""
    reasons = []
    for way in WAYS:
        now, before = own[way].repetition or 0.0, dense[way].repetition or 0.0
        if now - before > REPEATS:
            reasons.append(f"{way} text repeats {now:.0%} of its runs of {GRAM} tokens, the dense model's {before:.0%}")
    drawn, usual = own["sampled"], dense["sampled"]
    if drawn.surprise is not None and usual.surprise is not None and drawn.surprise - usual.surprise > IMPROBABLE:
        figures = f"{drawn.surprise:.1f} nats a token, its own {usual.surprise:.1f}"
        reasons.append(f"the dense model finds what it writes improbable: {figures}")
    if (drawn.tokens or 0.0) < (usual.tokens or 0.0) / 4:
        reasons.append(f"it ends after {drawn.tokens or 0.0:.0f} tokens, the dense model after {usual.tokens:.0f}")
    return reasons


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
