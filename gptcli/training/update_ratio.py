"""How far one update moves the weights, relative to their size."""

import torch
from torch import Tensor

from gptcli.model.gpt import GPT, Block


def watched_weights(model: GPT) -> list[Tensor]:
    """Copies of two hidden matrices that stand for all: what enters the first block's attention and
    the last block's feed-forward layer. No preset initialises them to zero."""
    first, last = model.blocks[0], model.blocks[-1]
    assert isinstance(first, Block)
    assert isinstance(last, Block)
    return [w.detach().clone() for w in (first.attn.qkv.weight, last.mlp.up.weight)]


def update_ratio(old: list[Tensor], model: GPT) -> Tensor:
    """Norm of the change of the watched weights since `old` over the norm of `old`, a scalar on
    their device. About 1e-3 is usual for Adam; Muon moves matrices farther."""
    changes = [new - was for new, was in zip(watched_weights(model), old, strict=True)]
    return _norm(changes) / _norm(old)


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))
