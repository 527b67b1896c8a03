"""Steps of rows, and the thread that reads ahead."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gptcli.data.rows import Prefetch, Row, StepBatch, collate, step_batches
from gptcli.model.gpt import IGNORED


class Counting:
    """Rows [n, n + 1, n + 2] whose position is n + 1; an epoch is ten of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.number, self.fail_at = 0, fail_at

    @property
    def epoch(self) -> int:
        return (self.number - 1) // 10

    @property
    def epoch_bytes(self) -> float:
        return ((self.number - 1) % 10 + 1) * 7.0

    def next(self) -> Row:
        if self.number == self.fail_at:
            raise OSError("the disk is gone")
        self.number += 1
        return Row(np.arange(self.number - 1, self.number + 2, dtype=np.uint32), None)

    def state(self) -> dict[str, Any]:
        return {"number": self.number}


def test_collate() -> None:
    """Bug: padding or prompt tokens are trained on, or targets are off by one."""
    tokens, targets = collate(
        [
            Row(np.array([1, 2, 3, 4], dtype=np.uint32), None),
            Row(np.array([5, 6, 7], dtype=np.uint32), np.array([False, True])),
        ]
    )
    assert tokens.tolist() == [[1, 2, 3], [5, 6, 0]]
    assert targets.tolist() == [[2, 3, 4], [IGNORED, 7, IGNORED]]
    assert tokens.dtype == targets.dtype == torch.int64


def test_steps() -> None:
    """Bug: epochs are counted by the last batch that was read, or a step spans them wrongly."""
    steps = step_batches(Counting(), rows=4, epoch_bytes=70)
    batches = [next(steps) for _ in range(6)]
    assert [b.epochs for b in batches] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.4])
    assert [b.position["number"] for b in batches] == [4, 8, 12, 16, 20, 24]
    assert batches[2].tokens[:, 0].tolist() == [8, 9, 10, 11]


def test_position_is_that_of_the_batch() -> None:
    """Bug: a checkpoint holds the position of what was read ahead, and a resume skips it."""
    source = Counting()
    with Prefetch(step_batches(source, rows=2, epoch_bytes=70)) as batches:
        first = batches.next()
        deadline = time.monotonic() + 5
        while source.number < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert source.number >= 8  # it has read ahead
        assert first.position == {"number": 2}
        assert batches.next().position == {"number": 4}


def test_error_in_the_thread() -> None:
    """Bug: the reader dies and training waits for ever, or good batches before it are lost."""
    with Prefetch(step_batches(Counting(fail_at=5), rows=2, epoch_bytes=70)) as batches:
        assert [batches.next().position["number"] for _ in range(2)] == [2, 4]
        with pytest.raises(OSError, match="the disk is gone"):
            batches.next()


def test_end_of_the_rows() -> None:
    """Bug: an iterator that ends is waited for."""
    with Prefetch(iter(())) as batches, pytest.raises(StopIteration):
        batches.next()


def test_closing() -> None:
    """Bug: leaving waits for a full queue, or leaves the thread reading for ever."""
    before = threading.active_count()
    began = time.monotonic()
    with Prefetch(step_batches(Counting(), rows=1, epoch_bytes=70)) as batches:
        time.sleep(0.05)  # the queue is full and the thread waits for room
        batches.next()
    assert time.monotonic() - began < 2
    assert threading.active_count() == before


def test_closing_while_the_reader_works() -> None:
    """Bug: an error in the loop is lost when the reader is in the middle of something."""

    def slow() -> Iterator[StepBatch]:
        time.sleep(0.3)
        yield from step_batches(Counting(), rows=1, epoch_bytes=70)

    before = threading.active_count()
    with pytest.raises(KeyError), Prefetch(slow()):
        raise KeyError
    assert threading.active_count() == before
