"""Preallocated key-value cache for decoding."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, each (B, K, capacity, D); `length` tokens are valid."""

    def __init__(
        self,
        n_layer: int,
        batch: int,
        n_kv_head: int,
        capacity: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (n_layer, batch, n_kv_head, capacity, head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def row_bytes(self) -> int:
        """Bytes that the keys and values of one batch row take."""
        layers, _, heads, capacity, width = self.k.shape
        return 2 * layers * heads * capacity * width * self.k.element_size()

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) after `length` and return views of everything up to them.

        The model moves `length` on once all layers have stored their part.
        """
        stop = self.length + k.size(2)
        self.k[layer, :, :, self.length : stop] = k
        self.v[layer, :, :, self.length : stop] = v
        return self.k[layer, :, :, :stop], self.v[layer, :, :, :stop]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep (or repeat) the batch rows whose indices are given, in that order."""
        self.k, self.v = self.k.index_select(1, rows), self.v.index_select(1, rows)
