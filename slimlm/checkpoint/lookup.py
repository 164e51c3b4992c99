"""An embedding that stays on disk: only the rows a batch asks for are read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimlm.checkpoint.shard import StoredTensor


@contextmanager
def looked_up(module: nn.Embedding, stored: StoredTensor, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `module` (its weight on meta) embeds tokens [...] with rows read from `stored`: [vocab, hidden].

    The module's own forward runs on the rows, so scaling and whatever else a family does there are its own.
    """
    weight, padding = module.weight, module.padding_idx

    def look_up(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wanted, places = args[0].unique(return_inverse=True)
        rows = stored.read_rows(wanted.tolist()).to(device, dtype)
        module.weight = nn.Parameter(rows, requires_grad=False)
        return (places, *args[1:])

    module.padding_idx = None  # type: ignore[assignment]  # only gradients ask for it, and it may be beyond the rows
    handle = module.register_forward_pre_hook(look_up)
    try:
        yield
    finally:
        handle.remove()
        module.weight, module.padding_idx = weight, padding
