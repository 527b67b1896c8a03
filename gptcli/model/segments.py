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

    `ids` (B, T) int64 says which document of its row a token belongs to; `positions` (B, T) int64
    counts the tokens of each from 0, so a token sees itself and that many before it. `lengths`,
    the tokens of each segment, row after row, is there where a call a segment is the faster way.
    """

    ids: Tensor
    positions: Tensor
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
            return cls(ids, positions, (ends - starts).tolist())
        return cls(ids, positions, None)

    def sizes(self) -> Tensor:
        """How many tokens the segment of each token has: (B, T) int64."""
        after = torch.searchsorted(self.ids, self.ids, right=True)
        return after - torch.searchsorted(self.ids, self.ids)


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
