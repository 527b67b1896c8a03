"""Which keys each query attends to: all before it, a window of them, those of its document.

Legend of shapes: B batch, T queries, P keys before the first query's own, H heads, D head size,
S queries in a block, N blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.model.segments import Segments, attend_each

# Blocks take 1.15 times as long for each score as one mask over the row does (forward and backward,
# 12 heads of 64 on a CPU), so they have to save more than that: this share of the scores at most.
_SHARE_OF_SCORES = 0.75
_SMALLEST_BLOCK = 16  # smaller ones take no less time


@dataclass(frozen=True)
class Reach:
    """What the queries see of the keys in all layers of one window, computed once for them.

    By `mask` (1 or B, 1, T, P + T) bool, True where a query sees a key; or in blocks, each with the
    block of keys before it, by `mask` (1 or B, N, S, 2 S), S being `block`; or by `lengths`, those
    of the segments that see only themselves. None of these: every query sees all keys up to its
    own, the only query every key; then the first `shared` keys, a number or a tensor of one, are
    those of row 0 in every row.
    """

    mask: Tensor | None = None
    block: int = 0
    lengths: list[int] | None = None
    shared: int | Tensor = 0

    @classmethod
    def of(
        cls,
        window: int,
        length: int,
        device: torch.device,
        past: int = 0,
        segments: Segments | None = None,
    ) -> "Reach":
        """For `length` queries that reach back `window` tokens, themselves included (0: all).

        `past` keys go before the first query's own: all of them, or with a window the
        window - 1 last. With `segments` no query sees another's document, and there is no past.
        """
        lengths = None if segments is None else segments.lengths
        if lengths is not None and (not window or max(lengths) <= window):
            return cls(lengths=lengths)
        bounded = bool(window) and past + length > window
        if length == 1 or (segments is None and not past and not bounded):
            return cls()
        if segments is None:
            back = past + torch.arange(length, device=device)[None]  # (1, T)
        else:
            back = segments.positions  # (B, T)
        if bounded:
            back = back.clamp(max=window - 1)
            size = max(window, _SMALLEST_BLOCK)
            scores = 2 * size * (length + -length % size)
            if scores <= _SHARE_OF_SCORES * length * (past + length):
                return cls(_block_mask(back, size), size)
        key = torch.arange(past + length, device=device)
        distance = key[past:, None] - key  # (T, P + T)
        return cls(((distance >= 0) & (distance <= back[..., None]))[:, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Scaled dot-product attention of q (B, H, T, D) over k, v (B, K, P + T, D): as q. Each key
        head is for H / K query heads that follow one another."""
        groups = q.size(1) // k.size(1)
        if isinstance(self.shared, Tensor) or self.shared:
            return _attend_shared(q, k, v, self.shared)
        plain = self.mask is None and self.lengths is None and not self.block and q.size(2) > 1
        if groups > 1 and plain and q.device.type == "cpu":  # whose kernel copies and keeps nothing
            return F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=True
            )
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if self.lengths is not None:
            return attend_each(q, k, v, self.lengths, dropout)
        if self.block:
            assert self.mask is not None
            return _attend_blocks(q, k, v, self.mask, self.block, dropout)
        # Two calls: a compiled graph for any T takes no `is_causal` that depends on T.
        if self.mask is None and q.size(2) > 1:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=dropout)

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the last token alone: its query heads q (B, K, G, D) in groups over
        k, v (B, K, P + 1, D): as q."""
        if isinstance(self.shared, Tensor) or self.shared:
            return _attend_shared(q, k, v, self.shared)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


def _attend_shared(q: Tensor, k: Tensor, v: Tensor, shared: Any) -> Tensor:
    """Attention of the last token alone, q (B, K, G, D) over k, v (B, K, S, D), where the first
    `shared` keys are alike in all rows: these are read once, by the queries of all rows. As q.

    The two parts of a softmax over all keys are weighted by their sums of exponentials, as in
    Dao et al. 2022 (FlashAttention), section 3.1.
    """
    B, K, G, D = q.shape  # noqa: N806
    # narrow: for a program that is recorded, `shared` is a tensor.
    before_k, before_v = k[:1].narrow(2, 0, shared), v[:1].narrow(2, 0, shared)
    after_k, after_v = (x.narrow(2, shared, x.size(2) - shared) for x in (k, v))
    together = q.transpose(0, 1).reshape(1, K, B * G, D)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    before, before_sum = attend(together, before_k, before_v)
    after, after_sum = attend(q, after_k, after_v)
    before, before_sum = before.view(K, B, G, D), before_sum.reshape(K, B, G)
    share = torch.sigmoid(before_sum.transpose(0, 1) - after_sum)[..., None]
    y: Tensor = torch.lerp(after, before.transpose(0, 1), share)
    return y


def _block_mask(back: Tensor, size: int) -> Tensor:
    """From how many tokens each query reaches back (1 or B, T): (1 or B, N, S, 2 S) bool."""
    room = -back.size(1) % size
    back = F.pad(back, (0, room)).view(back.size(0), -1, size, 1)  # queries of no one see one key
    key = torch.arange(2 * size, device=back.device)
    distance = key[size:, None] - key  # (S, 2 S)
    return (distance >= 0) & (distance <= back)


def _attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, size: int, dropout: float
) -> Tensor:
    """Attention of each block of queries over its own and the previous block of keys."""
    B, H, T, D = q.shape  # noqa: N806
    N, past = mask.size(1), k.size(2) - T  # noqa: N806
    room = N * size - T
    q = F.pad(q.transpose(1, 2), (0, 0, 0, 0, 0, room)).reshape(B * N, size, H, D)
    keys, values = (_with_previous(x, size, size - past, room) for x in (k, v))
    mask = mask.expand(B, -1, -1, -1).reshape(B * N, 1, size, 2 * size)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, dropout_p=dropout
    )  # (B N, H, S, D)
    return y.transpose(1, 2).reshape(B, N * size, H, D)[:, :T].transpose(1, 2)


def _with_previous(x: Tensor, size: int, before: int, after: int) -> Tensor:
    """Each block of x (B, H, P + T, D) behind the one before it: (B N, H, 2 S, D)."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, 0, before, after))  # (B, (N + 1) S, H, D)
    parts = [part.reshape(-1, size, *x.shape[2:]) for part in (x[:, :-size], x[:, size:])]
    return torch.cat(parts, dim=1).transpose(1, 2)
