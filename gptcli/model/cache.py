"""Preallocated key-value cache for decoding."""

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, each (B, K, slots, D), of a text of `length` tokens.

    A layer that attends to a window keeps no more than the window: token t lies in slot
    t modulo slots, where it takes the place of the one that is out of reach. `capacity` is the
    number of tokens that fit, None when every layer has room for its whole window: then any number
    does. With `keeps_tokens`, `tokens` (B, capacity) int64 is there for a model to read again.
    """

    def __init__(
        self,
        windows: Sequence[int],
        capacity: int,
        batch: int,
        n_kv_head: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        keeps_tokens: bool = False,
    ) -> None:
        """`windows` has the tokens that each layer reaches back, 0 for all; see `ModelConfig`."""
        slots = [min(window or capacity, capacity) for window in windows]
        rings = all(window and size == window for window, size in zip(windows, slots, strict=True))
        self.capacity = None if rings else capacity
        shapes = [(batch, n_kv_head, size, head_dim) for size in slots]
        self.k = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.tokens: Tensor | None = None
        if keeps_tokens:
            self.tokens = torch.empty((batch, capacity), device=device, dtype=torch.int64)
        self.length = 0

    @property
    def row_bytes(self) -> int:
        """Bytes that the keys and values of one batch row take."""
        kept = [*self.k, *self.v] + ([] if self.tokens is None else [self.tokens])
        return sum(x.shape[1:].numel() * x.element_size() for x in kept)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) after `length`; return the keys and values that they go with.

        These are the T new ones after those of the past that any of them reaches, in the order of
        the text; for T = 1 in any order. The model moves `length` on once all layers have stored
        their part.
        """
        return self._append(self.k[layer], k), self._append(self.v[layer], v)

    def take(self, source: "KVCache") -> None:
        """Begin every row with the text of `source`, of one row, which fills no layer's slots."""
        pairs = zip([*self.k, *self.v], [*source.k, *source.v], strict=True)
        for kept, given in pairs:
            kept[:, :, : source.length] = given[:, :, : source.length]
        if self.tokens is not None and source.tokens is not None:
            self.tokens[:, : source.length] = source.tokens[:, : source.length]
        self.length = source.length

    def _append(self, kept: Tensor, new: Tensor) -> Tensor:
        slots, count = kept.size(2), new.size(2)
        stop = self.length + count
        if stop <= slots:
            kept[:, :, self.length : stop] = new
            return kept[:, :, :stop]
        if count == 1:
            kept[:, :, self.length % slots] = new[:, :, 0]
            return kept
        new = new.to(kept.dtype)
        index = torch.arange(self.length - min(self.length, slots - 1), stop, device=kept.device)
        past = kept.index_select(2, index[:-count] % slots)  # a copy: its slots are written next
        kept[:, :, index[-slots:][-count:] % slots] = new[:, :, -slots:]
        return torch.cat([past, new], dim=2) if past.size(2) else new
