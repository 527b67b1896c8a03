"""Batches: padding and masks, the position behind each, reading ahead in a thread."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from gptcli.data.rows import Prefetch, Row, Rows, StepBatch, collate, step_batches
from gptcli.errors import DataError
from gptcli.model.loss import IGNORED


def row(tokens: list[int], mask: list[int] | None = None) -> Row:
    return Row(
        np.array(tokens, dtype=np.uint32), None if mask is None else np.array(mask, dtype=bool)
    )


class Counting:
    """Rows [k, k + 1, k + 2], k = 0, 1, ...; 4 an epoch."""

    def __init__(self, rows: int = 10**9) -> None:
        self.given, self.rows = 0, rows

    @property
    def epochs(self) -> float:
        return self.given / 4

    @property
    def seen(self) -> list[dict[str, Any]]:
        return []

    def take(self, n: int) -> Rows:
        rows = []
        for _ in range(n):
            if self.given == self.rows:
                raise DataError("the row is broken")
            self.given += 1
            rows.append(row([self.given - 1, self.given, self.given + 1]))
        return collate(rows)

    def state(self) -> dict[str, Any]:
        return {"row": self.given}


def test_targets_are_the_tokens_one_further():
    """Guards against inputs and targets shifted against each other, or off by one in length."""
    rows = collate([row([1, 2, 3, 4]), row([5, 6, 7, 8])])
    assert rows.inputs.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert rows.targets.tolist() == [[2, 3, 4], [6, 7, 8]]
    assert rows.inputs.dtype == rows.targets.dtype == np.int64


def test_short_rows_are_padded_without_loss():
    """Guards against loss on padding, and against a row cut to the shortest of its step."""
    rows = collate([row([1, 2]), row([5, 6, 7, 8], [0, 1, 1]), row([3, 4, 9], [1, 0])])
    none = IGNORED
    assert rows.count == 1 + 3 + 2
    assert rows.starts is None
    assert rows.inputs.tolist() == [[1, 0, 0], [5, 6, 7], [3, 4, 0]]
    assert rows.targets.tolist() == [[2, none, none], [none, 7, 8], [4, none, none]]


def test_large_token_ids_survive():
    """Guards against 16-bit or signed 32-bit ids, and a mask that turns IGNORED into 2^32 - 100."""
    rows = collate([row([0, 200_018, 70_000], [1, 0])])
    assert rows.targets.tolist() == [[200_018, IGNORED]]
    logits = torch.zeros(2, 10)
    loss = functional.cross_entropy(logits, torch.tensor([3, IGNORED]), reduction="sum")
    assert loss.item() == pytest.approx(np.log(10))


def test_a_step_carries_the_place_behind_it_and_the_epochs_so_far():
    """Guards against a checkpoint that repeats the step it was saved after."""
    batches = step_batches(Counting(), 3)
    first, second = next(batches), next(batches)
    assert first.tokens.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert first.position == {"row": 3}
    assert first.epochs == pytest.approx(0.75)
    assert second.position == {"row": 6}
    assert second.epochs == pytest.approx(1.5)
    assert (first.count, second.count) == (6, 6)


class Masked(Counting):
    """Rows of width 5 with documents that begin where `starts` says."""

    def take(self, n: int) -> Rows:
        tokens = np.arange(n * 5, dtype=np.int64).reshape(n, 5)
        starts = np.array([[1, 0, 0, 1, 1], [1, 0, 0, 0, 0]], dtype=bool)[:n]
        return Rows(tokens, tokens + 1, starts, n * 5)


def test_segments_count_the_documents_of_each_row():
    """Guards against segments that begin at 1, run on from row to row, or come unasked for."""
    batch = next(step_batches(Masked(), 2))
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 0, 0, 1, 2], [0, 0, 0, 0, 0]]
    assert batch.segments.dtype == torch.int64
    assert next(step_batches(Counting(), 2)).segments is None


def test_the_position_belongs_to_the_batch_that_was_used():
    """Guards against a checkpoint that skips the batches read ahead and never trained on."""
    source = Counting()
    with Prefetch(step_batches(source, 2)) as batches:
        for step in range(1, 6):
            wait_until(lambda used=2 * step: source.given > used)
            batch = batches.next()
            assert batch.position == {"row": 2 * step}
            assert batch.tokens[0, 0] == 2 * step - 2


def test_an_error_of_the_reader_arrives_after_the_batches_before_it():
    """D17: guards against a training loop that waits for ever when its reader has died."""
    with Prefetch(step_batches(Counting(rows=5), 2)) as batches:
        assert batches.next().position == {"row": 2}
        assert batches.next().position == {"row": 4}
        for _ in range(3):  # whoever catches it and asks again must not wait for ever
            with pytest.raises(DataError, match="the row is broken"):
                batches.next()


def test_closing_does_not_wait_for_a_full_queue():
    """Guards against a run that hangs at its end because nobody empties the queue."""
    source, threads = Counting(), threading.active_count()
    prefetch = Prefetch(step_batches(source, 1))
    prefetch.next()
    wait_until(lambda: source.given >= 6)  # one used, four in the queue, one waiting for a place
    begin = time.monotonic()
    prefetch.__exit__()
    assert time.monotonic() - begin < 5
    assert threading.active_count() == threads
    assert source.given < 12


def test_an_exception_in_the_loop_closes_the_reader():
    """Guards against a thread that reads on behind a failed run."""
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), Prefetch(step_batches(Counting(), 1)):
        raise ZeroDivisionError
    assert threading.active_count() == threads


def test_closing_waits_for_the_row_that_is_read():
    """Guards against a reader that goes on using files behind the end of its run."""
    done = threading.Event()

    def slow() -> Iterator[StepBatch]:
        time.sleep(0.3)
        done.set()
        yield next(step_batches(Counting(), 1))

    with Prefetch(slow()):
        pass
    assert done.is_set()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
