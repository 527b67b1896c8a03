"""Log-likelihoods of texts against the logits written out."""

import pytest
import torch

from gptcli.config.model_schema import ModelConfig
from gptcli.model import likelihood
from gptcli.model.gpt import GPT
from gptcli.model.likelihood import log_likelihoods
from gptcli.model.loss import IGNORED


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_values_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a chunk of logits, an ignored target or a row without targets counts for another row, or
    the gradient is not that of the value."""
    monkeypatch.setattr(likelihood, "chunk_rows", lambda *_: chunk)
    net = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, tie_embeddings=True), 30)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    tokens = torch.randint(30, (3, 8), generator=generator)
    targets = torch.randint(30, (3, 8), generator=generator)
    targets[0, :5], targets[1] = IGNORED, IGNORED
    weights = torch.tensor([1.0, 2.0, -3.0])

    of_all = net(tokens).log_softmax(-1).gather(2, targets.clamp_min(0)[..., None])[..., 0]
    expected = (of_all * (targets != IGNORED)).sum(1)
    gradients = torch.autograd.grad(expected @ weights, list(net.parameters()))

    found = log_likelihoods(net, tokens, targets)
    assert torch.allclose(found, expected, atol=1e-5)
    assert found[1] == 0
    own = torch.autograd.grad(found @ weights, list(net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own, gradients, strict=True))


def test_no_target() -> None:
    """Bug: rows of which nothing is trained end in an error."""
    net = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8), 30)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    assert log_likelihoods(net, tokens, torch.full_like(tokens, IGNORED)).tolist() == [0, 0]


def test_mixed_precision() -> None:
    """Bug: in bf16 the gradient is computed in another dtype than the value, or fails."""
    net = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8), 30)
    tokens = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(0))
    log_likelihoods(net, tokens, tokens).sum().backward()
    exact = net.head.weight.grad
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rough = log_likelihoods(net, tokens, tokens)
    rough.sum().backward()
    assert rough.dtype == torch.float32
    assert exact is not None
    assert net.head.weight.grad is not None
    assert torch.allclose(net.head.weight.grad, exact, atol=0.02 * float(exact.abs().max()))
