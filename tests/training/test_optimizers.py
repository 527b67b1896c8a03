"""Muon and AdamW: which parameter is updated how, and state that comes back by name."""

import re
from typing import Any

import pytest
import torch

from gptcli.config.finetune_schema import LoraConfig
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.errors import CheckpointError
from gptcli.model.gpt import GPT, initialise
from gptcli.model.lora import adapter_tensors, add_lora
from gptcli.training import optimizers
from gptcli.training.optimizers import Optimizer, orthogonalise, part_heights, peak_rate
from gptcli.training.readings import update_ratio, watched_weights
from gptcli.training.trainable import as_finetuned


def model(**keys: Any) -> GPT:
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 16, "block_size": 8}
    made = GPT(ModelConfig.model_validate({**sizes, **keys}), 32)
    initialise(made, torch.Generator().manual_seed(0))
    return made


def set_gradients(of: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in of.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights(of: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in of.named_parameters()}


def optimizer(of: GPT, **keys: Any) -> Optimizer:
    return Optimizer(of, Config.model_validate({"model": of.config, "optimizer": keys}).optimizer)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 64, 16), (2, 16, 64), (1, 48, 48)])
def test_orthogonalise(shape: tuple[int, int, int]) -> None:
    """Bug: the update is not near-orthogonal, or transposed for tall matrices."""
    u, _, v = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(1)), full_matrices=False
    )
    # Condition 20 and less: five steps lift no singular value that is nearly zero.
    x = u @ torch.diag_embed(torch.logspace(0.0, -1.3, u.size(2))) @ v
    for scale in (1.0, 1e-4, 1e4):
        y = orthogonalise(x * scale)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        values = torch.linalg.svdvals(y)
        assert values.min() > 0.6
        assert values.max() < 1.3
    # The same singular vectors: the product with the exact polar factor is near the identity.
    assert ((u @ v) * orthogonalise(x)).sum() / (y.norm() * (u @ v).norm()) > 0.95


def test_zero_gradient() -> None:
    """Bug: a matrix without gradient (behind a zero projection) becomes NaN."""
    assert orthogonalise(torch.zeros(1, 4, 8)).abs().max() == 0.0


def test_parts_are_apart() -> None:
    """Bug: q, k and v (gate and value) are orthogonalised as one matrix, so one starves another."""
    made = model()
    names = ["blocks.0.attn.qkv.weight", "blocks.0.mlp.up.weight", "blocks.1.mlp.proj.weight"]
    inner = made.config.inner_size
    heights = part_heights(made, names)
    assert [heights[name] for name in names] == [[16, 8, 8], [inner, inner], [16]]
    plain = model(gated=False)
    assert part_heights(plain, [names[1]])[names[1]] == [plain.config.inner_size]
    set_gradients(made, 1)
    weight = made.get_parameter(names[0])
    assert weight.grad is not None
    weight.grad[:16] *= 1e4  # huge for q, ordinary for k and v
    before = weights(made)
    optimizer(made, momentum=0.0, lr=0.01).step(1.0)
    change = (before[names[0]] - weight.detach()) / 0.01
    for part in change.split([16, 8, 8]):
        values = torch.linalg.svdvals(part)
        assert values.min() > 0.6
        assert values.max() < 1.3
    tall = (before[names[1]] - made.get_parameter(names[1]).detach()) / 0.01
    stretched = (inner / 16) ** 0.5  # a tall part moves by sqrt(rows / columns) more
    values = torch.linalg.svdvals(tall[:inner])
    assert 0.6 * stretched < values.min() <= values.max() < 1.3 * stretched


def test_momentum() -> None:
    """Bug: Nesterov momentum is plain momentum, or is lost between steps."""
    made = model()
    name = "blocks.0.attn.proj.weight"
    stepper = optimizer(made, momentum=0.9, lr=0.01)
    buffer = torch.zeros(16, 16)
    for seed in (1, 2, 3):
        set_gradients(made, seed)
        before, gradient = weights(made)[name], made.get_parameter(name).grad
        assert gradient is not None
        buffer = 0.9 * buffer + 0.1 * gradient
        direction = 0.1 * gradient + 0.9 * buffer
        stepper.step(0.5)
        expected = before - 0.005 * orthogonalise(direction[None])[0]
        torch.testing.assert_close(made.get_parameter(name).detach(), expected)


def test_rates_of_the_groups() -> None:
    """Bug: a group runs at another group's rate, or ignores the schedule."""
    made = model(tie_embeddings=False)
    set_gradients(made, 1)
    before = weights(made)
    optimizer(made, lr=0.02, adamw_lr=0.003, embedding_lr=0.05).step(0.5)
    change = {n: (before[n] - p.detach()).abs().max().item() for n, p in made.named_parameters()}
    # The first AdamW step is the sign of the gradient times the rate.
    assert change["wte.weight"] == pytest.approx(0.025, rel=1e-3)
    assert change["head.weight"] == pytest.approx(0.0015, rel=1e-3)
    assert change["norm.weight"] == pytest.approx(0.0015, rel=1e-3)
    assert change["blocks.0.norm1.weight"] == pytest.approx(0.0015, rel=1e-3)
    set_gradients(made, 2)
    before = weights(made)
    optimizer(made, kind="adamw", lr=0.01, weight_decay=0.0).step(0.3)
    for name, parameter in made.named_parameters():
        change[name] = (before[name] - parameter.detach()).abs().max().item()
        assert change[name] == pytest.approx(0.003, rel=1e-3), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_decay_of_matrices_only(kind: str, tied: bool) -> None:
    """Bug: norms and biases decay to zero, or a tied matrix decays twice."""
    made = model(bias=True, norm="layernorm", tie_embeddings=tied)
    for parameter in made.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    settings = {"lr": 0.1, "adamw_lr": 0.1, "embedding_lr": 0.1, "weight_decay": 0.5}
    optimizer(made, kind=kind, **settings).step(1.0)
    for parameter in made.parameters():
        expected = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_state_comes_back(kind: str, tied: bool) -> None:
    """Bug: moments are given to the wrong parameter, or the bias correction starts anew."""
    one, two = model(tie_embeddings=tied), model(tie_embeddings=tied)
    first, second = optimizer(one, kind=kind), optimizer(two, kind=kind)
    for seed in (1, 2, 3):
        set_gradients(one, seed)
        first.step(1.0)
    first.zero_grad()
    assert all(p.grad is None for p in one.parameters())
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert "wte.weight.exp_avg" in saved
    assert ("blocks.1.attn.qkv.weight.momentum" in saved) == (kind == "muon")
    two.load_state_dict(one.state_dict())
    second.load_state_dict(dict(reversed(saved.items())))  # by name, so the order is nothing
    for seed in (4, 5):
        for of, stepper in ((one, first), (two, second)):
            set_gradients(of, seed)
            stepper.step(0.7)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert saved.keys() == second.state_dict().keys()


@pytest.mark.parametrize(("fused", "step_on"), [(("meta",), "meta"), ((), "cpu")])
def test_state_goes_where_the_kernel_is(
    monkeypatch: pytest.MonkeyPatch, fused: tuple[str, ...], step_on: str
) -> None:
    """Bug: after a resume on a GPU the fused kernel finds its count of steps on the CPU. A device
    without memory stands for the GPU."""
    saved = model()
    first = optimizer(saved)
    set_gradients(saved, 1)
    first.step(1.0)
    monkeypatch.setattr(optimizers, "_FUSED", fused)
    second = optimizer(model().to("meta"))
    second.load_state_dict(first.state_dict())
    for name, value in second.state_dict().items():
        assert value.device.type == (step_on if name.endswith(".step") else "meta"), name


def test_state_that_does_not_fit() -> None:
    """Bug: the optimizer of another model is loaded, and training goes on with nonsense."""
    made = model()
    stepper = optimizer(made)
    set_gradients(made, 1)
    stepper.step(1.0)
    good = stepper.state_dict()
    bad: list[tuple[dict[str, torch.Tensor], str]] = [
        (
            {**good, "wte.weight.exp_avg": torch.zeros(3)},
            r"wte\.weight\.exp_avg has another shape",
        ),
        ({**good, "blocks.9.mlp.up.weight.momentum": torch.zeros(1)}, "unknown parameters: blocks"),
        (
            {k: v for k, v in good.items() if k != "blocks.0.mlp.up.weight.momentum"},
            r"blocks\.0\.mlp\.up\.weight\.momentum is missing",
        ),
        (
            {**good, "blocks.0.mlp.up.weight.momentum": torch.zeros(2, 2)},
            r"blocks\.0\.mlp\.up\.weight\.momentum is missing or misshapen",
        ),
        *(
            ({**good, name: good[name].to(torch.int64)}, f"{re.escape(name)} holds int64, not")
            for name in ("blocks.0.mlp.up.weight.momentum", "wte.weight.exp_avg", "wte.weight.step")
        ),
        (
            {k: v for k, v in good.items() if k != "wte.weight.exp_avg"},
            r"wte\.weight\.exp_avg is missing",
        ),
    ]
    for state, problem in bad:
        with pytest.raises(CheckpointError, match=problem):
            optimizer(made).load_state_dict(state)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_apply(kind: str) -> None:
    """Guards: a device that decides for itself whether to update, and updates otherwise than told:
    NaN gradients that leak into weights or state, or a second way to compute the same update."""
    straight, told = model(), model()
    one = optimizer(straight, kind=kind, weight_decay=0.1)
    other = optimizer(told, kind=kind, weight_decay=0.1)
    for seed in (1, 2):
        set_gradients(straight, seed)
        one.step(1.0)
        set_gradients(told, seed)
        other.step(1.0, torch.tensor(True))
        state = {name: value.clone() for name, value in other.state_dict().items()}
        before = {name: value.clone() for name, value in weights(told).items()}
        for parameter in told.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        other.step(1.0, torch.tensor(False))
        for name, value in weights(told).items():
            assert torch.equal(value, before[name]), name
        for name, value in other.state_dict().items():
            assert torch.equal(value, state[name]), name
    for name, value in weights(straight).items():
        torch.testing.assert_close(weights(told)[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_adapters(kind: str) -> None:
    """Guards: frozen weights that decay or get state, adapters that Muon orthogonalises, a reading
    of weights that cannot move."""
    made = model()
    add_lora(made, LoraConfig(rank=2), torch.Generator().manual_seed(1))
    stepper = optimizer(made, kind=kind, lr=0.01, adamw_lr=0.01)
    before, old = weights(made), watched_weights(made)
    for _ in range(4):  # zero projections, then B, hold back what is before them
        made.loss(torch.arange(8)[None], torch.arange(8)[None]).backward()
        stepper.step(1.0)
        stepper.zero_grad()
    moved = {n for n, p in made.named_parameters() if not torch.equal(before[n], p)}
    assert moved == set(adapter_tensors(made))
    state = stepper.state_dict()
    assert {name.rpartition(".")[0] for name in state} == moved
    assert all(name.endswith(("exp_avg", "exp_avg_sq", "step")) for name in state)
    assert 1e-5 < update_ratio(old, made).item() < 1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_rate_that_is_shown(kind: str, method: str) -> None:
    """Guards: a rate in the log at which no weight learns."""
    config = Config.model_validate(
        {
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8},
            "finetune": {"method": method},
            "optimizer": {"kind": kind, "lr": 0.5, "adamw_lr": 0.25},
        }
    )
    made = GPT(config.model, 16)
    as_finetuned(made, config.finetune)
    rates = {group.peak for group in Optimizer(made, config.optimizer)._adamw.groups}
    if kind == "muon" and method == "full":
        rates = {0.5}  # of the hidden matrices, which are in no group of AdamW
    assert rates == {peak_rate(config)}
