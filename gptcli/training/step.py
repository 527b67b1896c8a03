"""One step's gradients: micro batches through the model, clipped."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gptcli.data.rows import StepBatch
from gptcli.device import autocast
from gptcli.model.gpt import IGNORED
from gptcli.training.session import Session


def forward_backward(
    session: Session,
    batch: StepBatch,
    loss_of: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> tuple[float, float]:
    """Gradients of the mean loss over the step's unmasked targets, clipped.

    Micro batches add up to exactly that mean, whatever their number. Returns the loss (nats per
    token) and the gradient norm before clipping.
    """
    config, state = session.config.training, session.state
    seed_step(session.config.seed, state.step)
    device, size = session.device.torch, session.choices.micro_batch_size
    count = max(int((batch.targets != IGNORED).sum()), 1)
    scale = state.loss_scale if session.choices.precision == "fp16" else 1.0
    total = torch.zeros((), device=device)
    for first in range(0, len(batch.tokens), size):
        rows = slice(first, first + size)
        tokens, targets = batch.tokens[rows].to(device), batch.targets[rows].to(device)
        segments = None if batch.segments is None else batch.segments[rows].to(device)
        with autocast(session.device, session.choices.precision):
            loss = loss_of(tokens, targets, segments) / count
        torch.autograd.backward(loss * scale)
        total += loss.detach()
    parameters = list(session.model.parameters())
    if scale != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    return float(total), float(norm)


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators for one step (dropout), so that nothing else can shift them."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63)
