"""Gradient clipping by the norm over all parameters (Pascanu et al. 2013)."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Scale the gradients so that their norm is at most `most`; 0 leaves them as they are.

    Returns the norm before, an fp32 scalar on their device; nothing waits for a GPU. On a CPU,
    where the norm is known at once, gradients are written only when they are too large.
    """
    having = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in having if p.grad is not None])
    if most and (norm.device.type != "cpu" or float(norm) > most):
        clip_grads_with_norm_(having, most, norm)
    return norm
