"""Kernels and threads for decoding: what is won, what is refused, and what is remembered."""

import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gptcli.config.model_schema import ModelConfig
from gptcli.generation.kernel_race import best_threads, decode_threads, packed_for
from gptcli.model.gpt import GPT, initialise
from gptcli.model.packed import OneDnnLinear, quantize


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where races are remembered, with nothing in it; as if no other process ran, and as if tiny
    models were worth it."""
    monkeypatch.setattr("gptcli.generation.kernel_race._LEAST_BYTES", 0)
    monkeypatch.setattr("gptcli.model.race._switches", lambda: 0)
    monkeypatch.setenv("GPT_CACHE", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def make(**keys: Any) -> GPT:
    sizes = {"preset": "gpt2", "n_layer": 5, "n_head": 2, "n_embd": 32, "block_size": 16}
    model = GPT(ModelConfig.model_validate({**sizes, **keys}), 97)
    initialise(model, torch.Generator().manual_seed(0))
    return model.eval()


def remembered(cache: Path, **figures: Any) -> None:
    """Let every race in the cache have ended with these figures."""
    for path in cache.iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), **figures}))


def won(model: GPT, rows: int, steps: int, cache: Path) -> GPT:
    """The model of `packed_for` where the packed layers win."""
    packed_for(model, rows, steps)
    remembered(cache, linear=1.0, packed=0.1, packing=0.1)
    return packed_for(model, rows, steps)


@pytest.mark.parametrize("tied", [False, True])
def test_packed_model(cache: Path, tied: bool) -> None:
    """Bug: another model, or a copy of all weights, or the given one is changed."""
    model, tokens = make(tie_embeddings=tied), torch.randint(97, (4, 9))
    packed = won(model, 4, 1000, cache)
    assert packed is not model
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 5 * 4 + 1
    assert all(isinstance(packed.get_submodule(name), OneDnnLinear) for name in linear)
    assert packed.wte.weight is model.wte.weight
    assert packed.get_parameter("norm.weight") is model.get_parameter("norm.weight")
    with torch.inference_mode():
        expected = model(tokens)
        torch.testing.assert_close(packed(tokens), expected, rtol=1e-5, atol=1e-5)
        kept, half = packed.new_cache(4), tokens[:, :4]
        model(half, kept)  # one reads the prompt, the other goes on
        torch.testing.assert_close(packed(tokens[:, 4:], kept), expected[:, 4:], rtol=0, atol=1e-5)
    packed.train()
    assert not model.training


def test_one_race_a_shape(cache: Path) -> None:
    """Bug: every layer races, or no race is remembered, or each number of rows has its own."""
    model = make()
    packed_for(model, 3, 1000)
    assert len(list(cache.iterdir())) == 5  # qkv, proj, up, proj of up, head
    before = {path: path.read_text() for path in cache.iterdir()}
    for rows in (3, 4):
        packed_for(model, rows, 1000)
        assert {path: path.read_text() for path in cache.iterdir()} == before
    packed_for(model, 5, 1000)
    assert len(list(cache.iterdir())) == 10
    figures = json.loads(next(cache.iterdir()).read_text())
    assert figures.keys() == {"linear", "packed", "packing"}


def test_where_nothing_is_won(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: packing costs more than it saves, or what cannot be packed is."""
    model = make()
    assert won(model, 2, 1000, cache) is not model
    remembered(cache, linear=1.1, packed=1.0)  # not by 20 %
    assert packed_for(model, 2, 1000) is model
    remembered(cache, linear=1.3, packed=1.0, packing=400.0)
    assert packed_for(model, 2, 1000) is model
    assert packed_for(model, 2, 2000) is not model
    assert packed_for(model, 2, 10) is model
    with monkeypatch.context() as patch:
        patch.setattr("gptcli.generation.kernel_race._LEAST_BYTES", 2**25)
        assert packed_for(model, 2, 2000) is model
    model.train()
    assert packed_for(model, 2, 2000) is model
    assert packed_for(make().to(torch.bfloat16), 2, 2000).dtype == torch.bfloat16
    small = make()
    quantize(small, "int8")
    assert packed_for(small, 2, 2000) is small


def test_damaged_or_missing_cache(cache: Path) -> None:
    """Bug: a cut file in the cache ends generation, or is believed."""
    model = make()
    won(model, 2, 1000, cache)
    for content in ("", "[]", '{"linear": "x", "packed": 1, "packing": 1}', '{"linear": NaN}'):
        for path in cache.iterdir():
            path.write_text(content)
        packed_for(model, 2, 1000)
        assert all(json.loads(path.read_text())["linear"] > 0 for path in cache.iterdir())
    for path in cache.iterdir():
        path.unlink()
    cache.rmdir()
    cache.write_text("no directory")
    packed_for(model, 2, 1000)


def test_threads(cache: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the choice is not remembered, outlives the decoding, or overrules the user."""
    model = make()
    assert best_threads(model, 2, 63) == 2
    assert not cache.exists()  # a race would take longer than so few steps
    found = best_threads(model, 2, 64)
    assert found in (1, 2)
    assert torch.get_num_threads() == 2
    (path,) = cache.iterdir()
    assert json.loads(path.read_text())["threads"] == found
    for threads in (1, 2):
        remembered(cache, threads=threads)
        assert best_threads(model, 2, 1000) == best_threads(model, 2, 1) == threads
        with decode_threads(threads):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), decode_threads(1):
        raise KeyError
    assert torch.get_num_threads() == 2
    remembered(cache, threads=64)  # of another machine with this name
    assert best_threads(model, 2, 1000) <= 2
    remembered(cache, threads=1)
    assert best_threads(make().to("meta"), 2, 1000) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert best_threads(model, 2, 1000) == 2
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_threads_of_alike_rows(cache: Path, two_threads: None) -> None:
    """Bug: each number of texts has a race of its own, half a second every time."""
    model = make()
    for rows, races in ((1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (8, 4)):
        best_threads(model, rows, 1000)
        assert len(list(cache.iterdir())) == races


def test_a_race_that_breaks_off(
    cache: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: what goes wrong in a race leaves its threads behind."""

    def no_memory(*given: Any) -> None:
        if torch.get_num_threads() == 1:
            raise MemoryError

    monkeypatch.setattr(GPT, "new_cache", no_memory)
    with pytest.raises(MemoryError):
        best_threads(make(), 2, 1000)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_threads_of_packed_models(cache: Path, two_threads: None, kind: str) -> None:
    """Bug: a quantized model cannot race, or takes the threads that were found for fp32."""
    model = make()
    best_threads(model, 1, 1000)
    quantize(model, kind)
    best_threads(model, 1, 1000)
    assert len(list(cache.iterdir())) == 2


def test_busy_machine(cache: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: what a race found while others ran is taken, and remembered for ever."""
    switches = count(step=10**6)
    monkeypatch.setattr("gptcli.model.race._switches", lambda: next(switches))
    model = make()
    assert packed_for(model, 2, 10**6) is model
    assert best_threads(model, 2, 1000) == 2
    assert not cache.exists()
