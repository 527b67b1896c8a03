"""Attention weights against the model's own attention: they are what it multiplies values with."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.model.attention_maps import attention_maps
from gptcli.model.gpt import GPT, Attention

V, T = 40, 48
SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 64, "n_inner": 24}
MODERN = {**PRESETS["modern"], **SMALL}
SCALING = {"kind": "dynamic", "factor": 2.0, "original_block_size": 12}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {**PRESETS[name], **SMALL} for name in ("gpt1", "gpt2", "llama", "modern")},
    "gpt3": {**PRESETS["gpt3-small"], **SMALL, "window": [0, 5]},
    "gqa": {**MODERN, "n_kv_head": 2},
    "mqa-wide-heads-window": {**MODERN, "n_kv_head": 1, "head_dim": 6, "window": [5]},
    "sinusoidal": {**PRESETS["gpt2"], **SMALL, "position": "sinusoidal"},
    "no-positions": {**MODERN, "position": "none"},
    "dynamic-rope": {**MODERN, "rope_scaling": SCALING},
    "yarn": {**MODERN, "rope_scaling": {**SCALING, "kind": "yarn"}},
    "dropout": {**MODERN, "dropout": 0.5},
}


def random_model(settings: dict[str, Any]) -> GPT:
    """Weights far from their initial values, in training mode, where dropout would be seen."""
    model = GPT(ModelConfig.model_validate(settings), V)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        mean = 0.5 if parameter.ndim == 1 else 0.0
        parameter.data.normal_(mean, 0.3, generator=generator)
    return model.requires_grad_(False)


def test_the_variants_are_all_kinds_of_presets() -> None:
    """Guards: a preset whose switches none of the variants has."""

    def switches(settings: dict[str, Any]) -> set[tuple[str, str]]:
        sizes = {"n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "head_dim", "block_size"}
        numbers = {"norm_eps", "rope_theta", "tie_embeddings", "rope_scaling", "window"}
        return {(k, str(v)) for k, v in settings.items() if k not in sizes | numbers}

    known = [switches(VARIANTS[name]) for name in ("gpt1", "gpt2", "llama", "modern", "gpt3")]
    assert all(any(switches(preset) <= one for one in known) for preset in PRESETS.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_times_values_are_the_models_attention(name: str) -> None:
    """Guards: a map that differs from what the model does in scale, mask, window, rotation, norm
    of queries and keys, or which heads share a key."""
    model = random_model(VARIANTS[name])
    tokens = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(1))
    maps = attention_maps(model, tokens, [0, 1])
    assert model.training
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, block in enumerate(model.eval().blocks):
        block.attn.register_forward_hook(
            lambda attention, inputs, out, layer=layer: seen.update({layer: (inputs[0], out)})
        )
    model(tokens[None])
    for layer, block in enumerate(model.blocks):
        x, expected = seen[layer]
        torch.testing.assert_close(
            attended(block.attn, maps[layer], x), expected, rtol=1e-4, atol=1e-5
        )
        ones = torch.ones(model.config.n_head, T)
        torch.testing.assert_close(maps[layer].sum(-1), ones, rtol=0, atol=1e-6)
        assert not maps[layer].triu(1).any()
        window = model.windows[layer]
        assert not window or not maps[layer].tril(-window).any()


def attended(attention: Attention, weights: Tensor, x: Tensor) -> Tensor:
    """Attention by its definition from the weights (H, T, T), one head at a time."""
    groups = attention.n_head // attention.n_kv_head
    values = attention.qkv(x).split(attention.widths, dim=-1)[2]
    heads = values.view(len(weights[0]), attention.n_kv_head, attention.head_dim)
    y = [weights[h] @ heads[:, h // groups] for h in range(attention.n_head)]
    return attention.proj(torch.cat(y, dim=-1))[None]


def test_only_the_layers_asked_for() -> None:
    """Guards: hooks that stay, and cost every later pass; gigabytes for layers nobody sees."""
    model = random_model(MODERN)
    assert list(attention_maps(model, torch.arange(5), [1])) == [1]
    with pytest.raises(ValueError, match="do not fit"):
        attention_maps(model, torch.zeros(65, dtype=torch.int64), [0])
    assert not any(block.attn._forward_hooks for block in model.blocks)
