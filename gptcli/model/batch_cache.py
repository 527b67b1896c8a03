"""Key-value cache for a batch of texts of different lengths that grow at their own pace.

Legend of shapes: R rows in use, T new tokens a row, K key-value heads, D head size, S slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptcli.model.band import Reach
from gptcli.model.cache import KVCache


class BatchCache:
    """Keys and values of every layer, each (rows, K, slots, D); row r holds a text of its own.

    Token t of a row lies in slot t modulo slots. A layer that attends to a window has just enough
    slots that up to `most_new` tokens may come at once and be taken back again; the other layers
    have `capacity`. Rows are used from 0 on without gaps: `begin` says how many and how long.
    """

    def __init__(
        self,
        windows: Sequence[int],
        capacity: int,
        rows: int,
        n_kv_head: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        most_new: int = 1,
    ) -> None:
        """`windows` has the tokens that each layer reaches back, 0 for all; see `ModelConfig`."""
        sizes = [min(window + most_new - 1 if window else capacity, capacity) for window in windows]
        shapes = [(rows, n_kv_head, size, head_dim) for size in sizes]
        # Zeros: what a mask hides is multiplied by 0, which would not do for nan.
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.positions = torch.empty((0, 0), dtype=torch.int64, device=device)  # (R, T)
        self.longest = 0  # tokens of the longest row, the new ones included
        self._alike = True  # whether all rows in use have one length

    @classmethod
    def over(cls, k: Sequence[Tensor], v: Sequence[Tensor]) -> "BatchCache":
        """A cache that uses the keys and values of another one."""
        cache = cls.__new__(cls)
        cache.k, cache.v = list(k), list(v)
        return cache

    @property
    def row_bytes(self) -> int:
        """Bytes that the keys and values of one row take."""
        return sum(x.shape[1:].numel() * x.element_size() for x in [*self.k, *self.v])

    def begin(self, lengths: Sequence[int], count: int) -> None:
        """Announce `count` new tokens for each of the first len(lengths) rows, which hold so many
        valid ones; what a row held beyond is forgotten."""
        device = self.positions.device
        self.longest = max(lengths) + count
        self._alike = min(lengths) == max(lengths)
        starts = torch.tensor(lengths, device=device)
        self.positions = starts[:, None] + torch.arange(count, device=device)

    def begin_at(self, positions: Tensor, room: int) -> None:
        """`begin` for new tokens at `positions` (R, T), all below `room`, in work that is the same
        wherever they are: it can be recorded and repeated with other numbers in `positions`."""
        self.positions, self.longest, self._alike = positions, room, False

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the announced k, v (R, K, T, D); return all keys and values (R, K, S, D)."""
        return self._append(self.k[layer], k), self._append(self.v[layer], v)

    def reach(self, layer: int, window: int) -> Reach:
        """What the announced tokens see of the keys that `append` returns for `layer`."""
        size, count = self.k[layer].size(2), self.positions.size(1)
        fits = not window or self.longest <= window or (size == window and count == 1)
        if self._alike and count == 1 and fits:
            return Reach()
        slots = torch.arange(min(self.longest, size), device=self.positions.device)
        last = self.positions[:, -1:]  # (R, 1)
        held = last - (last - slots) % size  # (R, S): the newest token that belongs into each slot
        held, query = held[:, None], self.positions[:, :, None]
        mask = (held >= 0) & (held <= query)  # (R, T, S)
        if window:
            mask &= held > query - window
        return Reach(mask[:, None])

    def insert(self, row: int, source: KVCache, source_row: int, length: int) -> None:
        """Copy the first `length` tokens of a row of `source`, as far as both still hold them."""
        for kept, given in zip([*self.k, *self.v], [*source.k, *source.v], strict=True):
            if length <= min(kept.size(2), given.size(2)):
                kept[row, :, :length] = given[source_row, :, :length]
                continue
            held = min(source.length, given.size(2), kept.size(2))
            tokens = torch.arange(length - held, length, device=kept.device)
            kept[row, :, tokens % kept.size(2)] = given[source_row, :, tokens % given.size(2)]

    def move(self, row: int, to: int) -> None:
        """Let row `to` hold what `row` holds."""
        for kept in [*self.k, *self.v]:
            kept[to] = kept[row]

    def _append(self, kept: Tensor, new: Tensor) -> Tensor:
        size, count = kept.size(2), new.size(2)
        kept = kept[: new.size(0)]
        start = (self.longest - count) % size
        if self._alike and start + count <= size:
            kept[:, :, start : start + count] = new
        else:
            rows = torch.arange(new.size(0), device=kept.device)[:, None]
            kept[rows, :, self.positions % size] = new.transpose(1, 2).to(kept.dtype)
        return kept[:, :, : min(self.longest, size)]
