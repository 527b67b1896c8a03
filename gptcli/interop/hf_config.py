"""Hugging Face's config.json in and out: which model of transformers is which of ours, exactly.

`read_config` comes in, `family_of` and `hf_config` go out; what cannot be computed exactly on the
other side is refused with the reason.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from gptcli.config.model_schema import ModelConfig
from gptcli.errors import CheckpointError
from gptcli.interop.hf_keys import Keys
from gptcli.interop.hf_rope import dynamic_problem, rope_keys
from gptcli.interop.hf_values import read_values, read_vocab_size

Family = Literal["openai-gpt", "gpt2", "gpt_neo", "llama", "mistral", "qwen2", "qwen3"]

ARCHITECTURES: dict[Family, str] = {
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_PRESETS: dict[Family, str] = {
    "openai-gpt": "gpt1",
    "gpt2": "gpt2",
    "gpt_neo": "gpt3-small",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "modern",
}
# Other names that transformers takes for the same keys.
_GPT_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_OTHER_NAMES: dict[str, dict[str, str]] = {
    "openai-gpt": _GPT_NAMES,
    "gpt2": _GPT_NAMES,
    "gpt_neo": {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
}
_THEIR_GELU = {"gelu_tanh": "gelu_new"}  # all other activations have our name


@dataclass(frozen=True)
class HFConfig:
    """A config.json that was read: the family, our config of the same model, and its vocabulary.

    `zeros` are endings of tensor names (`.up_proj.bias`) that the family's `layout` of `model` has
    and such a model has not: these tensors are zero.
    """

    family: Family
    model: ModelConfig
    vocab_size: int
    zeros: tuple[str, ...] = ()


def read_config(raw: dict[str, Any], where: str) -> HFConfig:
    """Our config for the config.json `raw`; keys that it may lack have transformers' defaults.

    Unknown keys are refused unless they are null or false. CheckpointError opens with `where` and
    lists everything that is wrong.
    """
    family = _known_family(raw, where)
    keys = Keys(_one_name(raw, family, where))
    vocab_size = read_vocab_size(keys, family)
    values, zeros = read_values(keys, family)
    problems, unknown = keys.problems, keys.unknown()
    if unknown:
        problems = [*problems, f"unknown keys: {', '.join(unknown)}"]
    if problems:
        hint = "a model runs exactly only if every key is known (null and false: switched off)"
        raise CheckpointError(f"{where}: {'; '.join(problems)}", hint=hint if unknown else None)
    try:
        model = ModelConfig(preset=_PRESETS[family], zero_init_output=False, dropout=0.0, **values)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {_reasons(error)}") from error
    return HFConfig(family, model, vocab_size, zeros)


def family_of(model: ModelConfig) -> Family:
    """The family of transformers that computes exactly what `model` does.

    CheckpointError with every reason when none does.
    """
    family = _closest(model)
    if problems := _problems(model, family):
        raise CheckpointError(
            "no model of transformers computes what this one does; the closest, "
            f"{ARCHITECTURES[family]}, has no " + ", no ".join(problems)
        )
    return family


def hf_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """A config.json for `model`, which `read_config` turns back into one that computes the same.

    Left to the caller: dtype, the ids of special tokens, transformers_version. CheckpointError as
    from `family_of`.
    """
    family = family_of(model)
    common = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "initializer_range": 0.02,
    }
    if family == "gpt_neo":
        return common | _neo_keys(model)
    if family in ("openai-gpt", "gpt2"):
        return common | _gpt_keys(model, family)
    return common | _rotary_keys(model, family)


def _reasons(error: ValidationError) -> str:
    """What our config has against the values, by our names of the keys."""
    found = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        text = str(problem["msg"]).removeprefix("Value error, ").replace("\n", "; ")
        found.append(f"{key}: {text}" if key else text)
    return "; ".join(found)


def _known_family(raw: dict[str, Any], where: str) -> Family:
    if raw.get("auto_map"):
        raise CheckpointError(
            f"{where}: auto_map names code that comes with the model; gpt never runs such code",
            hint="models of transformers' own families work without it",
        )
    given = raw.get("model_type")
    for family in ARCHITECTURES:
        if given == family:
            return family
    what = "no model_type" if given is None else f"model_type {str(given)[:60]!r} is unknown"
    raise CheckpointError(f"{where}: {what}; those that work: {', '.join(ARCHITECTURES)}")


def _one_name(raw: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    plain = dict(raw)
    for other, name in _OTHER_NAMES.get(family, {}).items():
        if other in plain:
            value = plain.pop(other)
            if plain.setdefault(name, value) != value:
                raise CheckpointError(f"{where}: {name} and {other} differ")
    return plain


def _closest(model: ModelConfig) -> Family:
    """The one family that could compute `model`, by the switches that tell families apart."""
    windows = set(model.windows)
    if model.norm == "layernorm":
        if model.norm_position == "post":
            return "openai-gpt"
        return "gpt2" if windows == {0} and model.has_qkv_bias else "gpt_neo"
    if model.qk_norm:
        return "qwen3"
    if model.has_qkv_bias and not model.bias:
        return "qwen2"
    # LlamaConfig refuses heads that do not divide n_embd, whatever head_dim says.
    undivided = bool(model.n_embd % model.n_head) and not model.bias
    return "mistral" if undivided or windows != {0} else "llama"


def _problems(model: ModelConfig, family: Family) -> list[str]:
    """What `model` has and `family` has not."""
    wanted = _WANTED["gpt" if family in ("openai-gpt", "gpt2", "gpt_neo") else "rotary"]
    found = [
        f"{key} {str(getattr(model, key)).lower()}"
        for key, values in wanted.items()
        if getattr(model, key) not in values
    ]
    found += _gpt_problems(model, family) if model.norm == "layernorm" else []
    found += _rotary_problems(model, family) if model.norm == "rmsnorm" else []
    widths = set(model.windows) - {0}
    if len(widths) > 1:
        found.append(f"windows of several widths ({', '.join(map(str, sorted(widths)))})")
    return found


_WANTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt": {
        "position": ("learned",),
        "gated": (False,),
        "bias": (True,),
        "qk_norm": (False,),
        "activation": ("relu", "gelu", "gelu_tanh", "silu"),
    },
    "rotary": {
        "position": ("rope",),
        "norm_position": ("pre",),
        "gated": (True,),
        "activation": ("silu",),
    },
}


def _gpt_problems(model: ModelConfig, family: Family) -> list[str]:
    found = []
    if model.kv_heads != model.n_head:
        found.append(f"n_kv_head {model.kv_heads} beside n_head {model.n_head}")
    if model.head_size * model.n_head != model.n_embd:
        found.append(f"head_dim {model.head_size} beside n_embd {model.n_embd}")
    if family == "gpt_neo" and model.has_qkv_bias:
        found.append("window beside qkv_bias true")
    if family == "openai-gpt":
        if not model.has_qkv_bias:
            found.append("qkv_bias false")
        if any(model.windows):
            found.append("window")
        if model.inner_size != 4 * model.n_embd:
            found.append(f"n_inner {model.inner_size} other than 4 n_embd")
        if model.activation == "gelu":
            found.append("activation gelu (its own is gelu_tanh)")
    return found


def _rotary_problems(model: ModelConfig, family: Family) -> list[str]:
    found = []
    if model.bias and family != "llama":
        found.append("bias true" + (" beside window" if family == "mistral" else ""))
    if model.has_qkv_bias != model.bias and family != "qwen2":
        found.append(f"qkv_bias {str(model.has_qkv_bias).lower()}")
    if family == "llama" and model.n_embd % model.n_head:
        found.append(f"n_head {model.n_head} that does not divide n_embd {model.n_embd}")
    if family == "mistral" and len(set(model.windows)) > 1:
        found.append("window in some layers only")
    if problem := dynamic_problem(model):
        found.append(problem)
    return found


def _gpt_keys(model: ModelConfig, family: Family) -> dict[str, Any]:
    activation = _THEIR_GELU.get(model.activation, model.activation)
    keys: dict[str, Any] = {
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_positions": model.block_size,
        "layer_norm_epsilon": model.norm_eps,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), model.dropout),
    }
    if family == "openai-gpt":
        return keys | {"afn": "gelu" if activation == "gelu_new" else activation}
    return keys | {
        "n_inner": model.inner_size,
        "activation_function": activation,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    }


def _neo_keys(model: ModelConfig) -> dict[str, Any]:
    kinds = ["local" if window else "global" for window in model.windows]
    length = len(model.window or [0])
    if model.n_layer % length:
        length = model.n_layer
    return {
        "hidden_size": model.n_embd,
        "num_layers": model.n_layer,
        "num_heads": model.n_head,
        "intermediate_size": model.inner_size,
        "max_position_embeddings": model.block_size,
        "attention_types": [[kinds[:length], model.n_layer // length]],
        "window_size": max(model.windows) or 256,
        "activation_function": _THEIR_GELU.get(model.activation, model.activation),
        "layer_norm_epsilon": model.norm_eps,
        **dict.fromkeys(("attention_dropout", "embed_dropout", "resid_dropout"), model.dropout),
    }


def _rotary_keys(model: ModelConfig, family: Family) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "hidden_size": model.n_embd,
        "intermediate_size": model.inner_size,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "attention_dropout": model.dropout,
        **rope_keys(model),
    }
    width = max(model.windows) or None
    if family == "llama":
        return keys | {"attention_bias": model.bias, "mlp_bias": model.bias}
    if family == "mistral":
        return keys | {"sliding_window": width}
    keys |= {"use_sliding_window": width is not None, "sliding_window": width}
    if width is not None:
        kinds = ["sliding_attention" if window else "full_attention" for window in model.windows]
        # Older readers know no layer_types: the layers from max_window_layers on have the window.
        keys |= {"layer_types": kinds, "max_window_layers": kinds.index("sliding_attention")}
    return keys | ({"attention_bias": False} if family == "qwen3" else {})
