"""The next block's weights on their way while the device computes with this one's."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor

from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.shard import StoredTensor


class Prefetch:
    """Fetches tensors of a checkpoint ahead of their use.

    For a CPU it only asks the operating system for the bytes, which costs no memory of this process. For a GPU a thread
    reads them into pinned memory and copies them on a stream of their own, beside the one that computes.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, threaded: bool | None = None) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        threaded = self.stream is not None if threaded is None else threaded
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if threaded else None
        self.coming: dict[str, Future[tuple[Tensor, torch.cuda.Event | None]]] = {}

    def ask(self, keys: Iterable[str]) -> None:
        """Start fetching the named tensors, and forget what was asked for and never taken."""
        if self.pool is None:
            self.checkpoint.prefetch(keys)
            return
        for future in self.coming.values():
            future.cancel()
        self.coming = {key: self.pool.submit(self._fetch, self.checkpoint.tensors[key]) for key in keys}

    def _fetch(self, stored: StoredTensor) -> tuple[Tensor, torch.cuda.Event | None]:
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            host = stored.read(pinned=self.stream is not None)
            tensor = host.to(self.device, non_blocking=True)
            return tensor, self.stream.record_event() if self.stream else None

    def take(self, key: str) -> StoredTensor | Tensor:
        """The tensor, of any shape, on the device if it was asked for, else where it is stored.

        Raises UserError, as reading it does.
        """
        future = self.coming.pop(key, None)
        if future is None or future.cancelled():
            return self.checkpoint.tensors[key]
        tensor, ready = future.result()
        if ready is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(ready)
            tensor.record_stream(computing)  # its memory came from the other stream's pool
        return tensor
