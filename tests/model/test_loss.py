"""The chunked cross-entropy against PyTorch's over all logits."""

import pytest
import torch
import torch.nn.functional as F

from gptcli.model import loss
from gptcli.model.loss import IGNORED, linear_cross_entropy


def inputs(rows: int, width: int, vocab_size: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab_size, width, generator=generator)
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    return hidden, weight, targets


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Loss and gradients by way of all logits, in fp64."""
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    total = F.cross_entropy(x @ w.T, targets, ignore_index=IGNORED, reduction="sum")
    return total.detach(), *torch.autograd.grad(total, (x, w))


@pytest.mark.parametrize("vocab_size", [1, 17, 48])  # alone, with columns to spare, without
@pytest.mark.parametrize("rows", [1, 10, 12, 13])  # of a chunk: 4
def test_exact(monkeypatch: pytest.MonkeyPatch, rows: int, vocab_size: int) -> None:
    """Guards: a last chunk that is short, columns of padding that take probability, a gradient of
    the head that only the last chunk made."""
    monkeypatch.setattr(loss, "chunk_rows", lambda *_: 4)
    hidden, weight, targets = inputs(rows, 6, vocab_size)
    expected = reference(hidden, weight, targets)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    total = linear_cross_entropy(x, w, targets)
    found = (total, *torch.autograd.grad(total * 1.0, (x, w)))
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert linear_cross_entropy(x, w, targets).item() == total.item()


def test_scaled() -> None:
    """Guards: gradients made in the forward that forget what the loss is multiplied by."""
    hidden, weight, targets = inputs(9, 6, 20)
    _, by_x, by_w = reference(hidden, weight, targets)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    found = torch.autograd.grad(linear_cross_entropy(x, w, targets) * 0.25, (x, w))
    for value, wanted in zip(found, (by_x, by_w), strict=True):
        torch.testing.assert_close(value.double(), wanted * 0.25, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_ignored(share: float) -> None:
    """Guards: masked positions that count, and a batch of nothing else that is NaN."""
    hidden, weight, targets = inputs(16, 6, 20)
    targets[: int(16 * share)] = IGNORED
    expected = reference(hidden, weight, targets)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    total = linear_cross_entropy(x, w, targets)
    found = (total, *torch.autograd.grad(total, (x, w)))
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


def test_certain_and_impossible() -> None:
    """Guards: a loss that is infinite where a probability is too small for fp32."""
    hidden = torch.tensor([[200.0], [200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    total = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert total.item() == 400.0
    (by_hidden,) = torch.autograd.grad(total, hidden)
    assert by_hidden.flatten().tolist() == [0.0, 2.0]


def test_no_second_derivative() -> None:
    """Guards: a gradient of the gradient that is silently wrong."""
    hidden, weight, targets = inputs(9, 6, 20)
    x = hidden.requires_grad_()
    total = linear_cross_entropy(x, weight, targets) * x.sum()  # so that its gradient needs one
    (by_x,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        by_x.sum().backward()


def test_frozen_head() -> None:
    """Guards: work for, or a crash on, a head that takes no gradient."""
    hidden, weight, targets = inputs(9, 6, 20)
    _, by_x, _ = reference(hidden, weight, targets)
    (found,) = torch.autograd.grad(
        linear_cross_entropy(hidden.requires_grad_(), weight, targets), hidden
    )
    torch.testing.assert_close(found.double(), by_x, rtol=1e-5, atol=1e-6)


def test_autocast() -> None:
    """Guards: fp32 products under bf16 autocast, gradients in another dtype than the weights."""
    hidden, weight, targets = inputs(9, 6, 20)
    expected = reference(hidden, weight, targets)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(x, w, targets)
    total.backward()
    assert x.grad is not None
    assert w.grad is not None
    assert (total.dtype, x.grad.dtype, w.grad.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(total.detach().double(), expected[0], rtol=2e-2, atol=0.0)
    torch.testing.assert_close(w.grad.double(), expected[2], rtol=0.1, atol=0.05)


def test_memory_is_bounded() -> None:
    """Guards: a chunk that grows with the vocabulary, or so few rows that products are slow."""
    for vocab_size in (257, 8192, 50257, 151936, 10**9):
        rows = loss.chunk_rows(vocab_size, "cpu")
        assert rows >= 1
        assert rows * vocab_size <= 1 << 26 or rows == 1
    assert loss.chunk_rows(50257, "cpu") >= 1024
