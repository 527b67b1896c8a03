"""Cached decoding with windows and scaled positions, and texts beyond the block size."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.model.gpt import GPT

V, T = 50, 24
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 16, "block_size": T}
MODERN: dict[str, Any] = {**PRESETS["modern"], **SIZES}
GPT2 = {**PRESETS["gpt2"], **SIZES}


def scaled(kind: str, original: int = 8) -> dict[str, Any]:
    return {"rope_scaling": {"kind": kind, "factor": 3.0, "original_block_size": original}}


VARIANTS: dict[str, dict[str, Any]] = {
    "window": {**MODERN, "window": 5},
    "window-of-one": {**MODERN, "window": 1},
    "window-of-the-block": {**MODERN, "window": 24},
    "mixed": {**GPT2, "window": [0, 5]},
    "learned-all-windowed": {**GPT2, "window": [7, 3]},
    "unequal-windows": {**MODERN, "window": [3, 9, 6]},
    "gqa-window": {**MODERN, "n_kv_head": 2, "window": [4, 0]},
    "mqa-wide-heads": {**MODERN, "n_kv_head": 1, "head_dim": 6, "window": [5]},
    "no-qk-norm": {**MODERN, "qk_norm": False, "window": [0, 4]},
    "no-positions": {**MODERN, "position": "none", "window": 6},
    "linear": {**MODERN, **scaled("linear")},
    "dynamic": {**MODERN, **scaled("dynamic")},
    "yarn": {**MODERN, **scaled("yarn")},
    "llama3": {**MODERN, **scaled("llama3")},
    "dynamic-gqa-window": {**MODERN, **scaled("dynamic"), "n_kv_head": 2, "window": [5, 0]},
    "yarn-window": {**MODERN, **scaled("yarn"), "window": 6},
    "llama3-mixed": {**MODERN, **scaled("llama3"), "window": [6, 0]},
    "dynamic-of-short-training": {**MODERN, **scaled("dynamic", 1)},
    "dynamic-not-needed": {**MODERN, **scaled("dynamic", 100)},
}
ROLLING = ["window", "window-of-one", "unequal-windows", "mqa-wide-heads", "no-positions"]
ROLLING += ["yarn-window", "window-of-the-block"]
LONG_CHUNKS = [[1] * 80, [40, 1, 39], [30, 20, 5, 25]]
CHUNKS = [[T], [1] * T, [10, 1, 1, 12], [3, 4, 5, 6, 6], [1, 23], [18] + [1] * 6]


def random_model(settings: dict[str, Any]) -> GPT:
    model = GPT(ModelConfig(**settings), V)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        mean = 0.5 if parameter.ndim == 1 else 0.0
        parameter.data.normal_(mean, 0.3, generator=generator)
    return model.requires_grad_(False).eval()


def some_tokens(length: int = T, batch: int = 2) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(1))


def check(model: GPT, tokens: Tensor, chunks: list[int], capacity: int | None = None) -> None:
    """What each chunk gives is what the text so far gives without a cache."""
    cache, start = model.new_cache(len(tokens), capacity), 0
    scaling = model.config.rope_scaling
    dynamic = scaling is not None and scaling.kind == "dynamic"
    full = model(tokens)  # else no position depends on what follows it
    for size in chunks:
        got = model(tokens[:, start : start + size], cache)
        start += size
        assert cache.length == start
        text = model(tokens[:, :start]) if dynamic else full[:, :start]
        expected = text[:, -size:]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", CHUNKS, ids=lambda c: f"{len(c)}-chunks")
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_equals_uncached(name: str, chunks: list[int]) -> None:
    """Guards: a ring, a mask or a rotation that is off after a prefill in parts."""
    check(random_model(VARIANTS[name]), some_tokens(), chunks)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cache_serves_again_after_its_length_is_put_back(name: str) -> None:
    """Guards: keys, tokens or rotations of the text before."""
    model = random_model(VARIANTS[name])
    cache = model.new_cache(2)
    model(some_tokens().flip(1), cache)
    cache.length = 0
    for stop in range(1, T + 1):
        got = model(some_tokens()[:, stop - 1 : stop], cache)
    torch.testing.assert_close(got, model(some_tokens())[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", LONG_CHUNKS, ids=lambda c: f"{len(c)}-chunks")
@pytest.mark.parametrize("name", ROLLING)
def test_a_rolling_config_reads_on_beyond_the_block(name: str, chunks: list[int]) -> None:
    """Guards: positions that end with the table, or a ring whose first lap alone is right."""
    model = random_model(VARIANTS[name])
    assert model.config.rolls
    check(model, some_tokens(80), chunks)
    assert model.new_cache(1).row_bytes == model.new_cache(1, 10_000).row_bytes


def test_beyond_the_block_attention_is_the_same_everywhere() -> None:
    """Guards: rotations beyond the table that do not go on where it ends."""
    wide = random_model({**VARIANTS["yarn-window"], "block_size": 80})
    narrow = random_model(VARIANTS["yarn-window"])
    torch.testing.assert_close(narrow(some_tokens(80)), wide(some_tokens(80)))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ROLLING])
def test_other_configs_end_with_the_block(name: str) -> None:
    """Guards: a text silently read beyond what the positions or the cache hold."""
    model = random_model(VARIANTS[name])
    cache = model.new_cache(2)
    model(some_tokens(), cache)
    with pytest.raises(ValueError, match="25 tokens do not fit block_size 24"):
        model(some_tokens(1), cache)
    with pytest.raises(ValueError, match="25 tokens do not fit block_size 24"):
        model(some_tokens(T + 1))


def test_a_cache_that_is_full_says_so() -> None:
    """Guards: a ring smaller than its window that drops keys which queries still reach."""
    model = random_model(VARIANTS["window-of-the-block"])
    cache = model.new_cache(1, 20)
    model(some_tokens(20, 1), cache)
    with pytest.raises(ValueError, match="21 tokens do not fit a cache of 20"):
        model(some_tokens(1, 1), cache)


def test_a_short_cache_is_enough_for_a_short_text() -> None:
    """Guards: a cache of less than a window that is taken for the window."""
    for name in ("mixed", "unequal-windows", "dynamic"):
        check(random_model(VARIANTS[name]), some_tokens(4), [2, 1, 1], capacity=4)


def test_a_windowed_layer_keeps_no_more_than_its_window() -> None:
    """Guards: a cache that takes the memory of full attention."""
    model = random_model(VARIANTS["mixed"])  # windows 0, 5, 0
    assert [k.size(2) for k in model.new_cache(1).k] == [T, 5, T]
    assert [k.size(2) for k in model.new_cache(1, 4).k] == [4, 4, 4]
    rolling = random_model(VARIANTS["unequal-windows"])
    assert [k.size(2) for k in rolling.new_cache(1).k] == [3, 9, 6]
