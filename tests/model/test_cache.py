"""The key-value cache on its own."""

import torch

from gptcli.model.cache import KVCache


def filled(capacity: int = 5) -> KVCache:
    cache = KVCache(2, 3, 2, capacity, 4, torch.device("cpu"), torch.float32)
    for layer in range(2):
        k = torch.arange(3.0)[:, None, None, None].expand(3, 2, 3, 4) + 10 * layer
        cache.append(layer, k, -k)
    cache.length = 3
    return cache


def test_append_returns_everything_so_far() -> None:
    """Guards: keys of an earlier chunk lost, or room beyond the valid length returned."""
    cache = filled()
    new = torch.full((3, 2, 1, 4), 99.0)
    k, v = cache.append(1, new, -new)
    assert k.shape == v.shape == (3, 2, 4, 4)
    assert k[2, 0, :, 0].tolist() == [12.0, 12.0, 12.0, 99.0]
    assert torch.equal(v, -k)
    assert cache.length == 3  # the model moves it on after the last layer


def test_keep_rows_drops_repeats_and_reorders() -> None:
    """Guards: a finished row leaves its keys to another row."""
    cache = filled()
    cache.keep_rows(torch.tensor([2, 0, 0, 1]))
    assert cache.k[1, :, 1, 2, 3].tolist() == [12.0, 10.0, 10.0, 11.0]
    assert cache.v[0, :, 1, 2, 3].tolist() == [-2.0, 0.0, 0.0, -1.0]
    assert cache.length == 3


def test_row_bytes_is_what_a_row_takes() -> None:
    """Guards: batches sized by a wrong memory estimate."""
    cache = filled(capacity=7)
    assert cache.row_bytes * 3 == cache.k.nbytes + cache.v.nbytes
    cache.keep_rows(torch.tensor([], dtype=torch.long))
    assert cache.row_bytes == 2 * 2 * 2 * 7 * 4 * 4
