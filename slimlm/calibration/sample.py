"""Text the model writes itself."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimlm.calibration.sources import SELF
from slimlm.calibration.windows import Windows, start_token
from slimlm.deal import Deal, seed_of
from slimlm.errors import UserError
from slimlm.ranks import ALONE, Ranks

SAMPLING_BATCH = 32


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: tuple[int, int],
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
    ranks: Ranks = ALONE,
) -> Windows:
    """Windows the model itself writes: ancestral samples at temperature 1, each beginning with BOS. size: how many of
    them, and tokens of each.

    Self-calibration, arXiv 2410.17170; they schedule the temperature, we keep 1, at which samples follow the model's
    own distribution. EOS does not end a window: what follows it is the beginning of another document. `model` is whole
    and in memory, as autoregressive sampling needs it; every rank samples some. Raises UserError for a tokenizer with
    neither BOS nor EOS.
    """
    (num_windows, length), bos = size, start_token(tokenizer)
    if bos is None:
        raise UserError("--dataset self needs a tokenizer with a BOS or EOS token to start from: give a text instead")
    generator = torch.Generator(device=model.device)
    windows = [torch.zeros(0, length, dtype=torch.int64)]
    for number in Deal(ranks, -(-num_windows // SAMPLING_BATCH)).mine:
        generator.manual_seed(seed_of(seed, number))
        count = min(SAMPLING_BATCH, num_windows - number * SAMPLING_BATCH)
        windows.append(_sample(model, count, length, bos, generator))
        advance(count)
    return Windows(ranks.joined(torch.cat(windows)).cpu(), SELF, bos)


def _sample(model: PreTrainedModel, count: int, length: int, bos: int, generator: torch.Generator) -> Tensor:
    """[count, length] tokens, position 0 BOS."""
    tokens = torch.full((count, 1), bos, device=model.device)
    # transformers calls it `cache` since 5.24, and code that comes with a model may be older.
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    cache = None
    columns = [tokens]
    for _ in range(length - 1):
        out = model(input_ids=columns[-1], use_cache=True, logits_to_keep=1, **{name: cache})
        cache = out[name]
        probabilities = out.logits[:, -1].float().softmax(-1)
        columns.append(torch.multinomial(probabilities, 1, generator=generator))
    return torch.cat(columns, dim=1).cpu()
