"""Gradient clipping by the norm over all parameters (Pascanu et al. 2013)."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gptcli.runs.tensors import local


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], most: float, *, sharded: bool = False) -> Tensor:
    """Scale the gradients so that their norm is at most `most`; 0 leaves them as they are.

    Returns the norm before, an fp32 scalar on their device; nothing waits for a GPU. On a CPU,
    where the norm is known at once, gradients are written only when they are too large. `sharded`
    says that each process has a share of them, as `parallel.shard` leaves them.
    """
    having = [p for p in parameters if p.grad is not None]
    if sharded:
        return _clip_shares([local(p.grad) for p in having if p.grad is not None], most)
    norm = get_total_norm([p.grad for p in having if p.grad is not None])
    if most and (norm.device.type != "cpu" or float(norm) > most):
        clip_grads_with_norm_(having, most, norm)
    return norm


def _clip_shares(shares: list[Tensor], most: float) -> Tensor:
    norm = get_total_norm(shares) ** 2
    dist.all_reduce(norm)
    norm = norm.sqrt()
    if most:
        torch._foreach_mul_(shares, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm
