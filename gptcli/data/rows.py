"""Rows and steps: what the training loop consumes, with the position behind each step."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gptcli import stop
from gptcli.model.loss import IGNORED

# uint32 when fresh from a tokenizer; a cache holds uint16 where the vocabulary allows it.
Tokens: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """Tokens (at most block_size + 1) and which of tokens[1:] carry loss (None: all)."""

    tokens: Tokens
    loss_mask: np.ndarray[Any, np.dtype[np.bool_]] | None


@dataclass(frozen=True)
class Rows:
    """`inputs` and `targets` (n, T) int64, padding and masked targets IGNORED; `starts` (n, T)
    bool, True where a document's piece begins and at each row's beginning, or None; `count` tokens
    in all, padding left out. `ends` and `labels` are those of a StepBatch, with inputs and targets
    (n, S, T)."""

    inputs: Array
    targets: Array
    starts: Array | None
    count: int
    ends: Array | None = None
    labels: Array | None = None


class RowSource(Protocol):
    """Rows without end, with the place behind the last one."""

    @property
    def epochs(self) -> float:
        """Passes over the training data up to the last row, as a fraction by bytes."""

    @property
    def seen(self) -> list[dict[str, Any]]:
        """What the rows so far held of each source: {"tokens", "documents", "epochs"}."""

    def take(self, n: int) -> Rows:
        """The next n rows."""

    def state(self) -> dict[str, Any]:
        """The place behind the last row, JSON-able."""


@dataclass(frozen=True)
class StepBatch:
    """All rows of one optimizer step and the data position behind them.

    `tokens` and `targets` are (R, T) int64; padding and masked targets are IGNORED. `segments`
    (R, T) int64 numbers the documents of a row 0, 1, 2, ... where attention must stay inside them.
    `count` is the number of tokens, padding left out. `epochs` counts passes over the training
    data so far, as a fraction by bytes.

    Where a row is an example of several texts (a task head's, a preference's), tokens and targets
    are (R, S, T), and `ends` (R, S) int64 is the place of each text's last token. `labels` (R,)
    int64 is what a task head learns, or the key of a preference pair.
    """

    tokens: Tensor
    targets: Tensor
    segments: Tensor | None
    count: int
    position: dict[str, Any]
    epochs: float
    ends: Tensor | None = None
    labels: Tensor | None = None

    def part(self, rows: slice, device: torch.device) -> "StepBatch":
        """Some of the rows, on `device`; nothing waits for a copy from page-locked memory."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows].to(device, non_blocking=True)

        return replace(
            self,
            tokens=self.tokens[rows].to(device, non_blocking=True),
            targets=self.targets[rows].to(device, non_blocking=True),
            segments=moved(self.segments),
            ends=moved(self.ends),
            labels=moved(self.labels),
        )


def step_batches(source: RowSource, rows: int, *, pin: bool = False) -> Iterator[StepBatch]:
    """Steps of `rows` rows for ever.

    With `pin` (which needs a GPU) the tensors are in page-locked memory: only from there a copy
    to the GPU with `non_blocking` returns at once.
    """

    def tensor(array: Array) -> Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory() if pin else made

    def maybe(array: Array | None) -> Tensor | None:
        return None if array is None else tensor(array)

    while True:
        batch = source.take(rows)
        segments = None
        if batch.starts is not None:
            segments = tensor(np.cumsum(batch.starts, axis=1, dtype=np.int64) - 1)
        yield StepBatch(
            tensor(batch.inputs),
            tensor(batch.targets),
            segments,
            batch.count,
            source.state(),
            source.epochs,
            maybe(batch.ends),
            maybe(batch.labels),
        )


def collate(batch: list[Row]) -> Rows:
    """Rows with T the longest row less one; short rows end in padding, which needs no mask because
    attention is causal."""
    width = max(len(row.tokens) for row in batch) - 1
    tokens = np.zeros((len(batch), width), dtype=np.int64)
    targets = np.full((len(batch), width), IGNORED, dtype=np.int64)
    for i, row in enumerate(batch):
        length = len(row.tokens) - 1
        tokens[i, :length] = row.tokens[:-1]
        if row.loss_mask is None:
            targets[i, :length] = row.tokens[1:]
        else:
            targets[i, :length] = np.where(row.loss_mask, row.tokens[1:].astype(np.int64), IGNORED)
    return Rows(tokens, targets, None, sum(len(row.tokens) - 1 for row in batch))


class Prefetch:
    """Runs `batches` ahead in one thread; an error there is raised at the next `next()`, and at
    each one after it.

    Each batch carries its own position, so what is prefetched but unused is never counted.
    """

    _DEPTH = 4

    def __init__(self, batches: Iterator[StepBatch]) -> None:
        self._queue: queue.Queue[StepBatch | BaseException] = queue.Queue(self._DEPTH)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(batches,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join(timeout=10)

    def next(self) -> StepBatch:
        """The next batch; raises what the thread raised, `stop.Stopped` while none comes."""
        if self._error is not None:  # nothing comes behind it
            raise self._error
        item = self._waited()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        return item

    def _waited(self) -> StepBatch | BaseException:
        while True:
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:  # a reader that hangs must not keep a run from being stopped
                stop.raise_if_requested()

    def _run(self, batches: Iterator[StepBatch]) -> None:
        item: StepBatch | BaseException
        while not self._closed.is_set():
            try:
                item = next(batches)
            except BaseException as error:  # handed to the consumer, not swallowed
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
