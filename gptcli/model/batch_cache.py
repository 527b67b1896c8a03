"""Key-value cache for a batch of texts of different lengths that grow at their own pace.

Legend of shapes: R rows in use, T new tokens a row, K key-value heads, D head size, S slots.
"""

from collections.abc import Sequence
from typing import Any

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
        self._start: int | Tensor | None = 0  # place of the first new token, None if rows differ
        self._shared: int | Tensor = 0
        self._places: dict[int, tuple[Tensor, Tensor]] = {}  # slots -> where new tokens go

    @classmethod
    def over(cls, k: Sequence[Tensor], v: Sequence[Tensor]) -> "BatchCache":
        """A cache that uses the keys and values of another one."""
        cache = cls.__new__(cls)
        cache.k, cache.v, cache._places, cache._shared = list(k), list(v), {}, 0
        return cache

    @property
    def row_bytes(self) -> int:
        """Bytes that the keys and values of one row take."""
        return sum(x.shape[1:].numel() * x.element_size() for x in [*self.k, *self.v])

    def begin(self, lengths: Sequence[int], count: int, shared: int = 0) -> None:
        """Announce `count` new tokens for each of the first len(lengths) rows, which hold so many
        valid ones; what a row held beyond is forgotten. The rows' first `shared` tokens are the
        same, so that their keys need to be read once; only on a CPU, in fp32."""
        device = self.positions.device
        self.longest, self._places, self._shared = max(lengths) + count, {}, shared
        self._start = lengths[0] if min(lengths) == max(lengths) else None
        starts = torch.tensor(lengths, device=device)
        self.positions = starts[:, None] + torch.arange(count, device=device)

    def begin_at(self, positions: Tensor, room: int) -> None:
        """`begin` for new tokens at `positions` (R, T), all below `room`, in work that is the same
        wherever they are: it can be recorded and repeated with other numbers in `positions`."""
        self.positions, self.longest, self._start, self._places = positions, room, None, {}
        self._shared = 0

    def begin_alike(self, positions: Tensor, shared: Tensor | None) -> None:
        """`begin` for one new token a row at `positions` (R, 1), which are all the same, in a
        program that can be recorded and repeated with other numbers there, and in `shared`, where
        it is not None. Only for caches in which every layer has room for the whole text; it attends
        to no more keys than there are."""
        self._shared = 0 if shared is None else shared
        self.positions, self.longest, self._start = positions, 0, positions[0, 0]
        # Any: `narrow` takes a number that is a tensor only where a program is recorded.
        self._end: Any = self._start + 1

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the announced k, v (R, K, T, D); return all keys and values (R, K, S, D)."""
        return self._append(self.k[layer], k), self._append(self.v[layer], v)

    def reach(self, layer: int, window: int) -> Reach:
        """What the announced tokens see of the keys that `append` returns for `layer`."""
        size, count = self.k[layer].size(2), self.positions.size(1)
        fits = not window or self.longest <= window or (size == window and count == 1)
        if self._start is not None and count == 1 and fits:
            return Reach(shared=0 if window else self._shared)
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

    def move(self, row: int, to: int, length: int) -> None:
        """Let row `to` hold what `row` holds, a text of up to `length` tokens."""
        for kept in [*self.k, *self.v]:
            kept[to, :, :length] = kept[row, :, :length]  # in a window's slots: all of them

    def clear(self, row: int) -> None:
        """Zeros for what `row` held, which may not be finite."""
        for kept in [*self.k, *self.v]:
            kept[row] = 0.0

    def _append(self, kept: Tensor, new: Tensor) -> Tensor:
        size, count = kept.size(2), new.size(2)
        kept = kept[: new.size(0)]
        if isinstance(self._start, Tensor):
            kept.narrow(2, self._start, count).copy_(new)
            return kept.narrow(2, 0, self._end)
        if self._start is not None and self._start % size + count <= size:
            kept.narrow(2, self._start % size, count).copy_(new)
        else:
            if size not in self._places:
                rows = torch.arange(new.size(0), device=kept.device)[:, None]
                self._places[size] = rows, self.positions % size
            rows, slots = self._places[size]
            kept[rows, :, slots] = new.transpose(1, 2).to(kept.dtype)
        return kept.narrow(2, 0, min(self.longest, size))
