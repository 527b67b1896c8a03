"""Rotary positions and their scalings, sinusoids."""

import math
from typing import Any

import pytest
import torch

from gptcli.config.model_schema import ModelConfig, RopeScaling
from gptcli.model.gpt import GPT
from gptcli.model.rope import (
    attention_factor,
    fixed_length,
    inverse_frequencies,
    rope_table,
    rotate,
    sinusoidal_table,
)

SCALINGS: list[tuple[RopeScaling | None, int, int]] = [  # scaling, head_dim, length of the text
    (None, 64, 0),
    (RopeScaling(kind="linear", factor=4.0), 64, 0),
    (RopeScaling(kind="dynamic", factor=3.0, original_block_size=512), 64, 100),
    (RopeScaling(kind="dynamic", factor=3.0, original_block_size=512), 64, 513),
    (RopeScaling(kind="dynamic", factor=3.0, original_block_size=512), 128, 5000),
    (RopeScaling(kind="yarn", factor=4.0, original_block_size=4096), 128, 0),
    (RopeScaling(kind="yarn", factor=16.0, original_block_size=32), 64, 0),
    (
        RopeScaling(
            kind="yarn", factor=8.0, original_block_size=2048, beta_fast=20.0, beta_slow=2.0
        ),
        64,
        0,
    ),
    (RopeScaling(kind="yarn", factor=8.0, original_block_size=64, attention_factor=1.5), 8, 0),
    (RopeScaling(kind="yarn", factor=1.0, original_block_size=64), 8, 0),
    (RopeScaling(kind="llama3", factor=8.0, original_block_size=8192), 128, 0),
    (
        RopeScaling(
            kind="llama3",
            factor=32.0,
            original_block_size=64,
            low_freq_factor=2.0,
            high_freq_factor=5.0,
        ),
        64,
        0,
    ),
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(("scaling", "head_dim", "length"), SCALINGS)
def test_frequencies_equal_those_of_transformers(
    scaling: RopeScaling | None, head_dim: int, length: int, theta: float
) -> None:
    """Guards: a formula that differs from the one that published models were trained with."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        parameters = {
            "rope_type": scaling.kind,
            "rope_theta": theta,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_block_size,
        }
        if scaling.kind == "llama3":
            parameters["low_freq_factor"] = scaling.low_freq_factor
            parameters["high_freq_factor"] = scaling.high_freq_factor
        if scaling.kind == "yarn":
            parameters["beta_fast"] = scaling.beta_fast
            parameters["beta_slow"] = scaling.beta_slow
            parameters["attention_factor"] = scaling.attention_factor
    # Their dynamic form takes the original length from here.
    longest = scaling.original_block_size if scaling and scaling.original_block_size else 2048
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=longest,
        rope_parameters=parameters,
    )
    if scaling is None:
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, None, seq_len=length or None)
    got = inverse_frequencies(head_dim, theta, scaling, length)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0.0)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-6)


def test_dynamic_takes_a_length_for_each_token() -> None:
    """Guards: documents of one batch that are turned as one of them alone should be."""
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_block_size=8)
    lengths = torch.tensor([[3, 20], [9, 8]])
    got = inverse_frequencies(16, 10000.0, scaling, lengths)
    assert got.shape == (2, 2, 8)
    for row in range(2):
        for column in range(2):
            alone = inverse_frequencies(16, 10000.0, scaling, int(lengths[row, column]))
            torch.testing.assert_close(got[row, column], alone)


def test_fixed_length() -> None:
    """Guards: a table used for texts whose rotations depend on their length."""
    dynamic = RopeScaling(kind="dynamic", factor=2.0, original_block_size=8)
    assert fixed_length(None, 32) == 32
    assert fixed_length(RopeScaling(kind="linear", factor=2.0), 32) == 32
    assert (fixed_length(dynamic, 32), fixed_length(dynamic, 4)) == (8, 4)


def test_rotation_depends_on_distance_only() -> None:
    """Guards: rotary positions that are not relative (Su et al. 2021, equation 11)."""
    table = rope_table(torch.arange(64), inverse_frequencies(8, 10000.0))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator).repeat(1, 1, 64, 1, 1)
    scores = rotate(q, table)[0, :, 0] @ rotate(k, table)[0, :, 0].T  # (64, 64)
    for distance in (0, 1, 5, 40):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[5, 0], scores[0, 0])


def test_the_table_stays_fp32_under_bf16_weights() -> None:
    """Guards: angles rounded to bf16, which tells position 257 from 256 no more."""
    model = GPT(ModelConfig(block_size=512, n_layer=1, window=[8]), 16).to(torch.bfloat16)
    model.reset_positions()
    assert model.positions.dtype == torch.float32
    with torch.no_grad():
        assert model(torch.zeros(1, 520, dtype=torch.int64)).dtype == torch.bfloat16


def test_sinusoids() -> None:
    """Guards: sines and cosines in halves where the paper interleaves them."""
    table = sinusoidal_table(4, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert table[3, 0] == pytest.approx(math.sin(3))
    assert table[3, 1] == pytest.approx(math.cos(3))
    assert table[3, 4] == pytest.approx(math.sin(3 / 10000 ** (4 / 6)))
