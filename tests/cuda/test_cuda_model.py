"""The model on a GPU against double precision on the CPU: logits, loss, gradients, greedy texts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, autocast
from gptcli.generation.engine import Request, decode, generate_samples
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT, initialise
from gptcli.training.optimizers import Optimizer

VOCAB, ROWS, TIME = 256, 3, 40
PRESETS: dict[str, dict[str, Any]] = {
    "modern": {"preset": "modern", "n_kv_head": 2},
    "gpt2": {"preset": "gpt2"},
    "gpt1": {"preset": "gpt1"},
    "gpt3": {"preset": "gpt3-small", "window": [0, 16]},
}
IGNORED = -100

pytestmark = pytest.mark.usefixtures("exact_products")


def made(preset: str) -> GPT:
    """A model on the CPU, none of whose weights is zero: zero ones hide what is behind them."""
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64}
    model = GPT(ModelConfig.model_validate({**PRESETS[preset], **sizes}), VOCAB)
    generator = torch.Generator().manual_seed(1)
    initialise(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def batch(documents: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, targets of which some carry no loss, and two documents a row where asked for."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB, (ROWS, TIME), generator=generator)
    targets = torch.randint(VOCAB, (ROWS, TIME), generator=generator)
    targets[1, 5:20] = IGNORED
    segments = (torch.arange(TIME) >= 13).long().repeat(ROWS, 1) if documents else None
    return tokens, targets, segments


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference by the norm of `b`."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_model_is_that_of_double_precision(
    preset: str, documents: bool, device: Device, record_property: Any
) -> None:
    """Another attention kernel masks, scales or rounds otherwise, or loses a chunk of the loss."""
    model = made(preset)
    tokens, targets, segments = batch(documents)
    oracle = copy.deepcopy(model).double()
    wanted_logits = oracle(tokens, segments=segments)
    wanted = functional.cross_entropy(
        wanted_logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.autograd.backward(wanted)

    model.to(device.torch)
    on = [None if x is None else x.to(device.torch) for x in (tokens, targets, segments)]
    logits = model(on[0], segments=on[2])
    loss = model.loss(*on)
    torch.autograd.backward(loss)
    gradients = [
        distance(own.grad, theirs.grad)
        for own, theirs in zip(model.parameters(), oracle.parameters(), strict=True)
        if own.grad is not None and theirs.grad is not None
    ]
    figures = {
        "logits": distance(logits, wanted_logits),
        "loss": abs(float(loss.detach()) / float(wanted.detach()) - 1),
        "gradients": max(gradients),
    }
    for name, value in figures.items():
        record_property(name, f"{value:.1e}")
    assert len(gradients) == len(list(oracle.parameters()))
    assert figures["logits"] < 1e-5
    assert figures["loss"] < 1e-5
    assert figures["gradients"] < 1e-4


@pytest.mark.parametrize("preset", ["modern", "gpt2"])
def test_bf16_is_close_to_fp32(preset: str, device: Device, record_property: Any) -> None:
    """Sums or a softmax in bf16 where they belong in fp32 cost two digits of the loss."""
    model = made(preset).to(device.torch)
    tokens, targets, _ = (None if x is None else x.to(device.torch) for x in batch(False))
    losses, gradients = [], []
    for precision in ("fp32", "bf16"):
        model.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = model.loss(tokens, targets)
        torch.autograd.backward(loss)
        assert loss.dtype == torch.float32
        losses.append(float(loss.detach()))
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    record_property("loss", f"{abs(losses[1] / losses[0] - 1):.1e}")
    record_property("gradient", f"{distance(gradients[1], gradients[0]):.1e}")
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert distance(gradients[1], gradients[0]) < 0.05


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_updates_are_those_of_double_precision(
    kind: str, device: Device, record_property: Any
) -> None:
    """A fused kernel with other defaults or a wrong step count trains, but as something else.
    Muon orthogonalises in bf16 on a GPU: its direction is right to a few hundredths."""
    keys = {"kind": kind, "lr": 0.01, "weight_decay": 0.1, "eps": 1e-8}
    config = Config.model_validate({"optimizer": keys}).optimizer
    start = made("modern")
    oracle, model = copy.deepcopy(start).double(), copy.deepcopy(start).to(device.torch)
    theirs, ours = Optimizer(oracle, config), Optimizer(model, config)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for a, b in zip(oracle.parameters(), model.parameters(), strict=True):
            gradient = torch.randn(a.shape, generator=generator)
            a.grad, b.grad = gradient.double(), gradient.to(device.torch)
        theirs.step(0.7)
        ours.step(0.7)
    for hidden in (True, False):  # what Muon updates, and what AdamW does
        moved, wanted = [], []
        named = zip(start.named_parameters(), oracle.parameters(), model.parameters(), strict=True)
        for (name, before), a, b in named:
            if (before.ndim == 2 and name.startswith("blocks.")) == hidden:
                wanted.append((a - before.double()).flatten())
                moved.append((b.cpu().double() - before.double()).flatten())
        far = distance(torch.cat(moved), torch.cat(wanted))
        record_property("matrices" if hidden else "others", f"{far:.1e}")
        assert far < (0.05 if hidden and kind == "muon" and device.kind == "cuda" else 1e-4)


@pytest.mark.parametrize("preset", ["modern", "gpt2", "gpt3"])
@pytest.mark.parametrize("speculate", [False, True])
def test_a_batch_is_that_of_the_cpu(preset: str, speculate: bool, device: Device) -> None:
    """A recorded graph repeats the lengths, rows or keys of the step that it was made from."""
    model = made(preset).eval()
    tokenizer = Tokenizer("no-end", {bytes([b]): b for b in range(VOCAB)}, r"[\s\S]", None)
    requests = [
        Request("", list(range(5, 6 + 7 * i)), Sampling(temperature=0.0, max_new_tokens=10 + 9 * i))
        for i in range(4)
    ]
    expected = list(decode(model, tokenizer, requests, speculate=speculate))
    found = list(decode(model.to(device.torch), tokenizer, requests, speculate=speculate))
    assert [[s.tokens for s in samples] for _, samples in found] == [
        [s.tokens for s in samples] for _, samples in expected
    ]


@pytest.mark.parametrize("preset", ["modern", "gpt3"])
def test_greedy_text_is_that_of_double_precision(preset: str, device: Device) -> None:
    """A cache that is one position off on the GPU still writes fluent text."""
    model = made(preset).eval()
    oracle, ids = copy.deepcopy(model).double(), [5, 17, 60]
    with torch.no_grad():
        for _ in range(40):
            ids.append(int(oracle(torch.tensor([ids]))[0, -1].argmax()))
    ranks = {bytes([b]): b for b in range(VOCAB)}
    tokenizer = Tokenizer("no-end", ranks, r"[\s\S]", None)
    settings = Sampling(temperature=0.0, max_new_tokens=40)
    texts = generate_samples(model.to(device.torch), tokenizer, ids[:3], 2, settings)
    assert [made.tokens for made in texts] == [ids[3:]] * 2
