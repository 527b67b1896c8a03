"""One step's gradients: micro batches through the model, clipped."""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from gptcli.data.rows import StepBatch
from gptcli.device import autocast, is_out_of_memory, release_memory
from gptcli.training.choices import apply, with_less_memory
from gptcli.training.clipping import clip_gradients
from gptcli.training.compiling import failure
from gptcli.training.session import Session

log = logging.getLogger("gptcli")


def forward_backward(session: Session, batch: StepBatch) -> tuple[Tensor, Tensor]:
    """Gradients of the step's loss, which is `session.loss_of`'s, clipped.

    Micro batches add up to exactly that loss, whatever their number; with dropout each number has
    masks of its own. Returns the loss (of a language model in nats per token) and the gradient norm
    before clipping, fp32 scalars on the device, for which nothing waits. Where memory or the
    compiler fail, `session.choices` change and the step is computed again; ResourceError when one
    row does not fit in memory.
    """
    blamed = None  # a failure of compiled code: the compiler's, if the step then does without it
    while True:
        try:
            found = _gradients(session, batch)
            if blamed is not None:
                log.warning(blamed)
            return found
        except Exception as error:  # allocators and compilers share no type of error
            if is_out_of_memory(error):
                rows = len(batch.tokens)
                session.choices = with_less_memory(session.choices, session.config, rows)
            elif session.choices.compile:
                blamed = failure(error)
                session.choices = replace(session.choices, compile=False)
            else:
                raise
        # Out of the handler nothing refers to the failed attempt, so its memory is free.
        session.optimizer.zero_grad()
        release_memory(session.device)
        apply(session.choices, session.model)


def _gradients(session: Session, batch: StepBatch) -> tuple[Tensor, Tensor]:
    """The attempt with the choices of now."""
    seed_step(session.config.seed, session.state.step)
    device, size = session.device.torch, session.choices.micro_batch_size
    scale = session.state.loss_scale if session.choices.precision == "fp16" else 1.0
    total = torch.zeros((), device=device)
    for first in range(0, len(batch.tokens), size):
        rows = batch.part(slice(first, first + size), device)
        with autocast(session.device, session.choices.precision):
            loss = session.loss_of(rows, batch)
        torch.autograd.backward(loss * scale)
        total += loss.detach()
    parameters = list(session.model.parameters())
    if scale != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= scale
    return total, clip_gradients(parameters, session.config.training.clip_norm)


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators for one step (dropout), so that nothing else can shift them."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63)
