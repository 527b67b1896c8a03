"""config.json in and out."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gptcli.config.model_schema import ModelConfig, RopeScaling
from gptcli.config.presets import PRESETS
from gptcli.errors import CheckpointError
from gptcli.interop.hf_config import ARCHITECTURES, family_of, hf_config, read_config

transformers = pytest.importorskip("transformers")

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 99}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}


def computed(model: ModelConfig) -> dict[str, Any]:
    """All that changes what a model computes; keys that mean the same are equal."""
    scaling = model.rope_scaling
    rope = None
    if scaling is not None:
        names = {
            "linear": (),
            "dynamic": ("original_block_size",),
            "llama3": ("original_block_size", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_block_size", "beta_fast", "beta_slow", "attention_factor"),
        }[scaling.kind]
        rope = (scaling.kind, scaling.factor, [getattr(scaling, name) for name in names])
    plain = """n_layer n_head kv_heads n_embd head_size inner_size block_size norm norm_position
        norm_eps position activation gated bias tie_embeddings qk_norm windows""".split()  # noqa: SIM905
    return {name: getattr(model, name) for name in plain} | {
        "qkv_bias": model.bias if model.qkv_bias is None else model.qkv_bias,
        "theta": model.rope_theta if model.position == "rope" else None,
        "rope": rope,
    }


def draw_rope(rng: random.Random, block: int) -> tuple[RopeScaling | None, int]:
    """A scaling and the block size to go with it, which for dynamic is not always possible."""
    kind: Any = rng.choice([None, "linear", "dynamic", "llama3", "yarn"])
    if kind is None:
        return None, block
    factor = rng.choice([1.0, 2.0, 2.5, 8.0])
    more: dict[str, Any] = {"low_freq_factor": 1.5} if kind == "llama3" else {}
    if kind == "yarn":
        more = {"beta_fast": 30.0, "attention_factor": rng.choice([None, 1.25])}
    reach = int(factor * block) if rng.random() < 0.8 else block + 1
    scaling = RopeScaling(kind=kind, factor=factor, original_block_size=block, **more)
    return scaling, reach if kind == "dynamic" else block


def draw(rng: random.Random) -> ModelConfig | None:
    """Any model, half of them near a family's; None where the schema refuses it."""
    preset = rng.choice(["gpt1", "gpt2", "gpt3-small", "llama", "modern"])
    values: dict[str, Any] = {"preset": preset, "n_layer": rng.choice([1, 2, 3, 4, 6])}
    values |= {"n_head": rng.choice([2, 4]), "n_embd": rng.choice([16, 24, 30])}
    values |= {"block_size": rng.choice([8, 33]), "dropout": rng.choice([0.0, 0.1])}
    switches: dict[str, list[Any]] = {
        "n_kv_head": [None, 1, 2],
        "head_dim": [None, 6, 8],
        "n_inner": [None, 40, 64],
        "norm_eps": [1e-5, 1e-6],
        "rope_theta": [10000.0, 1e6],
        "tie_embeddings": [True, False],
        "activation": ["relu", "gelu", "gelu_tanh", "silu", "relu2"],
        "gated": [True, False],
        "bias": [True, False],
        "qkv_bias": [None, True, False],
        "qk_norm": [True, False],
        "window": [None, [0], [5], [0, 5], [5, 0, 0], [3, 5]],
        "norm": ["layernorm", "rmsnorm"],
        "norm_position": ["pre", "post"],
        "position": ["learned", "rope", "sinusoidal", "none"],
    }
    for key, choices in switches.items():
        if rng.random() < 0.15:
            values[key] = rng.choice(choices)
    if PRESETS[preset]["position"] == "rope" and rng.random() < 0.5:
        values["rope_scaling"], values["block_size"] = draw_rope(rng, values["block_size"])
    try:
        return ModelConfig(**values)
    except ValidationError:
        return None


def test_every_accepted_model_comes_back() -> None:
    """A key that goes out and is not read back, or is read differently, changes the model."""
    rng = random.Random(4)
    families: Counter[str] = Counter()
    for model in filter(None, (draw(rng) for _ in range(4000))):
        try:
            family = family_of(model)
        except CheckpointError:
            families["none"] += 1
            continue
        families[family] += 1
        raw = json.loads(json.dumps(hf_config(model, 77)))
        found = read_config(raw, "here")
        assert (found.family, found.vocab_size, found.zeros) == (family, 77, ())
        assert computed(found.model) == computed(model)
        assert family_of(found.model) == family
    assert all(families[family] >= 10 for family in [*ARCHITECTURES, "none"]), families


def test_transformers_reads_the_same_from_what_we_write(tmp_path: Path) -> None:
    """A key that transformers overlooks, or completes otherwise, makes it another model."""
    rng = random.Random(5)
    for model in filter(None, (draw(rng) for _ in range(100))):
        try:
            raw = hf_config(model, 77)
        except CheckpointError:
            continue
        (tmp_path / "config.json").write_text(json.dumps(raw))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert theirs.architectures == [ARCHITECTURES[family_of(model)]]
        again = read_config(json.loads(theirs.to_json_string(use_diff=False)), "here")
        assert computed(again.model) == computed(model)


_GPT_SIZES = ("vocab_size", "n_embd", "n_layer", "n_head")
_ROTARY_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
REQUIRED = {
    "openai-gpt": _GPT_SIZES,
    "gpt2": _GPT_SIZES,
    "gpt_neo": ("vocab_size", "hidden_size", "num_layers", "num_heads"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), (*_ROTARY_SIZES, "intermediate_size")),
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_missing_keys_mean_what_transformers_takes_them_for(family: str) -> None:
    """transformers leaves out keys with default values, and its defaults differ by family."""
    made = transformers.AutoConfig.for_model(family)
    whole = read_config(json.loads(made.to_json_string(use_diff=False)), "here")
    given = {key: made.to_dict()[key] for key in REQUIRED[family]}
    bare = read_config({"model_type": family, **given}, "here")
    assert (computed(bare.model), bare.vocab_size) == (computed(whole.model), whole.vocab_size)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_sizes_that_are_missing_are_named(family: str) -> None:
    """The family's default for one is told as hundreds of tensors of a wrong shape."""
    with pytest.raises(CheckpointError) as caught:
        read_config({"model_type": family}, "here")
    expected = "; ".join(f"{key} is missing" for key in REQUIRED[family])
    assert sorted(caught.value.message.removeprefix("here: ").split("; ")) == sorted(
        expected.split("; ")
    )


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": 50256,
            "embd_pdrop": 0.1,
            "eos_token_id": 50256,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        {"preset": "gpt2"},
    ),
    "openai-gpt": (
        {
            "afn": "gelu",
            "architectures": ["OpenAIGPTLMHeadModel"],
            "attn_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "openai-gpt",
            "n_ctx": 512,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 512,
            "n_special": 0,
            "predict_special_tokens": True,
            "resid_pdrop": 0.1,
            "vocab_size": 40478,
        },
        {"preset": "gpt1"},
    ),
    "gpt-neo-125m": (
        {
            "activation_function": "gelu_new",
            "attention_dropout": 0,
            "attention_layers": ["global", "local"] * 6,
            "attention_types": [[["global", "local"], 6]],
            "embed_dropout": 0,
            "gradient_checkpointing": False,
            "hidden_size": 768,
            "intermediate_size": None,
            "layer_norm_epsilon": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neo",
            "num_heads": 12,
            "num_layers": 12,
            "resid_dropout": 0,
            "use_cache": True,
            "vocab_size": 50257,
            "window_size": 256,
        },
        {"preset": "gpt3-small"},
    ),
    "Llama-3.1-8B": (
        {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 128256,
        },
        {
            "preset": "llama",
            "n_layer": 32,
            "n_head": 32,
            "n_kv_head": 8,
            "n_embd": 4096,
            "n_inner": 14336,
            "block_size": 131072,
            "norm_eps": 1e-5,
            "rope_theta": 5e5,
            "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_block_size=8192),
        },
    ),
    "SmolLM2-135M": (
        {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": 49152,
        },
        {"preset": "llama-135m"},
    ),
    "Mistral-7B-v0.1": (
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {
            "preset": "llama",
            "n_layer": 32,
            "n_head": 32,
            "n_kv_head": 8,
            "n_embd": 4096,
            "n_inner": 14336,
            "block_size": 32768,
            "norm_eps": 1e-5,
            "window": [4096],
        },
    ),
    "Qwen2.5-0.5B": (
        {
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {
            "preset": "llama",
            "n_layer": 24,
            "n_head": 14,
            "n_kv_head": 2,
            "n_embd": 896,
            "n_inner": 4864,
            "block_size": 32768,
            "rope_theta": 1e6,
            "qkv_bias": True,
            "tie_embeddings": True,
        },
    ),
    "Qwen3-0.6B": (
        {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"preset": "modern-0.6b"},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    """A strict list of keys refuses real models when a key of theirs is not on it."""
    raw, ours = PUBLISHED[name]
    found = read_config(raw, name)
    assert computed(found.model) == computed(ModelConfig(**ours))
    assert found.vocab_size == raw["vocab_size"]


ROPES: list[dict[str, Any]] = [
    {},
    {"type": "linear", "factor": 4},
    {"type": "dynamic", "factor": 2.5},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "finetuned": True},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5, "beta_fast": 20},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("scaling", ROPES, ids=str)
def test_old_and_new_form_of_positions_mean_the_same(scaling: dict[str, Any]) -> None:
    """Files older than transformers 5 spell positions differently."""
    old = read_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling or None}, "old")
    renamed = {"rope_type": scaling.get("type", "default"), **scaling}
    renamed.pop("type", None)
    new = read_config({**LLAMA, "rope_parameters": {**renamed, "rope_theta": 5e5}}, "new")
    assert old.model == new.model
    assert old.model.rope_theta == 5e5
    assert (old.model.rope_scaling is None) == (not scaling)
    both = {"rope_parameters": {**renamed, "rope_theta": 5e5}, "rope_scaling": scaling}
    assert read_config({**LLAMA, **both}, "both").model == new.model


def test_yarn_factor_is_transformers() -> None:
    """DeepSeek's two scales and a missing factor change by how much attention is sharpened."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for scaling in (r for r in ROPES if "yarn" in r.values()):
        raw = {**LLAMA, "rope_scaling": dict(scaling)}
        ours = read_config(raw, "here").model.rope_scaling
        assert ours is not None
        made = transformers.LlamaConfig(**{**LLAMA, "rope_scaling": dict(scaling)})
        theirs = ROPE_INIT_FUNCTIONS["yarn"](made, "cpu")[1]
        again = ours.attention_factor
        if again is None:  # the schema's formula, which the decoder uses
            plain = transformers.LlamaConfig(
                **LLAMA,
                rope_scaling={
                    "rope_type": "yarn",
                    "factor": ours.factor,
                    "original_max_position_embeddings": ours.original_block_size,
                },
            )
            again = ROPE_INIT_FUNCTIONS["yarn"](plain, "cpu")[1]
        assert again == pytest.approx(theirs, rel=1e-12), scaling


def test_dynamic_reaches_factor_times_further() -> None:
    """max_position_embeddings of such a file is the training's length, not where the model ends."""
    raw = {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.5}}
    model = read_config(raw, "here").model
    assert model.rope_scaling is not None
    assert (model.rope_scaling.original_block_size, model.block_size) == (64, 160)
    assert hf_config(model, 9)["max_position_embeddings"] == 64


def test_mixed_biases_are_zeros() -> None:
    """LLaMA has one switch for attention and one for the rest; ours is one."""
    attention = read_config({**LLAMA, "attention_bias": True}, "here")
    assert attention.model.bias
    assert set(attention.zeros) == {".gate_proj.bias", ".up_proj.bias", ".down_proj.bias"}
    mlp = read_config({**LLAMA, "mlp_bias": True}, "here")
    assert mlp.model.bias
    assert ".q_proj.bias" in mlp.zeros
    assert read_config({**LLAMA, "mlp_bias": True, "attention_bias": True}, "here").zeros == ()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gemma3"}, "gemma3.*gpt2.*qwen3"),
    ({"vocab_size": 9}, "no model_type"),
    ({"model_type": ["gpt2"]}, "unknown"),
    ({**GPT2, "auto_map": {"AutoModel": "x.Y"}}, "auto_map.*code"),
    ({**GPT2, "mup_scale": 0}, "unknown keys: mup_scale"),
    ({**GPT2, "one": 1, "two": "x", "off": None, "no": False}, "unknown keys: one, two$"),
    ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights is false; it must be true"),
    ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is true"),
    ({**GPT2, "add_cross_attention": True}, "add_cross_attention"),
    ({**GPT2, "activation_function": "quick_gelu"}, "activation_function is 'quick_gelu'"),
    ({**GPT2, "n_head": True}, "n_head is true; it must be a whole number"),
    ({**GPT2, "n_head": 4.0}, "n_head is 4.0"),
    ({**GPT2, "n_head": "4"}, "n_head is '4'"),
    ({**GPT2, "n_head": 0}, "n_head is 0"),
    ({**GPT2, "n_head": 3}, "n_embd 32 is not divisible by n_head 3"),
    ({**GPT2, "n_layer": 10**9}, "n_layer is 1000000000; it must be a whole number from 1 to"),
    ({**GPT2, "vocab_size": 10**30}, "vocab_size"),
    ({**GPT2, "layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
    ({**GPT2, "hidden_size": 64}, "n_embd and hidden_size differ"),
    ({**GPT2, "tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
    ({**LLAMA, "hidden_act": "relu"}, "hidden_act is 'relu'; it must be silu"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config"),
    ({**LLAMA, "max_position_embeddings": 2**31 - 1}, "too many"),
    ({**LLAMA, "rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'; it must be"),
    ({**LLAMA, "rope_scaling": {"rope_type": "mrope", "mrope_section": [2, 2]}}, "mrope"),
    ({**LLAMA, "rope_scaling": [2]}, "rope_scaling is .*it must be an object"),
    ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_scaling.factor: .*required"),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor is -1"),
    (
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 0.5}},
        "scaling.factor: .*equal to 1",
    ),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "rope_scaling.x"),
    (
        {**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}},
        "truncate is false",
    ),
    ({**LLAMA, "rope_scaling": {"type": "llama3", "factor": 2}}, "low_freq_factor is null"),
    (
        {
            **LLAMA,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
        "rope_parameters and rope_scaling differ in rope_type, factor",
    ),
    (
        {
            **LLAMA,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20},
            "rope_scaling": {"type": "yarn", "factor": 4.0},
        },
        "rope_parameters and rope_scaling differ in beta_fast",
    ),
    (
        {**LLAMA, "rope_parameters": {"rope_type": "default"}, "rope_scaling": [2]},
        "rope_scaling is .*it must be an object",
    ),
    (
        {
            **LLAMA,
            "rope_theta": 1e4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 9.0},
        },
        "rope_theta",
    ),
    (
        {**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters.full_attention",
    ),
    (
        {
            "model_type": "gpt_neo",
            "hidden_size": 32,
            "num_heads": 4,
            "num_layers": 3,
            "attention_types": [[["global", "local"], 10**9]],
        },
        "of 2000000000 layers, num_layers is 3",
    ),
    (
        {"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["global", "odd"], 1]]},
        "attention_types is",
    ),
    (
        {
            "model_type": "gpt_neo",
            "num_layers": 12,
            "attention_types": [[["global", "local"], 6], [[], 10**12]],
        },
        "attention_types is .*10000000",
    ),
    ({"model_type": "gpt_neo", "num_layers": 2, "attention_types": [["", 10**12]]}, "_types is"),
    ({"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["local"], 0]]}, "_types is"),
    ({"model_type": "gpt_neo", "num_layers": 2, "attention_layers": 7}, "attention_types is"),
    ({**LLAMA, "model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types"),
    (
        {**LLAMA, "model_type": "qwen2", "layer_types": ["sliding_attention"] * 4},
        "layer_types.*use_sliding_window",
    ),
]


@pytest.mark.parametrize(("raw", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_cannot_be_computed_is_refused(raw: dict[str, Any], reason: str) -> None:
    """A key that is passed over gives a model that runs and computes something else."""
    with pytest.raises(CheckpointError, match=f"^here: .*{reason}"):
        read_config(raw, "here")


ROPE_RULES: list[tuple[dict[str, Any], str]] = [
    ({"rope_type": "yarn", "beta_fast": 1, "beta_slow": 1}, "beta_fast 1 above beta_slow 1"),
    ({"rope_type": "yarn", "rope_theta": 1.0}, "yarn needs rope_theta above 1"),
    ({"rope_type": "yarn", "original_max_position_embeddings": 128}, "rope_scaling.factor: "),
    (
        {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        "high_freq_factor 1 above low_freq_factor 4",
    ),
]


@pytest.mark.parametrize(("keys", "reason"), ROPE_RULES, ids=[reason for _, reason in ROPE_RULES])
def test_rules_of_our_positions_are_told_as_those_of_the_file(
    keys: dict[str, Any], reason: str
) -> None:
    """A rule that only our schema knows, broken by a file, would look like a fault of gpt's."""
    factor = {} if "original_max_position_embeddings" in keys else {"factor": 2.0}
    with pytest.raises(CheckpointError, match=f"^here: .*{reason}"):
        read_config({**LLAMA, "rope_parameters": {**factor, **keys}}, "here")


def test_dynamic_with_heads_of_two_numbers_is_refused() -> None:
    """Its exponent D / (D - 2) has no value; every problem of such a file is in one line."""
    raw = {**LLAMA, "head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    with pytest.raises(CheckpointError, match=r"^here: rope_scaling dynamic needs a"):
        read_config(raw, "here")
    with pytest.raises(CheckpointError, match="by n_kv_head 3; rope_scaling dynamic") as caught:
        read_config({**raw, "num_key_value_heads": 3}, "here")
    assert "\n" not in caught.value.message


NO_TWIN: list[tuple[dict[str, Any], str]] = [
    ({"preset": "llama", "activation": "relu"}, "activation relu"),
    ({"preset": "llama", "gated": False}, "gated false"),
    ({"preset": "llama", "norm_position": "post"}, "norm_position post"),
    ({"preset": "llama", "position": "none"}, "position none"),
    ({"preset": "llama", "bias": True, "window": 5}, "bias true beside window"),
    ({"preset": "llama", "window": [0, 5]}, "window in some layers only"),
    ({"preset": "llama", "bias": True, "qkv_bias": False}, "qkv_bias false"),
    ({"preset": "modern", "window": [3, 5]}, r"windows of several widths \(3, 5\)"),
    ({"preset": "modern", "bias": True}, "bias true"),
    ({"preset": "modern", "norm": "layernorm"}, "position rope.*qk_norm true"),
    ({"preset": "gpt2", "position": "sinusoidal"}, "position sinusoidal"),
    ({"preset": "gpt2", "activation": "relu2"}, "activation relu2"),
    ({"preset": "gpt2", "bias": False}, "bias false"),
    ({"preset": "gpt2", "window": 5}, "window beside qkv_bias true"),
    ({"preset": "gpt2", "n_kv_head": 1}, "n_kv_head 1 beside n_head 12"),
    ({"preset": "gpt1", "n_inner": 96}, "n_inner 96 other than 4 n_embd"),
    ({"preset": "gpt1", "activation": "gelu"}, "activation gelu .its own is gelu_tanh"),
    ({"preset": "gpt1", "window": 5}, "window"),
]


@pytest.mark.parametrize(("values", "reason"), NO_TWIN, ids=[reason for _, reason in NO_TWIN])
def test_a_model_without_twin_is_refused_with_the_reason(
    values: dict[str, Any], reason: str
) -> None:
    """An export to the closest family would compute something else there, unnoticed."""
    with pytest.raises(CheckpointError, match=reason):
        family_of(ModelConfig(n_layer=4, **values))


def test_dynamic_block_sizes_that_no_file_can_say_are_refused() -> None:
    """Such a file says only the factor and the length of the training."""
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_block_size=64)
    assert family_of(ModelConfig(preset="llama", block_size=128, rope_scaling=scaling)) == "llama"
    with pytest.raises(CheckpointError, match="= 128 tokens there, not block_size 100"):
        family_of(ModelConfig(preset="llama", block_size=100, rope_scaling=scaling))


def test_presets_go_to_the_family_that_was_promised() -> None:
    """DESIGN's table of twins is what users read."""
    promised = {"gpt1": "openai-gpt", "gpt2": "gpt2", "gpt3": "gpt_neo", "llama": "llama"}
    promised["modern"] = "qwen3"
    for preset in PRESETS:
        assert family_of(ModelConfig(preset=preset)) == promised[preset.split("-")[0]]
