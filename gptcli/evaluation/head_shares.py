"""Where the attention of a head goes, in numbers. Without torch, which a report does not need."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVELS = 15  # of a weight in a picture, 0 to this: one hexadecimal digit


@dataclass(frozen=True)
class HeadShares:
    """Of the attention of a head, mean over the tokens behind the first: the shares in [0, 1] that
    go to the first token, to the token itself and to the one right before it (which is the first
    token too where it is that), and how many tokens back it goes on average."""

    first: float
    itself: float
    previous: float
    distance_tokens: float


def head_shares(weights: NDArray[np.float32]) -> HeadShares:
    """Of one head's weights (T, T), T at least 2."""
    place = np.arange(len(weights))
    distance = place[:, None] - place
    return HeadShares(
        first=float(weights[1:, 0].mean()),
        itself=float(np.diagonal(weights)[1:].mean()),
        previous=float(np.diagonal(weights, -1).mean()),
        distance_tokens=float((weights * distance)[1:].sum(-1).mean()),
    )
