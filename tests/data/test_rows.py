"""Batches: padding and masks, the position behind each, reading ahead in a thread."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from gptcli.data.rows import Prefetch, Row, StepBatch, collate, step_batches
from gptcli.errors import DataError
from gptcli.model.gpt import IGNORED


def row(tokens: list[int], mask: list[int] | None = None) -> Row:
    return Row(
        np.array(tokens, dtype=np.uint32), None if mask is None else np.array(mask, dtype=bool)
    )


class Counting:
    """Rows [k, k + 1, k + 2], k = 0, 1, ...; 10 bytes each, 4 an epoch."""

    def __init__(self, rows: int = 10**9) -> None:
        self.given, self.rows = 0, rows

    @property
    def epoch(self) -> int:
        return (self.given - 1) // 4

    @property
    def epoch_bytes(self) -> float:
        return 10.0 * ((self.given - 1) % 4 + 1)

    def next(self) -> Row:
        if self.given == self.rows:
            raise DataError("the row is broken")
        self.given += 1
        return row([self.given - 1, self.given, self.given + 1])

    def state(self) -> dict[str, Any]:
        return {"row": self.given}


def test_targets_are_the_tokens_one_further():
    """Guards against inputs and targets shifted against each other, or off by one in length."""
    tokens, targets = collate([row([1, 2, 3, 4]), row([5, 6, 7, 8])])
    assert tokens.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert targets.tolist() == [[2, 3, 4], [6, 7, 8]]
    assert tokens.dtype == targets.dtype == torch.int64


def test_short_rows_are_padded_without_loss():
    """Guards against loss on padding, and against a row cut to the shortest of its step."""
    tokens, targets = collate([row([1, 2]), row([5, 6, 7, 8], [0, 1, 1]), row([3, 4, 9], [1, 0])])
    none = IGNORED
    assert tokens.tolist() == [[1, 0, 0], [5, 6, 7], [3, 4, 0]]
    assert targets.tolist() == [[2, none, none], [none, 7, 8], [4, none, none]]


def test_large_token_ids_survive():
    """Guards against 16-bit or signed 32-bit ids, and a mask that turns IGNORED into 2^32 - 100."""
    _, targets = collate([row([0, 200_018, 70_000], [1, 0])])
    assert targets.tolist() == [[200_018, IGNORED]]
    logits = torch.zeros(2, 10)
    loss = functional.cross_entropy(logits, torch.tensor([3, IGNORED]), reduction="sum")
    assert loss.item() == pytest.approx(np.log(10))


def test_a_step_carries_the_place_behind_it_and_the_epochs_so_far():
    """Guards against a checkpoint that repeats the step it was saved after."""
    batches = step_batches(Counting(), 3, 40)
    first, second = next(batches), next(batches)
    assert first.tokens.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert first.position == {"row": 3}
    assert first.epochs == pytest.approx(0.75)
    assert second.position == {"row": 6}
    assert second.epochs == pytest.approx(1.5)


def test_an_epoch_is_never_more_than_one():
    """Guards against an epoch number that runs ahead where the byte count is a little low."""
    batches = step_batches(Counting(), 1, 25)
    assert [next(batches).epochs for _ in range(5)] == [0.4, 0.8, 1.0, 1.0, 1.4]


def test_the_position_belongs_to_the_batch_that_was_used():
    """Guards against a checkpoint that skips the batches read ahead and never trained on."""
    source = Counting()
    with Prefetch(step_batches(source, 2, 40)) as batches:
        for step in range(1, 6):
            wait_until(lambda used=2 * step: source.given > used)
            batch = batches.next()
            assert batch.position == {"row": 2 * step}
            assert batch.tokens[0, 0] == 2 * step - 2


def test_an_error_of_the_reader_arrives_after_the_batches_before_it():
    """Guards against a training loop that waits for ever when its reader has died."""
    with Prefetch(step_batches(Counting(rows=5), 2, 40)) as batches:
        assert batches.next().position == {"row": 2}
        assert batches.next().position == {"row": 4}
        with pytest.raises(DataError, match="the row is broken"):
            batches.next()


def test_closing_does_not_wait_for_a_full_queue():
    """Guards against a run that hangs at its end because nobody empties the queue."""
    source, threads = Counting(), threading.active_count()
    prefetch = Prefetch(step_batches(source, 1, 40))
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
    with pytest.raises(ZeroDivisionError), Prefetch(step_batches(Counting(), 1, 40)):
        raise ZeroDivisionError
    assert threading.active_count() == threads


def test_closing_waits_for_the_row_that_is_read():
    """Guards against a reader that goes on using files behind the end of its run."""
    done = threading.Event()

    def slow() -> Iterator[StepBatch]:
        time.sleep(0.3)
        done.set()
        yield next(step_batches(Counting(), 1, 40))

    with Prefetch(slow()):
        pass
    assert done.is_set()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
