"""What the keys of a Hugging Face config.json mean in our config, family by family.

The sizes of the matrices must be given. For what published files may lack, the values are those of
transformers' config classes.
"""

from collections.abc import Callable
from typing import Any

from gptcli.interop.fit import MAX_POSITION_NUMBERS
from gptcli.interop.hf_keys import Keys
from gptcli.interop.hf_rope import read_rope

_MOST_LAYERS = 2**16  # some settings are listed layer by layer
_VOCABULARIES = {
    "openai-gpt": 40478,
    "gpt2": 50257,
    "gpt_neo": 50257,
    "llama": 32000,
    "mistral": 32000,
    "qwen2": 151936,
    "qwen3": 151936,
}
_ROTARY_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"n_kv_head": 0, "n_inner": 11008, "block_size": 2048, "head_dim": 0},
    "mistral": {"n_kv_head": 8, "n_inner": 14336, "block_size": 131072, "head_dim": 0},
    "qwen2": {"n_kv_head": 32, "n_inner": 22016, "block_size": 32768, "head_dim": 0},
    "qwen3": {"n_kv_head": 32, "n_inner": 22016, "block_size": 32768, "head_dim": 128},
}
_LEARNED: dict[str, Any] = {
    "norm": "layernorm",
    "position": "learned",
    "rope_scaling": None,
    "gated": False,
    "bias": True,
    "qk_norm": False,
    "n_kv_head": None,
    "head_dim": None,
}
_SHARED = {"relu": "relu", "silu": "silu", "swish": "silu"}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    **_SHARED,
}
# transformers' OpenAIGPT calls the tanh form "gelu", as the code published in 2018 did.
_GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", **_SHARED}
_SILU = {"silu": "silu", "swish": "silu"}

Values = tuple[dict[str, Any], tuple[str, ...]]


def read_vocab_size(keys: Keys, family: str) -> int:
    """Rows of the embedding."""
    return keys.required("vocab_size", _VOCABULARIES[family])


def read_values(keys: Keys, family: str) -> Values:
    """The fields of `ModelConfig`, and the endings of names of tensors that are zero (`HFConfig`).

    What is wrong is noted in `keys.problems`.
    """
    return _READERS[family](keys, family)


def _read_gpt(keys: Keys, family: str) -> Values:
    n_embd = keys.required("n_embd", 768)
    first = family == "openai-gpt"
    if first:
        activation = keys.choice("afn", "gelu", _GPT1_ACTIVATIONS)
    else:
        activation = keys.choice("activation_function", "gelu_new", _ACTIVATIONS)
        keys.must_be("scale_attn_weights", True)
        keys.must_be("scale_attn_by_inverse_layer_idx", False)
        keys.must_be("add_cross_attention", False)
    return {
        **_LEARNED,
        "n_layer": keys.required("n_layer", 12, most=_MOST_LAYERS),
        "n_head": keys.required("n_head", 12),
        "n_embd": n_embd,
        "n_inner": 4 * n_embd if first else keys.size("n_inner", 4 * n_embd),
        "block_size": keys.size("n_positions", 512 if first else 1024),
        "norm_position": "post" if first else "pre",
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "activation": activation,
        "qkv_bias": None,
        "window": None,
        "tie_embeddings": keys.flag("tie_word_embeddings", True),
    }, ()


def _read_neo(keys: Keys, family: str) -> Values:
    n_embd = keys.required("hidden_size", 2048)
    n_layer = keys.required("num_layers", 24, most=_MOST_LAYERS)
    width = keys.size("window_size", 256)
    kinds = _neo_kinds(keys, n_layer)
    return {
        **_LEARNED,
        "n_layer": n_layer,
        "n_head": keys.required("num_heads", 16),
        "n_embd": n_embd,
        "n_inner": keys.size("intermediate_size", 4 * n_embd),
        "block_size": keys.size("max_position_embeddings", 2048),
        "norm_position": "pre",
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "activation": keys.choice("activation_function", "gelu_new", _ACTIVATIONS),
        "qkv_bias": False,
        "window": _shortest([width if kind == "local" else 0 for kind in kinds]),
        "tie_embeddings": keys.flag("tie_word_embeddings", True),
    }, ()


def _neo_kinds(keys: Keys, n_layer: int) -> list[str]:
    """ "global" or "local" for each layer."""
    types, listed = keys.get("attention_types"), keys.get("attention_layers")
    if types is None:
        types = [[["global", "local"], 12]] if listed is None else [[listed, 1]]
    try:
        total = 0
        for kinds, repeats in types:
            if type(repeats) is not int or repeats < 1:
                raise ValueError
            if type(kinds) is not list or not kinds or not {*kinds} <= {"global", "local"}:
                raise ValueError  # an empty list could be repeated 10^12 times
            total += len(kinds) * repeats
        if total != n_layer:  # before the list is made: it may be a long one
            keys.problems.append(f"attention_types are of {total} layers, num_layers is {n_layer}")
            return []
        found = [kind for kinds, repeats in types for _ in range(repeats) for kind in kinds]
    except (TypeError, ValueError):
        keys.wrong("attention_types", types, 'a list like [[["global", "local"], 6]]')
        return []
    if listed is not None and listed != found:
        keys.problems.append("attention_types and attention_layers differ")
    return found


def _read_rotary(keys: Keys, family: str) -> Values:
    default = _ROTARY_DEFAULTS[family]
    n_embd, n_head = keys.required("hidden_size", 4096), keys.required("num_attention_heads", 32)
    n_layer = keys.required("num_hidden_layers", 32, most=_MOST_LAYERS)
    n_kv_head = keys.size("num_key_value_heads", default["n_kv_head"] or n_head)
    if keys.is_null("num_key_value_heads"):
        n_kv_head = n_head
    attention_bias = family in ("llama", "qwen3") and keys.flag("attention_bias", False)
    mlp_bias = family == "llama" and keys.flag("mlp_bias", False)
    keys.choice("hidden_act", "silu", _SILU)
    head_dim = keys.size("head_dim", default["head_dim"] or max(n_embd // n_head, 1))
    rope = read_rope(keys, keys.size("max_position_embeddings", default["block_size"]))
    if rope.block_size * head_dim > MAX_POSITION_NUMBERS:
        keys.problems.append(f"{rope.block_size} positions of heads of {head_dim} are too many")
    return {
        "norm": "rmsnorm",
        "norm_position": "pre",
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "position": "rope",
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "block_size": rope.block_size,
        "activation": "silu",
        "gated": True,
        "bias": attention_bias or mlp_bias,
        "qkv_bias": True if family == "qwen2" else None,
        "qk_norm": family == "qwen3",
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": None if n_kv_head == n_head else n_kv_head,
        "n_embd": n_embd,
        "n_inner": keys.required("intermediate_size", default["n_inner"]),
        "head_dim": None if head_dim * n_head == n_embd else head_dim,
        "window": _rotary_window(keys, family, n_layer),
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
    }, _zero_biases(attention_bias, mlp_bias)


def _zero_biases(attention: bool, mlp: bool) -> tuple[str, ...]:
    """Our `bias` is that of all matrices: where a model has only some, the others are zero."""
    if attention == mlp:
        return ()
    names = ("gate_proj", "up_proj", "down_proj") if attention else _ATTENTION
    return tuple(f".{name}.bias" for name in names)


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _rotary_window(keys: Keys, family: str, n_layer: int) -> list[int] | None:
    if family == "llama":
        return None
    width = 0 if keys.is_null("sliding_window") else keys.size("sliding_window", 4096)
    if family == "mistral":
        return [width] if width else None
    if not keys.flag("use_sliding_window", False):
        width = 0
    first, types = keys.size("max_window_layers", 28, least=0), keys.get("layer_types")
    if types is None:
        return _shortest([width if layer >= first else 0 for layer in range(n_layer)])
    known = {"full_attention": 0, "sliding_attention": width}
    try:
        windows = [known[kind] for kind in types]
        if len(windows) != n_layer or ("sliding_attention" in types and not width):
            raise ValueError
        return _shortest(windows)
    except (TypeError, KeyError, ValueError):
        keys.wrong(
            "layer_types",
            types,
            f"full_attention or (with use_sliding_window and sliding_window) sliding_attention for"
            f" each of {n_layer} layers",
        )
        return None


def _shortest(windows: list[int]) -> list[int] | None:
    """The shortest list that gives `windows` when it is repeated; None for no window at all."""
    if not any(windows):
        return None
    for length in range(1, len(windows)):
        if windows[length:] == windows[:-length]:
            return windows[:length]
    return windows


_READERS: dict[str, Callable[[Keys, str], Values]] = {
    "openai-gpt": _read_gpt,
    "gpt2": _read_gpt,
    "gpt_neo": _read_neo,
    "llama": _read_rotary,
    "mistral": _read_rotary,
    "qwen2": _read_rotary,
    "qwen3": _read_rotary,
}
