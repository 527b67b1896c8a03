"""Gradients written by hand, against numerical ones and the composed forms."""

import pytest
import torch
import torch.nn.functional as F

from gptcli.config.model_schema import ModelConfig
from gptcli.model import kernels
from gptcli.model.gpt import GPT, initialise


def drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.double, generator=generator).requires_grad_()


def test_gradients() -> None:
    """Guards: a wrong term in a gradient, checked by finite differences in fp64."""
    x, weight = drawn(3, 4, 6), drawn(6)
    assert torch.autograd.gradcheck(lambda a, w: kernels.rms_norm(a, w, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(kernels.silu_gate, (drawn(3, 10),))


def test_no_second_derivatives() -> None:
    """Guards: a gradient of the gradient that is silently wrong."""
    rope = torch.ones(2, 5, 4, dtype=torch.double)
    x, qkv = drawn(3, 6), drawn(2, 5, 5 * 8)
    weight, weights = drawn(6).detach(), drawn(4, 8).detach()
    cases = [
        (x, kernels.rms_norm(x, weight, 1e-6)),
        (x, kernels.silu_gate(x)),
        (qkv, kernels.norm_and_rotate(qkv, weights, rope, 1e-6)[0]),
    ]
    for start, y in cases:
        (gradient,) = torch.autograd.grad(y.square().sum(), start, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.sum().backward()


@pytest.mark.parametrize("rows", [(), (2,)])  # one table for all rows of the batch, or one each
def test_gradient_of_norm_and_rotate(rows: tuple[int, ...]) -> None:
    """Guards: heads, halves or angles mixed up, with grouped keys and with restarting positions."""
    angles = drawn(*rows, 5, 4).detach()
    rope = torch.stack([angles.cos(), angles.sin()])
    qkv, weights = drawn(2, 5, (3 + 1 + 1) * 8), drawn(4, 8)
    assert torch.autograd.gradcheck(
        lambda a, w: kernels.norm_and_rotate(a, w, rope, 1e-6), (qkv, weights)
    )


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("segmented", [False, True])
def test_the_model_is_the_same(
    monkeypatch: pytest.MonkeyPatch, n_kv_head: int, segmented: bool
) -> None:
    """Guards: a decoder that computes something else where the kernels stand in."""
    config = ModelConfig(n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=32, block_size=16)
    model = GPT(config, 50)
    initialise(model, torch.Generator().manual_seed(1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.3, generator=torch.Generator().manual_seed(2))
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(3))
    segments = torch.tensor([[0] * 5 + [1] * 11, [0] * 12 + [1] * 4]) if segmented else None

    def computed() -> tuple[torch.Tensor, ...]:
        loss = model.loss(tokens, tokens.roll(-1, 1), segments)
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    own = computed()
    monkeypatch.setattr(kernels, "fits", lambda x: False)
    for name, value, expected in zip(
        ["loss", *dict(model.named_parameters())], own, computed(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_where_they_fit() -> None:
    """Guards: kernels for fp32 that are used in half precision, under autocast or in a graph."""
    x = torch.ones(2, 4)
    assert kernels.fits(x)
    assert not kernels.fits(x.bfloat16())
    assert not kernels.fits(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.fits(x)


def test_norm_of_rows_far_apart() -> None:
    """Guards: squares that overflow, or an eps that is left out for a row of zeros."""
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e15)])
    expected = F.rms_norm(x, (8,), torch.ones(8), 1e-6)
    torch.testing.assert_close(kernels.rms_norm(x, torch.ones(8), 1e-6), expected)
