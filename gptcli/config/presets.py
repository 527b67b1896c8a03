"""Published model shapes and switches, numbers only. Keys given in the YAML override a preset's."""

from typing import Any

_GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "position": "learned",
    "activation": "gelu_tanh",
    "gated": False,
    "bias": True,
    "tie_embeddings": True,
    "qk_norm": False,
    "zero_init_output": False,
}
# Radford et al. 2018: a post-norm gpt2. GELU in the tanh form, as the published code computes it.
_GPT1: dict[str, Any] = {**_GPT2, "norm_position": "post"}
# Brown et al. 2020: gpt2 with alternating dense and locally banded attention. The paper gives no
# width of the band; 256 and the missing q, k, v biases are GPT-Neo's, which runs such models.
_GPT3: dict[str, Any] = {**_GPT2, "qkv_bias": False, "window": [0, 256]}
# Touvron et al. 2023.
_LLAMA: dict[str, Any] = {
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "position": "rope",
    "activation": "silu",
    "gated": True,
    "bias": False,
    "tie_embeddings": False,
    "qk_norm": False,
    "zero_init_output": False,
}
# The Llama block with QK-norm (Henry et al. 2020) and zero-initialised output projections.
_MODERN: dict[str, Any] = {**_LLAMA, "qk_norm": True, "zero_init_output": True}
_QWEN3: dict[str, Any] = {**_MODERN, "head_dim": 128, "rope_theta": 1e6, "block_size": 40960}


def _shape(
    switches: dict[str, Any], n_layer: int, n_head: int, n_embd: int, **more: Any
) -> dict[str, Any]:
    return {**switches, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **more}


PRESETS: dict[str, dict[str, Any]] = {
    "modern": _MODERN,
    # Layers, heads and widths of gpt2, -medium and -large; sizes with gpt2's vocabulary.
    "modern-162m": _shape(_MODERN, 12, 12, 768, block_size=1024),
    "modern-407m": _shape(_MODERN, 24, 16, 1024, block_size=1024),
    "modern-838m": _shape(_MODERN, 36, 20, 1280, block_size=1024),
    # Yang et al. 2025 (Qwen3), table 1.
    "modern-0.6b": _shape(_QWEN3, 28, 16, 1024, n_kv_head=8, n_inner=3072, tie_embeddings=True),
    "modern-1.7b": _shape(_QWEN3, 28, 16, 2048, n_kv_head=8, n_inner=6144, tie_embeddings=True),
    "modern-4b": _shape(_QWEN3, 36, 32, 2560, n_kv_head=8, n_inner=9728, tie_embeddings=True),
    "modern-8b": _shape(_QWEN3, 36, 32, 4096, n_kv_head=8, n_inner=12288),
    "llama": _LLAMA,
    # Allal et al. 2025 (SmolLM2), as its base models were released.
    "llama-135m": _shape(
        _LLAMA,
        30,
        9,
        576,
        n_kv_head=3,
        n_inner=1536,
        block_size=8192,
        norm_eps=1e-5,
        rope_theta=1e5,
        tie_embeddings=True,
    ),
    "llama-360m": _shape(
        _LLAMA,
        32,
        15,
        960,
        n_kv_head=5,
        n_inner=2560,
        block_size=8192,
        norm_eps=1e-5,
        rope_theta=1e5,
        tie_embeddings=True,
    ),
    # Touvron et al. 2023, table 2.
    "llama-7b": _shape(_LLAMA, 32, 32, 4096, n_inner=11008, block_size=2048),
    "llama-13b": _shape(_LLAMA, 40, 40, 5120, n_inner=13824, block_size=2048),
    "llama-33b": _shape(_LLAMA, 60, 52, 6656, n_inner=17920, block_size=2048),
    "llama-65b": _shape(_LLAMA, 80, 64, 8192, n_inner=22016, block_size=2048),
    "gpt1": _shape(_GPT1, 12, 12, 768, block_size=512),
    # Radford et al. 2019, table 2.
    "gpt2": _shape(_GPT2, 12, 12, 768, block_size=1024),
    "gpt2-medium": _shape(_GPT2, 24, 16, 1024, block_size=1024),
    "gpt2-large": _shape(_GPT2, 36, 20, 1280, block_size=1024),
    "gpt2-xl": _shape(_GPT2, 48, 25, 1600, block_size=1024),
    # Brown et al. 2020, table 2.1. Two of its rows do not divide and are corrected: 24 heads of 128
    # at 1.3B (n_embd 2048) become 16, and n_embd 5140 at 13B (40 heads of 128) becomes 5120.
    "gpt3-small": _shape(_GPT3, 12, 12, 768, block_size=2048),
    "gpt3-medium": _shape(_GPT3, 24, 16, 1024, block_size=2048),
    "gpt3-large": _shape(_GPT3, 24, 16, 1536, block_size=2048),
    "gpt3-xl": _shape(_GPT3, 24, 16, 2048, block_size=2048),
    "gpt3-2.7b": _shape(_GPT3, 32, 32, 2560, block_size=2048),
    "gpt3-6.7b": _shape(_GPT3, 32, 32, 4096, block_size=2048),
    "gpt3-13b": _shape(_GPT3, 40, 40, 5120, block_size=2048),
    "gpt3-175b": _shape(_GPT3, 96, 96, 12288, block_size=2048),
}
