"""The document mask against each document run through the model by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.model import segments as segments_module
from gptcli.model.band import Reach
from gptcli.model.gpt import GPT
from gptcli.model.loss import IGNORED
from gptcli.model.segments import Segments

V, T = 50, 12
MODERN = {**PRESETS["modern"], "n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": T}
GPT2 = {**PRESETS["gpt2"], "n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": T, "dropout": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "rope-qk-norm": MODERN,
    "rope": {**MODERN, "qk_norm": False},
    "gqa": {**MODERN, "n_kv_head": 2},
    "mqa": {**MODERN, "n_kv_head": 1},
    "learned": GPT2,
    "sinusoidal-post-norm": {**GPT2, "norm_position": "post", "position": "sinusoidal"},
    "no-positions": {**MODERN, "position": "none"},
    "window": {**MODERN, "window": 4},
    "alternating-windows": {**GPT2, "window": [0, 4]},
    "yarn": {
        **MODERN,
        "rope_scaling": {"kind": "yarn", "factor": 2.0, "original_block_size": 6},
    },
    "dynamic": {
        **MODERN,
        "rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_block_size": 5},
    },
}
LENGTHS = [[5, 1, 6], [12], [4, 8], [1] * 12]  # of the documents in each row


@pytest.fixture(params=["mask", "calls"])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing the same attention, which the length of the rows chooses between."""
    longest = 0 if request.param == "calls" else T
    monkeypatch.setattr(segments_module, "_LONGEST_MASKED_ROW", longest)
    return str(request.param)


def random_model(settings: dict[str, Any]) -> GPT:
    model = GPT(ModelConfig(**settings), V)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        mean = 0.5 if parameter.ndim == 1 else 0.0
        parameter.data.normal_(mean, 0.3, generator=generator)
    return model


def some_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and segments (4, T)."""
    tokens = torch.randint(0, V, (4, T), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, dims=1)
    targets[:, ::5] = IGNORED
    ids = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in LENGTHS]
    return tokens, targets, torch.stack(ids)


def documents(rows: Tensor) -> list[Tensor]:
    """Each document as a batch of one."""
    return [part[None] for row, n in zip(rows, LENGTHS, strict=True) for part in row.split(n)]


def gradients(model: GPT) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_are_those_of_each_document_alone(name: str, mechanism: str) -> None:
    """Guards: attention into another document, positions that run on, or a gradient that leaks."""
    model = random_model(VARIANTS[name])
    tokens, targets, segments = some_rows()
    alone = torch.cat([model(part) for part in documents(tokens)], dim=1)
    together = model(tokens, segments=segments)
    torch.testing.assert_close(together.flatten(0, 1), alone[0], rtol=1e-5, atol=1e-5)

    parts = zip(documents(tokens), documents(targets), strict=True)
    expected_loss = torch.stack([model.loss(part, wanted) for part, wanted in parts]).sum()
    expected_loss.backward()
    expected = gradients(model)
    loss = model.loss(tokens, targets, segments)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    # As close as fp32 sums in another order come: relative to the largest gradient.
    for got, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_other_documents_change_nothing(mechanism: str) -> None:
    """Guards: a mask that is right on average, as a leak of one position at a border would be."""
    model = random_model(MODERN).requires_grad_(False)
    tokens, _, segments = some_rows()
    before = model(tokens, segments=segments)
    changed = tokens.clone()
    changed[0, :5] = (changed[0, :5] + 7) % V  # the first document of the first row
    after = model(changed, segments=segments)
    assert torch.equal(after[0, 5:], before[0, 5:])
    assert torch.equal(after[1:], before[1:])
    assert not torch.allclose(after[0, 1:5], before[0, 1:5])


@pytest.mark.parametrize("padding", [0, 1])
def test_padding_at_the_end_is_harmless(mechanism: str, padding: int) -> None:
    """Guards: padding that is seen, whether counted as the last document's or as one of its own."""
    model = random_model(MODERN)
    tokens, targets, segments = some_rows()
    tokens, targets, segments = tokens[:1, :9], targets[:1, :9], segments[:1, :9]
    expected = model.loss(tokens, targets, segments)
    room = torch.zeros(1, 3, dtype=torch.int64)
    loss = model.loss(
        torch.cat([tokens, room], dim=1),
        torch.cat([targets, room + IGNORED], dim=1),
        torch.cat([segments, room + segments[0, -1] + padding], dim=1),
    )
    torch.testing.assert_close(loss, expected)


def test_one_document_a_row_is_the_plain_path(mechanism: str) -> None:
    """Guards: a document mask that changes what a row of one document gives."""
    model = random_model(GPT2).requires_grad_(False)
    tokens, _, _ = some_rows()
    # A row that goes on with a document of the row before has -1 there.
    got = model(tokens, segments=torch.full_like(tokens, -1))
    torch.testing.assert_close(got, model(tokens), rtol=1e-5, atol=1e-5)


def test_positions_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: segments of two rows that have the same number taken for one."""
    ids = torch.tensor([[-1, -1, 0, 0, 0], [0, 1, 1, 4, 4]])
    masked = Segments.of(ids)
    assert masked.positions.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]
    assert masked.sizes().tolist() == [[2, 2, 3, 3, 3], [1, 2, 2, 2, 2]]
    assert masked.lengths is None
    reach = Reach.of(0, 5, ids.device, segments=masked)
    assert reach.mask is not None
    assert reach.mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    monkeypatch.setattr(segments_module, "_LONGEST_MASKED_ROW", 4)
    called = Segments.of(ids)
    assert called.lengths == [2, 3, 1, 2, 2]
    assert Reach.of(0, 5, ids.device, segments=called) == Reach(lengths=called.lengths)


def test_dropout_is_applied_to_attention(mechanism: str) -> None:
    """Guards: attention dropout lost with a document mask, or kept in evaluation."""
    model = random_model({**MODERN, "dropout": 0.3}).requires_grad_(False)
    tokens, _, segments = some_rows()
    attention = model.blocks[0].attn
    x = model.wte(tokens)
    known = Reach.of(0, T, tokens.device, segments=Segments.of(segments))
    first, second = (attention.train()(x, None, None, 0, known) for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (attention.eval()(x, None, None, 0, known) for _ in range(2))
    assert torch.equal(first, second)


def test_bf16(mechanism: str) -> None:
    """Guards: a mask or table whose type attention refuses under autocast."""
    model = random_model(MODERN).requires_grad_(False)
    tokens, targets, segments = some_rows()
    expected = model.loss(tokens, targets, segments)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, targets, segments)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.0)


def test_a_compiled_graph_gives_the_same(mechanism: str) -> None:
    """Guards: a graph that breaks on segments, or is made anew for every batch."""
    model = random_model(MODERN).requires_grad_(False)
    compiled = torch.compile(model.hidden, backend="eager", fullgraph=True)
    tokens, _, segments = some_rows()
    for given in (None, segments, segments.flip(0)):
        expected = model.hidden(tokens, segments=given)
        torch.testing.assert_close(compiled(tokens, segments=given), expected)


def test_no_segments_with_a_cache_or_another_shape() -> None:
    """Guards: a decode that silently ignores its documents; segments of another batch."""
    model = random_model(MODERN).requires_grad_(False)
    tokens, _, segments = some_rows()
    with pytest.raises(ValueError, match="no cache"):
        model(tokens, model.new_cache(4), segments=segments)
    with pytest.raises(ValueError, match="shape of the tokens"):
        model(tokens, segments=segments[:, :-1])
