"""The head and its cross-entropy in one, chunk by chunk: no (tokens x vocabulary) logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # target of a position that carries no loss

# Of a chunk: enough rows for products at full speed, few enough logits for memory.
_ROWS = {"cpu": 1024, "cuda": 4096, "mps": 1024}
_LOGITS = {"cpu": (1 << 24, 1 << 26), "cuda": (1 << 28, 1 << 30), "mps": (1 << 24, 1 << 26)}
_ALIGNMENT = 16  # floats: products are slow where rows of the result begin at odd places


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over targets that are not IGNORED of -ln softmax(hidden @ weight.T)[target].

    hidden (N, C) and weight (V, C) floating, targets (N,) int64; the result is an fp32 scalar, in
    nats. Under autocast the products are in its dtype. Gradients are exact and computed together
    with the loss, while a chunk of logits is there; they cannot be differentiated again.
    """
    if hidden.device.type == "cpu":
        scored = targets != IGNORED
        if not scored.all():  # in finetuning, most: nothing is computed for them
            hidden, targets = hidden[scored], targets[scored]
    if not torch.is_grad_enabled():
        return _losses(hidden, weight, targets)[0]
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        loss, *gradients = _losses(hidden, weight, targets, *needs)
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.gradients
        ctx.gradients = None
        for gradient in (of_hidden, of_weight):
            if gradient is not None:
                gradient.mul_(grads[0])
        return of_hidden, of_weight, None


@torch.no_grad()
def _losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    for_hidden: bool = False,
    for_weight: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss and, where asked for, its gradients by hidden and weight, in their dtypes."""
    kind, vocab_size = hidden.device.type, len(weight)
    mixed = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if mixed else weight.dtype
    rows = min(chunk_rows(vocab_size, kind), max(len(hidden), 1))
    total = hidden.new_zeros((), dtype=torch.float32)
    by_hidden = torch.zeros_like(hidden) if for_hidden else None
    by_weight = torch.zeros_like(weight) if for_weight else None
    with torch.autocast(kind, enabled=False):
        inputs, head = hidden.to(dtype), weight.to(dtype)
        # Columns that only align the rows are as if their tokens were impossible.
        width = -(-vocab_size // _ALIGNMENT) * _ALIGNMENT
        space = hidden.new_empty(rows, width, dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            x, target = inputs[start : start + rows], targets[start : start + rows]
            padded = space[: len(x)]
            padded[:, vocab_size:] = -torch.inf
            logits = padded[:, :vocab_size]
            if dtype == torch.float32:
                torch.mm(x, head.T, out=logits)
            else:
                logits.copy_(x @ head.T)
            scored, target = target != IGNORED, target.clamp_min(0)[:, None]
            top, of_target = logits.amax(-1), logits.gather(1, target)[:, 0]
            p = torch.softmax(padded, -1, out=padded)[:, :vocab_size]
            # ln of the sum of exponentials, from the largest p, which is far from 0.
            total += ((top - p.amax(-1).log() - of_target) * scored).sum()
            if by_hidden is None and by_weight is None:
                continue
            # d loss / d logits = p - onehot(target), in the place of p.
            gradient = p.scatter_add_(1, target, p.new_full((len(x), 1), -1.0))
            if kind != "cpu":  # there only scored rows are left
                gradient *= scored[:, None]
            gradient = gradient.to(dtype)
            if by_hidden is not None:
                by_hidden[start : start + rows] = gradient @ head
            if by_weight is not None and dtype == weight.dtype:
                by_weight.addmm_(gradient.T, x)
            elif by_weight is not None:
                by_weight += gradient.T @ x
    return total, by_hidden, by_weight


def chunk_rows(vocab_size: int, device_kind: str) -> int:
    """Rows of logits that are held at once."""
    usual, most = _LOGITS[device_kind]
    return max(1, min(max(_ROWS[device_kind], usual // vocab_size), most // vocab_size))
