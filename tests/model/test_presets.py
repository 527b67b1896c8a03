"""The published sizes: parameters counted on the meta device and by a formula from the papers."""

from typing import Any

import pytest
import torch
from published_sizes import EXACT, GPT3

from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.model.gpt import GPT

NAMED = {  # preset: vocabulary, the size that its paper gives it
    "llama-33b": (32000, 32.5e9),
    "modern-1.7b": (151936, 1.72e9),
    "modern-4b": (151936, 4.02e9),
}


def on_meta(settings: dict[str, Any], vocab_size: int) -> GPT:
    with torch.device("meta"):
        return GPT(ModelConfig(**settings), vocab_size)


def counted(c: ModelConfig, vocab_size: int) -> int:
    """Parameters by hand: embeddings, then matrices, biases and norms of each layer."""
    head, inner, norm = c.head_size, c.inner_size, c.n_embd * (2 if c.norm == "layernorm" else 1)
    qkv, up = (c.n_head + 2 * c.kv_heads) * head, inner * (2 if c.gated else 1)
    layer = c.n_embd * (qkv + c.n_head * head + up + inner) + 2 * norm
    layer += 2 * head if c.qk_norm else 0
    if c.bias:
        layer += up + 2 * c.n_embd + (qkv if c.qkv_bias is None else 0)
    embeddings = vocab_size * c.n_embd * (1 if c.tie_embeddings else 2)
    embeddings += c.block_size * c.n_embd if c.position == "learned" else 0
    return embeddings + c.n_layer * layer + (norm if c.norm_position == "pre" else 0)


@pytest.mark.parametrize("preset", EXACT)
def test_published_counts(preset: str) -> None:
    """Guards: a missing bias or norm, an untied head, a wrong width."""
    vocab_size, parameters = EXACT[preset]
    model = on_meta(PRESETS[preset], vocab_size)
    assert model.parameter_count() == parameters
    assert counted(model.config, vocab_size) == parameters


@pytest.mark.parametrize("preset", GPT3)
def test_gpt3_sizes(preset: str) -> None:
    """Guards: a row of table 2.1 copied wrong, or corrected into another model."""
    model = on_meta(PRESETS[preset], 50257)
    assert model.parameter_count() == pytest.approx(GPT3[preset], rel=0.03)
    assert counted(model.config, 50257) == model.parameter_count()
    assert model.windows[:4] == [0, 256, 0, 256]


@pytest.mark.parametrize("preset", NAMED)
def test_other_named_sizes(preset: str) -> None:
    """Guards: a size under the name of another."""
    vocab_size, parameters = NAMED[preset]
    model = on_meta(PRESETS[preset], vocab_size)
    assert model.parameter_count() == pytest.approx(parameters, rel=0.01)
    assert counted(model.config, vocab_size) == model.parameter_count()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_counted_by_the_formula(preset: str) -> None:
    """Guards: a switch that adds parameters which no one has counted."""
    model = on_meta({**PRESETS[preset], "n_layer": 2}, 1000)
    assert model.parameter_count() == counted(model.config, 1000)
    embeddings = {"learned": 1000 + model.config.block_size}.get(model.config.position, 1000)
    embeddings += 0 if model.config.tie_embeddings else 1000
    without = model.parameter_count() - embeddings * model.config.n_embd
    assert model.parameter_count(embeddings=False) == without
