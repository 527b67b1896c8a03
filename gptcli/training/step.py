"""One step's gradients: micro batches through the model, clipped."""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from gptcli.data.rows import StepBatch
from gptcli.device import autocast, is_out_of_memory, release_memory
from gptcli.errors import ResourceError
from gptcli.training.choices import apply, with_less_memory
from gptcli.training.clipping import clip_gradients
from gptcli.training.compiling import failure
from gptcli.training.parallel import micro_batches
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
            if session.parallel.here.size > 1:  # the others wait in this very step
                raise _of_several(error) from error
            if is_out_of_memory(error):
                rows = len(batch.tokens)
                session.choices = with_less_memory(
                    session.choices, session.config, rows, session.directory
                )
            elif session.choices.compile:
                blamed = failure(error)
                session.choices = replace(session.choices, compile=False)
            else:
                raise
        # Out of the handler nothing refers to the failed attempt, so its memory is free.
        session.optimizer.zero_grad()
        release_memory(session.device)
        apply(session.choices, session.model)


def _of_several(error: Exception) -> Exception:
    """What a failure is where other processes are in the same step: no other try of it."""
    if not is_out_of_memory(error):
        return error
    return ResourceError(
        f"out of memory: {' '.join(str(error).split())[:200]}",
        hint="set training.micro_batch_size lower, or distributed.strategy to fsdp, and resume",
    )


def _gradients(session: Session, batch: StepBatch) -> tuple[Tensor, Tensor]:
    """The attempt with the choices of now."""
    seed_step(session.config.seed, session.state.step, session.parallel.here.rank)
    device, size = session.device.torch, session.choices.micro_batch_size
    scale = session.state.loss_scale if session.choices.precision == "fp16" else 1.0
    total = torch.zeros((), device=device)
    parallel = session.parallel
    parts = list(micro_batches(len(batch.tokens), size, parallel.here))
    for part, weight in parts:
        rows = batch.part(part, device)
        with parallel.gradients(session.model, last=part is parts[-1][0]):
            with autocast(session.device, session.choices.precision):
                loss = session.loss_of(rows, batch)
            parallel.backward(loss * (scale * weight))
        total += loss.detach() * weight
    total = parallel.total(total)
    parameters = list(session.model.parameters())
    if scale != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= scale
    most = session.config.training.clip_norm
    return total, clip_gradients(parameters, most, sharded=parallel.sharded)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's generators for one step (dropout), so that nothing else can shift them."""
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    torch.manual_seed(mixed % 2**63)
