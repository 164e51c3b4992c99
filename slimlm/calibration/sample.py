"""Text the model writes itself."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimlm.attention import attend_fast
from slimlm.calibration.decoding import reserve
from slimlm.calibration.openings import OPENINGS
from slimlm.calibration.windows import Windows, start_token
from slimlm.deal import Deal, seed_of
from slimlm.errors import UserError
from slimlm.linalg.draws import draw
from slimlm.ranks import ALONE, Ranks
from slimlm.recipe import SELF

SAMPLING_BATCH = 128
FEWEST = 16  # windows written together: fewer would read the weights too often
MOST_CACHED = 1 << 31  # keys and values at once, but for those of the FEWEST: 4 GB of them in bf16
SPARE = 1.25  # times as many windows are written as are kept
TEMPERATURES = (1.0, 0.8, 0.9)
FROM_NOTHING = 4  # every so-manieth window begins with BOS alone
GRAM = 4  # tokens in a row
NOTHING = -1  # where the model is to write


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shape: tuple[int, int],
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
    ranks: Ranks = ALONE,
) -> Windows:
    """Windows the model itself writes, each beginning with BOS. shape: how many of them, and tokens of each.

    Self-calibration (arXiv 2410.17170), for a model to stay itself beyond anybody's text: most windows go on from the
    opening of some kind of text, a quarter from BOS alone, at three temperatures in turn. More are written than are
    kept; those that repeat themselves most are left out. EOS does not end a window: what follows it is the beginning of
    another document. `model` is whole and in memory, as autoregressive sampling needs it; every rank samples some.
    Raises UserError for a tokenizer with neither BOS nor EOS.
    """
    (num_windows, length), bos = shape, start_token(tokenizer)
    attend_fast(model)
    if bos is None:
        raise UserError("--dataset self needs a tokenizer with a BOS or EOS token to start from: give a text instead")
    count = written_for(num_windows)
    begun, temperatures = _begun(tokenizer, bos, count, model.config.vocab_size)[:, :length], torch.tensor(TEMPERATURES)
    generator = torch.Generator(device=model.device)
    windows = [torch.zeros(0, length, dtype=torch.int64)]
    size = sampling_batch(model.config, length)
    for number in Deal(ranks, -(-count // size)).mine:
        generator.manual_seed(seed_of(seed, number))
        rows = torch.arange(number * size, min((number + 1) * size, count))
        heat = temperatures[rows % len(TEMPERATURES), None]
        windows.append(go_on(model, begun[rows], heat, length, generator))
        advance(len(rows))
    written = ranks.joined(torch.cat(windows)).cpu()
    return Windows(written[least_repeated(written, num_windows)], SELF, bos)


def sampling_batch(config: PretrainedConfig, length: int) -> int:
    """Windows of so many tokens that are written together: as many as MOST_CACHED keys and values allow, or FEWEST."""
    return max(FEWEST, min(SAMPLING_BATCH, MOST_CACHED // (int(config.num_hidden_layers) * _cached(config) * length)))


def remembered(config: PretrainedConfig, windows: int, length: int) -> int:
    """Elements of the keys and values that a block keeps while so many windows of so many tokens are written."""
    return _cached(config) * min(sampling_batch(config, length), windows) * length


def _cached(config: PretrainedConfig) -> int:
    """The same of a token."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(heads * width)


def written_for(num_windows: int) -> int:
    """Windows that are written for so many to be kept."""
    return int(SPARE * num_windows)


def least_repeated(tokens: Tensor, count: int) -> Tensor:
    """Numbers, in order, of the `count` windows with the fewest runs of GRAM tokens that they had before: [count].

    tokens: [windows, time]."""
    runs = tokens.unfold(1, min(GRAM, tokens.shape[1]), 1)
    different = torch.tensor([len(window.unique(dim=0)) for window in runs])
    return different.argsort(descending=True, stable=True)[:count].sort().values


def _begun(tokenizer: PreTrainedTokenizerBase, bos: int, count: int, vocabulary: int) -> Tensor:
    """How each of `count` windows begins: [count, longest], NOTHING where the model goes on. vocabulary: of the model,
    which may be smaller than the tokenizer's."""
    known = [tokenizer(text, add_special_tokens=False).input_ids for text in OPENINGS]
    known = [tokens for tokens in known if max(tokens, default=0) < vocabulary] or [[]]
    openings = [
        known[(row - row // FROM_NOTHING - 1) % len(known)] if row % FROM_NOTHING else [] for row in range(count)
    ]
    longest = [bos, *max(known, key=len)]
    return side_by_side([*([bos, *opening] for opening in openings), longest])[:count]


def side_by_side(texts: Sequence[Sequence[int]]) -> Tensor:
    """Tokens of several texts as `go_on` takes them: [texts, longest]."""
    begun = torch.full((len(texts), max(map(len, texts))), NOTHING)
    for row, tokens in zip(begun, texts, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return begun


@torch.no_grad()
def go_on(model: PreTrainedModel, begun: Tensor, heat: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """[windows, length] tokens, of which `model` writes what is not given. begun: [windows, time], what they begin
    with, NOTHING behind that. heat: [windows, 1] temperatures; where all are 0, the likeliest token comes next."""
    is_greedy, begun, heat = not heat.any(), begun.to(model.device), heat.to(model.device)
    # transformers calls it `cache` since 5.24, and code that comes with a model may be older.
    known = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    cache = None
    columns = [begun[:, :1]]
    for place in range(1, length):
        out = model(input_ids=columns[-1], use_cache=True, **last, **{name: cache})
        if cache is None:
            reserve(out[name], length)
        cache = out[name]
        logits = out.logits[:, -1]
        column = logits.argmax(-1, keepdim=True) if is_greedy else draw(logits, heat, generator)
        if place < begun.shape[1]:
            column = torch.where(begun[:, place, None] == NOTHING, column, begun[:, place, None])
        columns.append(column)
    return torch.cat(columns, dim=1).cpu()
