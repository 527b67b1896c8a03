"""Document mask: several documents in a row of tokens, none of which sees another.

Legend of shapes: B batch, T time in tokens, H heads, D head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU a mask costs little in rows of up to 256 tokens, where a call a segment is mostly
# overhead; in longer rows it computes what it then hides, and the calls are 1.4 to 5 times as fast
# (attention forward and backward, rows of 128 to 1024 tokens, documents of 30 to 700).
_LONGEST_MASKED_ROW = 256


@dataclass(frozen=True)
class Segments:
    """What the layers need to know of the documents in a micro batch, computed once for all.

    `positions` (B, T) int64 counts the tokens of each segment from 0. Attention is causal within
    the segments, either by `mask` (B, 1, T, T) bool, True where a query sees a key, or by
    `lengths`, the tokens of each segment, row after row. Exactly one of the two is there.
    """

    positions: Tensor
    mask: Tensor | None
    lengths: list[int] | None

    @classmethod
    def of(cls, ids: Tensor) -> "Segments":
        """From the segment that each token belongs to: (B, T) int64, never falling in a row."""
        index = torch.arange(ids.size(1), device=ids.device)
        positions = index - torch.searchsorted(ids, ids)  # less the first token of that segment
        by_calls = ids.device.type == "cpu" and ids.size(1) > _LONGEST_MASKED_ROW
        if by_calls and not torch.compiler.is_compiling():  # a graph needs fixed shapes
            starts = (positions.flatten() == 0).nonzero()[:, 0]
            ends = torch.cat([starts[1:], starts.new_tensor([ids.numel()])])
            return cls(positions, None, (ends - starts).tolist())
        same = ids[:, :, None] == ids[:, None, :]
        return cls(positions, same.tril()[:, None], None)


def attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout: float) -> Tensor:
    """Causal attention of each segment by itself; q, k, v and the result are (B, H, T, D)."""
    # One split for all: its gradient is one concatenation, that of many slices is many sums.
    parts = [torch.split(x.transpose(1, 2).flatten(0, 1), lengths) for x in (q, k, v)]
    done: list[Tensor] = []
    for part in zip(*parts, strict=True):
        one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in part)  # each (1, H, L, D)
        y = F.scaled_dot_product_attention(one_q, one_k, one_v, dropout_p=dropout, is_causal=True)
        done.append(y[0].transpose(0, 1))  # (L, H, D)
    return torch.cat(done).view(q.transpose(1, 2).shape).transpose(1, 2)
