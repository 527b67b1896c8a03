"""An endless, shuffled, exactly resumable stream of records.

`datasets` is used as a cursor only: its IterableDataset walks the shards and its state says where
it is. Order is ours: each epoch permutes the shards, and records are shuffled inside a window.
The state holds the cursor at the start of the window; a resume reads the same window again, draws
the same permutation and goes on at the same place, so nothing is lost and nothing is repeated.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import IterableDataset

from gptcli import stop
from gptcli.data.readers import Shard, read_shards

WINDOW_BYTES = 64 * 1024 * 1024


def permutation(n: int, *key: int) -> list[int]:
    """A permutation of range(n) that depends on the key only (Philox counter generator)."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    order: list[int] = generator.permutation(n).tolist()
    return order


class RecordStream:
    """Records of `shards`, epoch after epoch, each epoch in a new order.

    `window` records (at most 64 MiB) are shuffled together; 0 leaves records as they come.
    `epoch` and `epoch_bytes` tell how far the records handed out so far reach.
    """

    def __init__(
        self, shards: list[Shard], seed: int, window: int, state: dict[str, Any] | None = None
    ) -> None:
        self._shards, self._seed, self._window = shards, seed, window
        self.epoch, self.epoch_bytes = 0, 0
        self._number = 0  # of the next window in this epoch
        self._records: list[dict[str, Any]] = []  # of the current window, shuffled
        self._position = 0  # records of it handed out
        self._window_start: dict[str, Any] = {}
        self._open_epoch(None)
        if state is not None:
            self._restore(state)

    def next(self) -> dict[str, Any] | None:
        """The next record, or None once at the end of each epoch."""
        if self._position == len(self._records):
            self._read_window()
            if not self._records:
                self.epoch, self.epoch_bytes, self._number = self.epoch + 1, 0, 0
                self._open_epoch(None)
                return None
        record = self._records[self._position]
        self._position += 1
        self.epoch_bytes += record["bytes"]
        return record

    def state(self) -> dict[str, Any]:
        """The place behind the last record, JSON-able: cursor before its window, and how far in."""
        if self._position == len(self._records):
            start = self._mark()
            return {**start, "position": 0}
        return {**self._window_start, "position": self._position}

    def _open_epoch(self, cursor: dict[str, Any] | None) -> None:
        shards = self._shards
        if self._window:
            order = permutation(len(shards), self._seed, self.epoch)
            shards = [shards[i] for i in order]
        self._dataset = IterableDataset.from_generator(read_shards, gen_kwargs={"shards": shards})
        if cursor is not None:
            self._dataset.load_state_dict(cursor)
        # The dataset takes a cursor only with its first record; before, its state is the beginning.
        self._unread = cursor
        self._cursor: Iterator[dict[str, Any]] = iter(self._dataset)
        self._records, self._position = [], 0

    def _mark(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "epoch_bytes": self.epoch_bytes,
            "window": self._number,
            "cursor": self._unread or self._dataset.state_dict(),
        }

    def _read_window(self) -> None:
        self._window_start = self._mark()
        records: list[dict[str, Any]] = []
        size, limit = 0, max(self._window, 1)
        while len(records) < limit and size < WINDOW_BYTES:
            stop.raise_if_requested()
            self._unread = None
            record = next(self._cursor, None)
            if record is None:
                break
            records.append(record)
            size += record["bytes"]
        order = permutation(len(records), self._seed, self.epoch, self._number)
        self._records, self._position = [records[i] for i in order], 0
        self._number += 1

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.epoch_bytes = state["epoch"], state["epoch_bytes"]
        self._number = state["window"]
        self._open_epoch(state["cursor"])
        if state["position"]:
            self._read_window()
            for _ in range(state["position"]):
                self.next()
