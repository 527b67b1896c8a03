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
_MODERN: dict[str, Any] = {
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "position": "rope",
    "activation": "silu",
    "gated": True,
    "bias": False,
    "tie_embeddings": False,
    "qk_norm": True,
    "zero_init_output": True,
}


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> dict[str, Any]:
    return {**_GPT2, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": 1024}


# gpt2: Radford et al. 2019, table 2. modern: the Llama block (Touvron et al. 2023) with QK-norm
# (Henry et al. 2020) and zero-initialised output projections.
PRESETS: dict[str, dict[str, Any]] = {
    "modern": _MODERN,
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
}
