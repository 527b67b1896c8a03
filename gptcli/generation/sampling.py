"""From logits to the next token: filters and inverse-CDF sampling as functions of their arguments.

Logits are (B, V) float tensors of unnormalised log-probabilities; a filter sets the logits of the
tokens it removes to -inf and always leaves at least one. Randomness comes in as uniforms in [0, 1)
that are hashed from (seed, prompt, sample, position), so that nothing depends on the batch.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcli.errors import CheckpointError

# Candidates that top-p sorts before it sorts the whole vocabulary: a trained model's nucleus is
# small, and a partial sort of 50k logits is ten times faster than a whole one.
_NUCLEUS_GUESSES = (512, 8192)
# Beyond these a temperature or penalty overflows fp32 and the logits become nan.
_SMALLEST, _LARGEST = 1e-30, 1e30
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of splitmix64 (Steele et al. 2014)
_UINT64 = 2**64 - 1


def check_finite(logits: Tensor) -> None:
    """Raise CheckpointError if any of the logits (B, V) is nan or infinite."""
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(
            "the checkpoint produces non-finite logits",
            hint="its weights are damaged or its training diverged; take an earlier checkpoint",
        )


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of `seen` (B, V) bool tokens by `penalty`.

    Keskar et al. 2019 (CTRL), section 4.1, in the form that transformers made standard.
    """
    penalty = min(max(penalty, _SMALLEST), _LARGEST)
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits over `temperature` > 0, shifted so that the largest is 0 and none overflows."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted / min(max(temperature, _SMALLEST), _LARGEST)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` largest logits (all, if k >= V) and whatever ties with the k-th."""
    if k >= logits.size(-1):
        return logits
    threshold = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach `p` (Holtzman et al. 2020).

    Tokens that tie with the last one kept stay too, so that no sort order decides.
    """
    if p >= 1.0:
        return logits
    total = logits.logsumexp(dim=-1, keepdim=True)
    vocab_size = logits.size(-1)
    for count in (*_NUCLEUS_GUESSES, vocab_size):
        top = logits.topk(min(count, vocab_size), dim=-1).values  # (B, count) descending
        probabilities = (top - total).double().exp()
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = before < p
        if count >= vocab_size or not bool(kept[:, -1].any()):
            break
    last = kept.sum(dim=-1, keepdim=True) - 1  # (B, 1)
    return logits.masked_fill(logits < top.gather(-1, last), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least `p` times as likely as the likeliest (Nguyen et al. 2024)."""
    if p <= 0.0:
        return logits
    threshold = logits.amax(dim=-1, keepdim=True) + math.log(p)
    return logits.masked_fill(logits < threshold, -math.inf)


def filter_logits(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> Tensor:
    """Temperature > 0, then top-k, top-p and min-p, in the order of transformers."""
    logits = apply_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    return keep_min_p(keep_top_p(logits, top_p), min_p)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids (B,) int64: row b is where the CDF of softmax(logits[b]) passes uniforms[b].

    `uniforms` is (B,) float64 in [0, 1 - 2^-52]. A token of probability zero is never drawn.
    """
    probabilities = logits.double().softmax(dim=-1)
    cdf = probabilities.cumsum(dim=-1).masked_fill(probabilities == 0, 0.0)
    # The largest entry stands for 1, so that rounding leaves no gap above the last token.
    target = uniforms[:, None] * cdf.amax(dim=-1, keepdim=True)
    return (cdf > target).to(torch.uint8).argmax(dim=-1)  # the first of the largest


def stream_key(seed: int, prompt_tokens: Sequence[int]) -> int:
    """64-bit key of the random numbers that belong to a seed and a prompt."""
    text = f"{seed}:{','.join(map(str, prompt_tokens))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform_numbers(key: int, samples: NDArray[np.int64], position: int) -> NDArray[np.float64]:
    """Uniforms in [0, 1 - 2^-52], one for each of `samples`, for the token at `position`.

    Each (key, sample) starts a splitmix64 stream (Steele et al. 2014) and `position` counts in it.
    """
    streams = _mix(samples.astype(np.uint64) * np.uint64(_GAMMA) + np.uint64(key))
    bits = _mix(streams + np.uint64((position + 1) * _GAMMA & _UINT64))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(z: NDArray[Any]) -> NDArray[Any]:
    """The output function of splitmix64 on a uint64 array."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[Any] = z ^ (z >> np.uint64(31))
    return mixed
