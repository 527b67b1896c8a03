"""Attention made visible: how much each token attends to each token before it.

Legend of shapes: T time in tokens, H query heads, K key-value heads, D head size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptcli.model.gpt import GPT, Attention


@torch.no_grad()
def attention_maps(model: GPT, tokens: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """The attention weights of `layers` (from 0) over token ids (T,): each (H, T, T) fp32.

    Row t of a head is what token t attends to: the softmax of its scaled scores over the tokens
    that it sees (Vaswani et al. 2017, section 3.2.1), 0 elsewhere; it sums to 1. Dropout is left
    out. ValueError for more tokens than the model takes.
    """
    found: dict[int, Tensor] = {}

    def keep(attention: nn.Module, inputs: tuple[Any, ...], _: Tensor) -> None:
        assert isinstance(attention, Attention)
        x, rope, _, layer, _ = inputs
        q, k, _ = attention._heads(attention.qkv(x), rope)
        found[layer] = _weights(q[0], k[0], model.windows[layer])

    hooks = [
        model.get_submodule(f"blocks.{layer}.attn").register_forward_hook(keep) for layer in layers
    ]
    was_training = model.training
    model.eval()
    try:
        model.hidden(tokens[None])
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def _weights(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Queries (T, H, D), keys (T, K, D), of which H / K query heads share each: (H, T, T) fp32."""
    q, k = q.transpose(0, 1).float(), k.transpose(0, 1).float()
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    place = torch.arange(scores.size(-1), device=scores.device)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < (window or len(place)))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)
