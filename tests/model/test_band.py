"""Windowed attention, over a row at once and in blocks, against a loop over the queries."""

import math

import pytest
import torch
from torch import Tensor

from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.model import band, segments
from gptcli.model.band import Reach
from gptcli.model.gpt import GPT
from gptcli.model.segments import Segments

CPU = torch.device("cpu")
B, H, D = 2, 3, 4


@pytest.fixture(params=["dense", "blocks"])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing the same attention, which length and window choose between."""
    monkeypatch.setattr(band, "_SMALLEST_BLOCK", 1)
    monkeypatch.setattr(band, "_SHARE_OF_SCORES", math.inf if request.param == "blocks" else 0.0)
    return str(request.param)


def some_qkv(length: int, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, D) and k, v (B, H, P + T, D), with gradients."""
    generator = torch.Generator().manual_seed(length + past)
    shapes = [(B, H, length, D)] + 2 * [(B, H, past + length, D)]
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return q, k, v


def loop(q: Tensor, k: Tensor, v: Tensor, window: int, ids: Tensor | None = None) -> Tensor:
    """Attention of one query at a time over the keys that it may see; `ids` are documents."""
    past, rows = k.size(2) - q.size(2), []
    for b in range(q.size(0)):
        for i in range(q.size(2)):
            last = past + i
            seen = [j for j in range(last + 1) if not window or j > last - window]
            if ids is not None:
                seen = [j for j in seen if ids[b, j] == ids[b, i]]
            weights = (k[b, :, seen] @ q[b, :, i, :, None] / math.sqrt(D)).softmax(1)  # (H, J, 1)
            rows.append((weights * v[b, :, seen]).sum(1))
    return torch.stack(rows).view(q.size(0), q.size(2), H, D).transpose(1, 2)


def check(
    reach: Reach, qkv: tuple[Tensor, Tensor, Tensor], window: int, ids: Tensor | None = None
) -> None:
    """Results and gradients of `reach` are those of the loop."""
    wanted = loop(*qkv, window, ids)
    got = reach.attend(*qkv, 0.0)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((wanted * weights).sum(), qkv)
    found = torch.autograd.grad((got * weights).sum(), qkv)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 4, 5, 8, 11, 17])
@pytest.mark.parametrize("window", [0, 1, 2, 4, 5])
def test_a_window_equals_the_loop(window: int, length: int, mechanism: str) -> None:
    """Guards: a band one token too wide or narrow, or a block that misses its neighbour's keys."""
    reach = Reach.of(window, length, CPU)
    assert bool(reach.block) == (mechanism == "blocks" and 0 < window < length)
    check(reach, some_qkv(length), window)


@pytest.mark.parametrize("length", [2, 4, 9, 13])
@pytest.mark.parametrize(("window", "past"), [(0, 3), (4, 1), (4, 3), (6, 5), (16, 3)])
def test_a_chunk_equals_the_loop(window: int, past: int, length: int, mechanism: str) -> None:
    """Guards: the keys of the past counted as this chunk's, or padding taken for a key."""
    check(Reach.of(window, length, CPU, past=past), some_qkv(length, past), window)


@pytest.mark.parametrize("longest_masked_row", [0, 256])
@pytest.mark.parametrize("window", [0, 1, 3, 5, 8])
def test_a_window_ends_at_the_document(
    window: int, longest_masked_row: int, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a band that reaches into the document before, by each way of computing it."""
    monkeypatch.setattr(segments, "_LONGEST_MASKED_ROW", longest_masked_row)
    ids = torch.tensor([[-1] * 7 + [0] * 1 + [1] * 4, [0] * 3 + [2] * 2 + [5] * 7])
    reach = Reach.of(window, 12, CPU, segments=Segments.of(ids))
    assert (reach.lengths is not None) == (longest_masked_row == 0 and window in (0, 8))
    check(reach, some_qkv(12), window, ids)


def test_blocks_are_chosen_where_they_compute_less() -> None:
    """Guards: a dense mask of a long row, or blocks that compute more than it would."""
    assert Reach.of(256, 2048, CPU).block == 256
    assert Reach.of(256, 768, CPU).block == 256
    assert Reach.of(256, 512, CPU).block == 0
    assert Reach.of(2, 1024, CPU).block == 16
    assert Reach.of(1024, 1024, CPU) == Reach()


def test_dropout_is_applied(mechanism: str) -> None:
    """Guards: attention dropout lost in one of the ways."""
    q, k, v = some_qkv(12)
    reach = Reach.of(4, 12, CPU)
    torch.manual_seed(0)
    first, second = (reach.attend(q, k, v, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(reach.attend(q, k, v, 0.5), first)


WINDOWED = {**PRESETS["gpt2"], "n_layer": 3, "n_head": 2, "n_embd": 8, "block_size": 24}


def some_model(**more: object) -> GPT:
    model = GPT(ModelConfig(**{**WINDOWED, "dropout": 0.0, **more}), 30)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.4, generator=generator)
    return model


def test_each_layer_has_its_window(mechanism: str) -> None:
    """Guards: one window for all layers, or the pattern that starts at another layer."""
    tokens = torch.randint(0, 30, (1, 24), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 30
    for window, reached in [([3], 5 + 3 * 2), ([2, 5, 3], 5 + 1 + 4 + 2), ([3, 0], 23), ([1], 5)]:
        model = some_model(window=window).requires_grad_(False)
        moved = (model(tokens) - model(changed)).abs().amax(-1)[0].nonzero()[:, 0].tolist()
        assert moved == list(range(5, reached + 1))
    layers = [some_model(window=w)(tokens) for w in ([4, 0, 4], [4, 0], [0, 4])]
    assert torch.equal(layers[0], layers[1])
    assert not torch.allclose(layers[1], layers[2])


def test_a_compiled_graph_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a graph that breaks on a window or a scaling, with and without segments."""
    monkeypatch.setattr(band, "_SMALLEST_BLOCK", 1)
    tokens = torch.randint(0, 30, (2, 24), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0] * 9 + [1] * 15, [0] * 20 + [1] * 4])
    scaling = {"kind": "dynamic", "factor": 2.0, "original_block_size": 12}
    settings = {"n_layer": 2, "window": [10, 5], "position": "rope", "rope_scaling": scaling}
    model = some_model(**settings).requires_grad_(False)  # one layer dense, the other in blocks
    compiled = torch.compile(model.hidden, backend="eager", fullgraph=True)
    for given in (None, ids):
        expected = model.hidden(tokens, segments=given)
        torch.testing.assert_close(compiled(tokens, segments=given), expected)


def test_bf16(mechanism: str) -> None:
    """Guards: a mask or padding whose type attention refuses under autocast."""
    tokens = torch.randint(0, 30, (2, 24), generator=torch.Generator().manual_seed(1))
    model = some_model(window=[0, 5]).requires_grad_(False)
    expected = model.loss(tokens, tokens.roll(-1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, tokens.roll(-1, 1))
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.0)
