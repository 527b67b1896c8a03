"""How likely a model finds texts, one number a text, with gradients where they are wanted."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcli.model.cache import KVCache
from gptcli.model.gpt import GPT
from gptcli.model.loss import IGNORED, chunk_rows


def log_likelihoods(
    model: GPT, tokens: Tensor, targets: Tensor, cache: KVCache | None = None
) -> Tensor:
    """ln p of each row's targets that are not IGNORED, summed: (B, T) int64 twice -> (B,) fp32.

    With a cache, the tokens continue what it holds. Logits are made for such targets alone, a chunk
    at a time, and again for the gradient.
    """
    hidden, flat = model.hidden(tokens, cache).flatten(0, 1), targets.flatten()
    places = (flat != IGNORED).nonzero()[:, 0]
    hidden, scored = hidden[places], flat[places]
    if torch.is_grad_enabled():
        found = _OfTokens.apply(hidden, model.head.weight, scored)  # type: ignore[no-untyped-call]
    else:  # the head may be a packed one
        parts = _chunks(model.vocab_size, hidden, scored)
        found = torch.cat([_picked(model.head(x).float(), target) for x, target in parts])
    # Each place is written once, so that a GPU adds up in the same order every time.
    of_places = torch.zeros(flat.shape, device=flat.device).index_copy(0, places, found)
    return of_places.view(targets.shape).sum(1)


class _OfTokens(torch.autograd.Function):
    """ln p of each target (N,), fp32, from hidden states (N, C) and the head (V, C)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kind = hidden.device.type
        mixed = torch.is_autocast_enabled(kind)
        ctx.dtype = torch.get_autocast_dtype(kind) if mixed else weight.dtype
        ctx.save_for_backward(hidden, weight, targets)
        with torch.autocast(kind, enabled=False):
            head = weight.to(ctx.dtype)
            parts = _chunks(len(weight), hidden.to(ctx.dtype), targets)
            return torch.cat([_picked((x @ head.T).float(), target) for x, target in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        by_hidden = torch.zeros_like(hidden)
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        head, start = weight.to(ctx.dtype), 0
        for x, target, grad in _chunks(len(weight), hidden.to(ctx.dtype), targets, grads[0]):
            # d ln p / d logits = onehot(target) - p.
            gradient = torch.softmax((x @ head.T).float(), -1).neg_()
            gradient.scatter_add_(1, target[:, None], torch.ones_like(gradient[:, :1]))
            gradient = gradient.mul_(grad[:, None]).to(ctx.dtype)
            by_hidden[start : start + len(x)] = gradient @ head
            if by_weight is not None:
                by_weight += gradient.T @ x
            start += len(x)
        return by_hidden, by_weight, None


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    """ln p of the targets (N,) from logits (N, V)."""
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _chunks(vocab_size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, so many at a time that their logits fit."""
    rows = chunk_rows(vocab_size, tensors[0].device.type)
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
