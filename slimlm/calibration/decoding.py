"""Keys and values that are not copied for every token of a text that is written."""

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


def reserve(cache: Cache, length: int) -> None:
    """Have a cache that has begun go on in memory for so many tokens, where it keeps them all."""
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer:
            cache.layers[number] = Reserved(layer, length)


class Reserved(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values that are written where they belong: transformers' are copied, all of them, for every token."""

    def __init__(self, begun: DynamicLayer, length: int) -> None:
        super().__init__()
        self.length = length
        self.update(begun.keys, begun.values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Tensor, **settings: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All that there are, [batch, groups, time, size], with new ones behind."""
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.room = [one.new_empty(*one.shape[:2], self.length, one.shape[3]) for one in new]
            self.filled = 0
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        for room, one in zip(self.room, new, strict=True):
            room[:, :, start : self.filled] = one
        self.keys, self.values = (room[:, :, : self.filled] for room in self.room)
        return self.keys, self.values
