"""Gradient clipping."""

import pytest
import torch

from gptcli.training.clipping import clip_gradients


@pytest.mark.parametrize("most", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("scale", [1.0, float("inf")])
def test_like_torch(most: float, scale: float) -> None:
    """Bug: a norm of something else, or gradients that are scaled though they are small."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3, n, generator=generator)) for n in (2, 5)]
    for parameter in ours:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    ours.append(torch.nn.Parameter(torch.ones(2)))  # of no part in the loss
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for own, other in zip(ours, theirs, strict=True):
        other.grad = None if own.grad is None else own.grad.clone()
    before = [p.grad.clone() for p in ours[:2] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(theirs, most or float("inf"))
    assert torch.equal(clip_gradients(ours, most), norm)
    if scale == 1.0:
        for own, other in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=0.0)
    if most != 0.5:
        kept = zip(ours[:2], before, strict=True)
        assert scale != 1.0 or all(torch.equal(p.grad, g) for p, g in kept if p.grad is not None)
