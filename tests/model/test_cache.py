"""The key-value cache on its own, against the list of all keys ever stored."""

import pytest
import torch
from torch import Tensor

from gptcli.model.cache import KVCache


def new(windows: list[int], capacity: int, batch: int = 3, keeps_tokens: bool = False) -> KVCache:
    device = torch.device("cpu")
    return KVCache(windows, capacity, batch, 2, 4, device, torch.float32, keeps_tokens)


def keys(first: int, count: int, batch: int = 3) -> Tensor:
    """(batch, 2, count, 4), every number telling its row and its place in the text."""
    times = torch.arange(float(first), first + count)[:, None].expand(count, 4)
    rows = 100 * torch.arange(float(batch))[:, None, None, None]
    return times.expand(batch, 2, count, 4) + rows


def filled(capacity: int = 5) -> KVCache:
    cache = new([0, 0], capacity)
    for layer in range(2):
        k = torch.arange(3.0)[:, None, None, None].expand(3, 2, 3, 4) + 10 * layer
        cache.append(layer, k, -k)
    cache.length = 3
    return cache


def test_append_returns_everything_so_far() -> None:
    """Guards: keys of an earlier chunk lost, or room beyond the valid length returned."""
    cache = filled()
    last = torch.full((3, 2, 1, 4), 99.0)
    k, v = cache.append(1, last, -last)
    assert k.shape == v.shape == (3, 2, 4, 4)
    assert k[2, 0, :, 0].tolist() == [12.0, 12.0, 12.0, 99.0]
    assert torch.equal(v, -k)
    assert cache.length == 3  # the model moves it on after the last layer


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize(
    "chunks", [[1] * 14, [3, 1, 1, 4, 1, 2, 7, 1], [5, 5, 1], [4, 2, 1], [23, 1, 2], [6, 6, 6, 1]]
)
def test_a_ring_returns_what_the_window_reaches(window: int, chunks: list[int]) -> None:
    """Guards: a key overwritten while a query of the chunk still reaches it, one of a wrong slot,
    or one out of reach that a single query would see."""
    cache, start = new([window], window), 0
    assert cache.capacity is None
    for count in chunks:
        given = keys(start, count)
        k, v = cache.append(0, given, -given)
        reached = keys(0, start + count)[:, :, max(0, start - window + 1) :]
        assert torch.equal(k.sort(dim=2).values if count == 1 else k, reached)
        assert torch.equal(v, -k)
        start += count
        cache.length = start


def test_starting_again_forgets_the_ring() -> None:
    """Guards: keys of an earlier text after `length` was put back to 0."""
    cache = new([4], 4)
    cache.append(0, keys(0, 9), keys(0, 9))
    cache.length = 0
    given = keys(50, 2)
    assert torch.equal(cache.append(0, given, given)[0], given)


def test_row_bytes_is_what_a_row_takes() -> None:
    """Guards: batches sized by a wrong memory estimate, or by none for an empty batch."""
    cache = filled(capacity=7)
    assert cache.row_bytes == 2 * 2 * 2 * 7 * 4 * 4
    unequal = new([0, 3, 100], 7, batch=0, keeps_tokens=True)
    assert unequal.row_bytes == 2 * 2 * (7 + 3 + 7) * 4 * 4 + 7 * 8


def test_capacity_is_none_only_where_every_window_has_room() -> None:
    """Guards: a ring smaller than its window that is written round and round."""
    assert new([3, 5], 5).capacity is None
    assert new([3, 5], 4).capacity == 4
    assert new([3, 0], 9).capacity == 9
