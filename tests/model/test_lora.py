"""Adapters against the formula, merged against not merged, int8 against fp32."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.config.finetune_schema import LoraConfig
from gptcli.config.model_schema import ModelConfig
from gptcli.model import kernels
from gptcli.model.gpt import GPT, initialise
from gptcli.model.lora import adapter_shapes, adapter_tensors, add_lora, has_lora, merge_lora
from gptcli.model.lora_linear import LoraLinear

VOCAB = 40


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(preset: str = "modern", **keys: Any) -> GPT:
    tiny = {"preset": preset, "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
    made = GPT(ModelConfig.model_validate({**tiny, **keys}), VOCAB)
    initialise(made, seeded())
    with torch.no_grad():  # zero output projections would hide errors
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(1)) * 0.05)
    return made


def adapted(preset: str = "modern", settings: LoraConfig | None = None, **keys: Any) -> GPT:
    """A model whose adapters have learned something."""
    made = model(preset, **keys)
    add_lora(made, settings or LoraConfig(rank=3), seeded(2))
    with torch.no_grad():
        for name, tensor in adapter_tensors(made).items():
            if name.endswith("lora_b"):
                tensor.copy_(torch.randn(tensor.shape, generator=seeded(3)) * 0.1)
    return made


def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, 12), generator=seeded(4))


def oracle(layer: LoraLinear, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The formula of the paper, in fp64."""
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x, layer.weight.double(), bias) + layer.factor * ((x @ a.T) @ b.T)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_formula(monkeypatch: pytest.MonkeyPatch, bias: bool, composed: bool) -> None:
    """Guards: a scale left out of one gradient, rows of a batch that are mixed up, in the written
    out gradients and in the composed form."""
    if composed:
        monkeypatch.setattr(kernels, "fits", lambda x: False)
    linear = nn.Linear(6, 10, bias=bias)
    layer = LoraLinear(linear, LoraConfig(rank=2, alpha=5.0), seeded())
    with torch.no_grad():
        layer.lora_b.copy_(torch.randn(10, 2, generator=seeded(1)))
    x = torch.randn(2, 3, 6, generator=seeded(2), requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, layer.lora_a, layer.lora_b)]
    y, wanted = layer(x), oracle(layer, *wide)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn(y.shape, generator=seeded(5))
    found = torch.autograd.grad((y * weights).sum(), (x, layer.lora_a, layer.lora_b))
    expected = torch.autograd.grad((wanted * weights).sum(), wide)
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-5)


def test_gate_computed_again() -> None:
    """Guards: gradients that are not those of the gate and the layer one after the other."""
    layer = LoraLinear(nn.Linear(6, 4), LoraConfig(rank=2), seeded())
    with torch.no_grad():
        layer.lora_b.copy_(torch.randn(4, 2, generator=seeded(1)))
    h = torch.randn(2, 3, 12, generator=seeded(2), requires_grad=True)
    for of in ((h,), (layer.lora_a,), (layer.lora_b,)):
        found, wanted = (
            torch.autograd.grad(y.square().sum(), of)[0]
            for y in (layer.of_gated(h), layer(F.silu(h[..., :6]) * h[..., 6:]))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["gpt1", "gpt2", "llama", "modern"])
def test_fresh_adapters_change_nothing(preset: str) -> None:
    """Guards: a run that does not begin at its base, base weights that are called otherwise or
    learn, a head that still makes a gradient."""
    plain, made = model(preset), model(preset)
    add_lora(made, LoraConfig(), seeded())
    names = set(adapter_tensors(made))
    assert set(made.state_dict()) - names == set(plain.state_dict())
    assert {n for n, p in made.named_parameters() if p.requires_grad} == names
    shapes = {name: tuple(t.shape) for name, t in adapter_tensors(made).items()}
    assert adapter_shapes(plain, LoraConfig()) == shapes
    torch.testing.assert_close(made(tokens()), plain(tokens()), rtol=0, atol=0)
    made.train().loss(tokens(), tokens()).backward()
    assert {n for n, p in made.named_parameters() if p.grad is not None} == names


def test_drawn_as_peft_draws() -> None:
    """Guards: an A of another size than the one that published rates are for, or not from the
    generator."""
    linear = nn.Linear(400, 8)
    layer = LoraLinear(linear, LoraConfig(rank=50), seeded(7))
    reference = torch.empty(50, 400)
    nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert layer.lora_a.abs().max().item() <= 1 / 20
    assert layer.lora_a.std().item() == pytest.approx(reference.std().item(), rel=0.05)
    again = LoraLinear(linear, LoraConfig(rank=50), seeded(7))
    assert torch.equal(layer.lora_a, again.lora_a)
    assert not layer.lora_b.any()


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("preset", ["gpt2", "llama", "modern"])
def test_merged(preset: str, quantize: Any) -> None:
    """Guards: a merged model that is not the one that was trained, int8 or not."""
    made = adapted(preset, LoraConfig(rank=3, layers=["mlp.up", "attn.qkv"], quantize=quantize))
    before = made(tokens())
    assert has_lora(made)
    merge_lora(made)
    assert not has_lora(made)
    torch.testing.assert_close(made(tokens()), before, rtol=1e-5, atol=1e-5)
    assert set(made.state_dict()) == set(model(preset).state_dict())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in made.parameters())


@pytest.mark.parametrize("composed", [False, True])
def test_int8(monkeypatch: pytest.MonkeyPatch, composed: bool) -> None:
    """Guards: a frozen matrix that is kept in fp32, or one whose scales get lost on the way there
    or back."""
    if composed:
        monkeypatch.setattr(kernels, "fits", lambda x: False)
    plain, small = adapted(), adapted(settings=LoraConfig(rank=3, quantize="int8"))
    assert small.get_parameter("blocks.0.mlp.up.weight").dtype == torch.int8
    assert small.parameter_count() == plain.parameter_count()
    losses = [made.train().loss(tokens(), tokens()) for made in (plain, small)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-3)
    for loss in losses:
        loss.backward()
    for name in ("blocks.0.attn.qkv.lora_a", "blocks.1.mlp.proj.lora_b"):
        wanted, found = plain.get_parameter(name).grad, small.get_parameter(name).grad
        assert wanted is not None
        assert found is not None
        assert torch.linalg.vector_norm(found - wanted) < 0.1 * torch.linalg.vector_norm(wanted)


def test_dropout() -> None:
    """Guards: dropout that falls on the base, or stays on when the model answers."""
    made = adapted(settings=LoraConfig(rank=3, dropout=0.5))
    same = copy.deepcopy(made)
    merge_lora(same)
    torch.testing.assert_close(made.eval()(tokens()), same.eval()(tokens()), rtol=1e-5, atol=1e-5)
    layer = made.train().get_submodule("blocks.0.mlp.up")
    assert isinstance(layer, LoraLinear)
    x = torch.randn(5, 16, generator=seeded())
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.lora_b.zero_()
    assert torch.equal(layer(x), layer(x))


def test_recomputed() -> None:
    """Guards: gradients that activation checkpointing changes."""
    made = adapted().train()
    made.loss(tokens(), tokens()).backward()
    kept = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    made.zero_grad(set_to_none=True)
    made.recompute = True
    made.loss(tokens(), tokens()).backward()
    for name, gradient in kept.items():
        assert torch.equal(gradient, made.get_parameter(name).grad)
