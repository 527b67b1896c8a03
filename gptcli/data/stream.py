"""An endless, shuffled, exactly resumable stream of records.

A reader walks shards in the order it is told and says where it stands; the order is ours: each
epoch permutes the shards, and records are shuffled inside a window. The state holds the reader's
cursor at the start of the window; a resume reads the same window again, draws the same permutation
and goes on at the same place, so nothing is lost and nothing is repeated.
"""

from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from datasets import IterableDataset
from datasets.io.generator import GeneratorDatasetInputStream

from gptcli import stop
from gptcli.data.readers import read_shards
from gptcli.data.shards import Shard

WINDOW_BYTES = 64 * 1024 * 1024


def philox(*key: int) -> np.random.Generator:
    """A random generator that depends on the key only (Philox, counter-based)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def permutation(n: int, *key: int) -> list[int]:
    """A permutation of range(n) that depends on the key only."""
    order: list[int] = philox(*key).permutation(n).tolist()
    return order


class Reader(Protocol):
    """Records of `shards` shards, walked in any order from any place.

    A cursor is (place in the order, records of that shard to skip).
    """

    shards: int

    def open(self, order: Sequence[int], cursor: tuple[int, int]) -> None:
        """Walk the shards in this order, from the cursor on."""

    def next(self) -> dict[str, Any] | None:
        """The next record, None behind the last."""

    def cursor(self) -> tuple[int, int]:
        """The place behind the last record."""


class ShardReader:
    """Reads shards of the sources through `datasets`' IterableDataset, whose state says where
    it is: the shard, and how many of its examples are read."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = len(shards)
        self._ordered = _OrderedShards(shards)
        self._dataset = _stream(self._ordered, list(range(len(shards))))
        self._beginning = self._dataset.state_dict()
        self._records: Iterator[dict[str, Any]] = iter(())
        self._opened_at: tuple[int, int] | None = (0, 0)

    def open(self, order: Sequence[int], cursor: tuple[int, int]) -> None:
        """Walk the shards in this order, from the cursor on."""
        self._ordered.order = order
        place = {"shard_idx": cursor[0], "shard_example_idx": cursor[1]}
        examples = {**self._beginning["examples_iterable"], **place}
        self._dataset.load_state_dict({**self._beginning, "examples_iterable": examples})
        self._records = iter(self._dataset)
        # The dataset takes the state only with its first record; before, its own is an old one.
        self._opened_at = (cursor[0], cursor[1])

    def next(self) -> dict[str, Any] | None:
        """The next record, None behind the last."""
        self._opened_at = None
        return next(self._records, None)

    def cursor(self) -> tuple[int, int]:
        """The place behind the last record."""
        if self._opened_at is not None:
            return self._opened_at
        state = self._dataset.state_dict()["examples_iterable"]
        return state["shard_idx"], state["shard_example_idx"]


def _stream(records: "_OrderedShards", places: list[int]) -> IterableDataset:
    """The library's stream of the records at `places`."""
    try:
        return IterableDataset.from_generator(records, gen_kwargs={"places": places})
    except OSError:  # it makes a cache, of which a stream uses nothing, where none can be made
        with TemporaryDirectory() as folder:
            builder = GeneratorDatasetInputStream(
                records, cache_dir=folder, streaming=True, gen_kwargs={"places": places}
            )
            return builder.read()


class _OrderedShards:
    """Records of the shards at given places of `order`, for `datasets`, which names a dataset by
    the hash of its pickled arguments: thousands of shards would cost it seconds, places cost none.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self.order: Sequence[int] = range(len(shards))

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, places: list[int]) -> Iterator[dict[str, Any]]:
        return read_shards([self._shards[self.order[place]] for place in places])


class RecordStream:
    """The reader's records, epoch after epoch, each epoch in a new order.

    `size` is an epoch in bytes; `window` records (at most 64 MiB) are shuffled together, 0 leaves
    records as they come. `epoch` and `epoch_bytes` tell how far the records handed out so far
    reach. `state` is what `state()` gave.
    """

    def __init__(
        self,
        reader: Reader,
        size: int,
        seed: int,
        window: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._reader, self._size, self._seed, self._window = reader, size, seed, window
        self.epoch, self.epoch_bytes = 0, 0
        self._number = 0  # of the next window in this epoch
        self._records: list[dict[str, Any] | None] = []  # of the current window, shuffled
        self._position = 0  # records of it handed out
        self._window_start: dict[str, Any] = {}
        if state is None:
            self._open_epoch((0, 0))
        else:
            self._restore(state)

    @property
    def epochs(self) -> float:
        """Passes over the records so far, as a fraction by bytes; a whole one only at its end, for
        `size` may be an estimate."""
        return self.epoch + min(self.epoch_bytes / max(self._size, 1), 1.0 - 1e-9)

    def next(self) -> dict[str, Any] | None:
        """The next record, or None once at the end of each epoch."""
        if self._position == len(self._records):
            self._read_window()
            if not self._records:
                self.epoch, self.epoch_bytes, self._number = self.epoch + 1, 0, 0
                self._open_epoch((0, 0))
                return None
        record = self._records[self._position]
        assert record is not None
        self._records[self._position] = None  # its text is free when the caller is done with it
        self._position += 1
        self.epoch_bytes += record["bytes"]
        return record

    def state(self) -> dict[str, Any]:
        """The place behind the last record, JSON-able: cursor before its window, and how far in."""
        if self._position == len(self._records):
            return {**self._mark(), "position": 0}
        return {**self._window_start, "position": self._position}

    def _open_epoch(self, cursor: tuple[int, int]) -> None:
        shards = self._reader.shards
        order: Sequence[int] = range(shards)
        if self._window:
            order = permutation(shards, self._seed, self.epoch)
        self._reader.open(order, cursor)
        self._records, self._position = [], 0

    def _mark(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "epoch_bytes": self.epoch_bytes,
            "window": self._number,
            "cursor": list(self._reader.cursor()),
        }

    def _read_window(self) -> None:
        self._window_start = self._mark()
        records: list[dict[str, Any] | None] = []
        size, limit = 0, max(self._window, 1)
        while len(records) < limit and size < WINDOW_BYTES:
            stop.raise_if_requested()
            record = self._reader.next()
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
        first, skip = state["cursor"]
        if skip > max(self._size, WINDOW_BYTES):  # of a byte or more each, but in packed files
            raise ValueError(f"{skip} records of a shard are read, more than any has")
        # Changed data, where that is allowed, may have fewer shards.
        self._open_epoch((min(first, self._reader.shards), skip))
        if state["position"]:
            self._read_window()
            if state["position"] > len(self._records):
                raise ValueError(f"{state['position']} records of {len(self._records)} are read")
            for _ in range(state["position"]):
                self.next()
