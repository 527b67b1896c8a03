"""Random choice: uniforms from a counter hash, and the token at which a CDF passes them.

Uniforms are hashed from (seed, prompt, sample, position), so that nothing depends on the batch.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of splitmix64 (Steele et al. 2014)
_UINT64 = 2**64 - 1
_MOST = 1 - 2.0**-52  # the largest uniform: its product with a total stays below the total
# Tokens whose weights are added up in one go, about the root of 50k: the CDF in double precision
# then has 200 blocks and one block's 256 tokens instead of all tokens.
_BLOCK = 256


def stream(seed: int, prompt_tokens: Sequence[int], sample: int) -> int:
    """64-bit start of the random numbers that belong to one sample of a prompt under a seed."""
    text = f"{seed}:{','.join(map(str, prompt_tokens))}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return int(_mix(np.array([sample * _GAMMA + key & _UINT64], dtype=np.uint64))[0])


def uniforms(streams: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniforms (R,) in [0, 1 - 2^-52]: number `positions` of each of `streams`.

    Each stream is one of splitmix64 (Steele et al. 2014), in which the position counts.
    """
    steps = positions.astype(np.uint64) + np.uint64(1)
    bits = _mix(streams + steps * np.uint64(_GAMMA))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(z: NDArray[Any]) -> NDArray[Any]:
    """The output function of splitmix64 on a uint64 array."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[Any] = z ^ (z >> np.uint64(31))
    return mixed


def invert_cdf(weights: Tensor, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Token ids (R,): where the CDF over ascending ids passes `uniform` (R,).

    `weights` (R, V) fp32 are not negative and need not add up to 1, but to a finite number above 0.
    A token of weight zero is never drawn. A row's token does not depend on the other rows.
    """
    vocab_size = weights.size(1)
    blocks = vocab_size // _BLOCK
    whole = weights[:, : blocks * _BLOCK].view(len(weights), blocks, _BLOCK).sum(dim=-1)
    rest = weights[:, blocks * _BLOCK :].sum(dim=-1, keepdim=True)
    block, uniform = _pass(torch.cat([whole, rest], dim=1).cpu().numpy(), uniform)
    ids = block[:, None] * _BLOCK + np.arange(_BLOCK)  # (R, _BLOCK)
    where = torch.from_numpy(np.minimum(ids, vocab_size - 1)).to(weights.device)
    inside = weights.gather(1, where).cpu().numpy()
    within, _ = _pass(np.where(ids < vocab_size, inside, 0.0), uniform)
    return block * _BLOCK + within


def _pass(
    weights: NDArray[np.float32], uniform: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Index (R,) at which the CDF of `weights` (R, K) passes, and how far into its weight (R,)."""
    cdf = np.cumsum(weights, axis=-1, dtype=np.float64)
    target = uniform * cdf[:, -1]
    index = (cdf > target[:, None]).argmax(axis=-1)
    rows = np.arange(len(index))
    below = np.where(index > 0, cdf[rows, index - 1], 0.0)
    inside = (target - below) / (cdf[rows, index] - below)
    return index, np.minimum(inside, _MOST)
