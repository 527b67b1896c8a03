"""Measuring training speed: real steps on random tokens that leave everything as it was."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.device import Device, autocast
from gptcli.model.gpt import GPT
from gptcli.training.clipping import clip_gradients
from gptcli.training.optimizers import Optimizer
from gptcli.training.trainable import sequences_per_row

_OPTIMIZER_SHARE = 0.3  # of a probe's seconds


@dataclass(frozen=True)
class Speed:
    """Measured seconds of the parts of a step: one micro batch of `rows` rows, forward and
    backward, and one update with its clipping."""

    rows: int
    forward_backward_seconds: float
    optimizer_seconds: float


def probe_speed(
    model: GPT, config: Config, device: Device, precision: str, rows: int, seconds: float = 5.0
) -> Speed:
    """The speed of training `model` with micro batches of `rows` rows of block_size tokens.

    Takes about `seconds`, or as long as two micro batches and one update where that is more. The
    model is on `device` and has no gradients; its weights, its mode and torch's random state are
    afterwards what they were. Needs memory for a second copy of the weights besides the
    optimizer's. Raises what too large a micro batch raises (`device.is_out_of_memory`) and
    `stop.Stopped` on a stop request.
    """
    with undisturbed(model, device):
        step = micro_batch(model, config, device, precision, rows)
        forward_backward = median_seconds(step, device, seconds * (1 - _OPTIMIZER_SHARE), least=2)
        if all(parameter.grad is None for parameter in model.parameters()):
            step()
        update = _update(model, config)
        return Speed(
            rows=rows,
            forward_backward_seconds=forward_backward,
            optimizer_seconds=median_seconds(update, device, seconds * _OPTIMIZER_SHARE, least=1),
        )


def step_seconds(speed: Speed, config: Config) -> float:
    """Seconds of one optimizer step at that speed: its micro batches and the update."""
    rows = config.training.tokens_per_step // config.model.block_size
    return rows / speed.rows * speed.forward_backward_seconds + speed.optimizer_seconds


@contextmanager
def undisturbed(model: GPT, device: Device) -> Iterator[None]:
    """Training mode inside; afterwards mode and torch's random state are as before, and the model
    has no gradients. Weights are the caller's to leave alone."""
    was_training = model.training
    gpus = [device.torch] if device.kind == "cuda" else []
    with torch.random.fork_rng(gpus):
        model.train()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)


def micro_batch(
    model: GPT,
    config: Config,
    device: Device,
    precision: str,
    rows: int,
    loss_of: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
) -> Callable[[], None]:
    """A call that computes the gradients of `rows` rows of random tokens as a step would; where a
    row is several sequences, of as many.

    As there, those of later micro batches of a step are added to the first's. `loss_of` stands for
    `model.loss`.
    """
    length, several = config.model.block_size, config.training.tokens_per_step
    generator = torch.Generator().manual_seed(0)
    shape = (rows * sequences_per_row(config.finetune), length + 1)
    tokens = torch.randint(model.vocab_size, shape, generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    inputs, targets = inputs.to(device.torch), targets.to(device.torch)
    segments = None
    if config.data.document_mask:  # two documents a row
        segments = (torch.arange(length, device=device.torch) * 2 // length).repeat(len(tokens), 1)
    accumulates = rows * length < several
    compute = loss_of or model.loss

    def run() -> None:
        if not accumulates:
            model.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = compute(inputs, targets, segments) / targets.numel()
        torch.autograd.backward(loss)

    return run


def median_seconds(work: Callable[[], object], device: Device, budget: float, least: int) -> float:
    """Median seconds of calls of `work`: as many as fit in `budget` seconds, at least `least`.

    The first call warms up and counts only where it is the only one. Polls for a stop request.
    """
    times: list[float] = []
    while len(times) < least or sum(times) + min(times) < budget:
        stop.raise_if_requested()
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return median(times[1:] or times)


def synchronise(device: Device) -> None:
    """Wait until the device has done what it was told; a CPU always has."""
    if device.kind == "cuda":
        torch.cuda.synchronize(device.torch)
    elif device.kind == "mps":
        torch.mps.synchronize()


def _update(model: GPT, config: Config) -> Callable[[], None]:
    """A call that clips and updates a copy of `model`, to which its gradients move."""
    twin = copy.deepcopy(model)
    for own, others in zip(twin.parameters(), model.parameters(), strict=True):
        own.grad, others.grad = others.grad, None
    optimizer = Optimizer(twin, config.optimizer)

    def run() -> None:
        clip_gradients(twin.parameters(), config.training.clip_norm)
        optimizer.step(1.0)

    return run
