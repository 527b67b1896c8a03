"""Positions that are computed, not learned: rotary ones with their scalings, and sinusoids.

Legend of shapes: B batch, T time in tokens, H heads, D head size.
"""

import math

import torch
from torch import Tensor

from gptcli.config.model_schema import RopeScaling


def inverse_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    length_tokens: int | Tensor = 0,
) -> Tensor:
    """Radians a token by which each pair of a head is turned (Su et al. 2021): (D / 2,) fp32.

    Only a dynamic `scaling` depends on the length of the text; a length for each token, (B, T),
    gives (B, T, D / 2). All are the numbers that transformers computes.
    """
    if scaling is None:
        return _unscaled(head_dim, theta)
    if scaling.kind == "linear":
        return _unscaled(head_dim, theta) / scaling.factor
    if scaling.kind == "dynamic":
        return _dynamic(head_dim, theta, scaling, length_tokens)
    if scaling.kind == "yarn":
        return _yarn(head_dim, theta, scaling)
    return _llama3(head_dim, theta, scaling)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What cosines and sines are multiplied with (Peng et al. 2023, equation 22; else 1)."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def fixed_length(scaling: RopeScaling | None, block_size: int) -> int:
    """The longest text, up to `block_size`, until which no frequency depends on its length."""
    if scaling is None or scaling.kind != "dynamic":
        return block_size
    return min(block_size, _original(scaling))


def rope_table(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> Tensor:
    """Cosines and sines for positions (...) and frequencies (D / 2): (2, ..., D / 2) fp32."""
    angles = positions[..., None].float() * frequencies
    return torch.stack([angles.cos(), angles.sin()]) * factor


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the halves of x (B, T, H, D) as transformers does: (x1 + i x2) e^(i angle).

    `rope` holds cosines and sines, (2, T, D/2) or a table for each row, (2, B, T, D/2).
    """
    cos, sin = rope.to(x.dtype).unsqueeze(-2)  # (T, 1, D/2) or (B, T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def sinusoidal_table(length: int, width: int) -> Tensor:
    """Fixed positions of Vaswani et al. 2017, section 3.5: (length, width) fp32."""
    # The rotary frequencies of base 10000 are theirs.
    cos, sin = rope_table(torch.arange(length), inverse_frequencies(width, 10000.0))
    return torch.stack([sin, cos], dim=-1).flatten(1)


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _unscaled(head_dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** _exponents(head_dim)


def _dynamic(head_dim: int, theta: float, scaling: RopeScaling, length: int | Tensor) -> Tensor:
    """NTK-aware: a base that grows once the text is longer than those of the training."""
    original, factor = _original(scaling), scaling.factor
    times = torch.as_tensor(length, dtype=torch.float32).clamp(min=original) / original
    growth = factor * times - (factor - 1)  # 1 up to the original length
    base = theta * growth ** (head_dim / (head_dim - 2))
    return 1.0 / base[..., None] ** _exponents(head_dim).to(base.device)


def _yarn(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Peng et al. 2023, section 3.2: pairs that turn often over the original text stay as they
    are, those that turn seldom are interpolated, with a ramp over the pairs between."""
    original = _original(scaling)

    def pair_that_turns(times: float) -> float:
        turns_of_first = original / (times * 2 * math.pi)
        return head_dim * math.log(turns_of_first) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_dim - 1)
    width = high - low or 0.001  # a step instead of a ramp
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    plain = _unscaled(head_dim, theta)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _llama3(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Grattafiori et al. 2024, as published with Llama 3.1: long waves are stretched, short ones
    are not, and those between in part."""
    plain = _unscaled(head_dim, theta)
    turns = _original(scaling) * plain / (2 * math.pi)  # over the original text
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _original(scaling: RopeScaling) -> int:
    assert scaling.original_block_size is not None  # the config refuses its absence
    return scaling.original_block_size
