"""The table of names and shapes, against models of transformers themselves."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.config.model_schema import ModelConfig
from gptcli.interop.hf_config import HFConfig, hf_config, read_config
from gptcli.interop.hf_weights import layout, our_shape, plain_name, to_ours, to_theirs
from gptcli.model.gpt import GPT

transformers = pytest.importorskip("transformers")

VOCAB = 37
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 24, "block_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "openai-gpt": {"preset": "gpt1"},
    "openai-gpt-relu": {"preset": "gpt1", "activation": "relu", "tie_embeddings": False},
    "gpt2": {"preset": "gpt2", "n_inner": 40},
    "gpt2-untied": {"preset": "gpt2", "tie_embeddings": False, "activation": "gelu"},
    "gpt_neo": {"preset": "gpt3-small", "window": [0, 5], "n_inner": None},
    "llama": {"preset": "llama", "n_kv_head": 2},
    "llama-bias": {"preset": "llama", "bias": True, "tie_embeddings": True},
    "mistral": {"preset": "llama", "n_kv_head": 2, "window": 5},
    "mistral-heads": {"preset": "llama", "n_head": 5, "head_dim": 6},
    "qwen2": {"preset": "llama", "n_kv_head": 2, "qkv_bias": True, "window": [0, 5]},
    "qwen3": {"preset": "modern", "n_kv_head": 2, "head_dim": 8},
    "qwen3-window": {"preset": "modern", "window": [5, 0], "tie_embeddings": True},
}


def twin_of(model: ModelConfig) -> Any:
    """transformers' model for the config.json we write, random in all its weights."""
    raw = hf_config(model, VOCAB)
    made = transformers.AutoConfig.for_model(**raw)
    twin = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.normal_(0.0 if parameter.ndim > 1 else 0.5, 0.2, generator=generator)
    return twin


def config_of(name: str) -> HFConfig:
    model = ModelConfig(**{**SMALL, **MODELS[name]})
    return read_config(json.loads(json.dumps(hf_config(model, VOCAB))), "here")


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[HFConfig, Any]:
    config = config_of(request.param)
    assert config.family == request.param.split("-")[0] or "openai" in request.param
    return config, twin_of(config.model)


def test_names_and_shapes_are_those_of_transformers(pair: tuple[HFConfig, Any]) -> None:
    """A name that transformers does not know is dropped there for a fresh weight."""
    config, twin = pair
    table = layout(config.model, VOCAB, config.family)
    found = {part.name: part.shape for parts in table.values() for part in parts}
    expected = {name: tuple(p.shape) for name, p in twin.named_parameters()}  # tied ones once
    assert found == expected


def test_the_table_is_that_of_our_parameters(pair: tuple[HFConfig, Any]) -> None:
    """Importing writes the tensors in this order, without looking at the model again."""
    config, _ = pair
    ours = GPT(config.model, VOCAB)
    table = layout(config.model, VOCAB, config.family)
    expected = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert {name: our_shape(parts) for name, parts in table.items()} == expected
    assert list(table) == list(expected)


def test_logits_agree_and_weights_come_back(pair: tuple[HFConfig, Any]) -> None:
    """A tensor that is turned, cut or scaled the wrong way fits, and computes something else."""
    config, twin = pair
    state = twin.state_dict()
    ours = GPT(config.model, VOCAB).eval()
    table = layout(config.model, VOCAB, config.family)
    back: dict[str, Tensor] = {}
    for name, parameter in ours.named_parameters():
        to_ours(table[name], state.__getitem__, parameter)
        back |= to_theirs(table[name], parameter)
    for name, tensor in back.items():
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=0.0)
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), twin(tokens).logits, rtol=0.0, atol=1e-4)


def test_scaling_is_rounded_once() -> None:
    """Rounding to bf16 before and after the scale would lose a bit of GPT-Neo's queries."""
    model = config_of("gpt_neo").model
    parts = layout(model, VOCAB, "gpt_neo")["blocks.0.attn.qkv.weight"]
    theirs = torch.randn(24, 24, generator=torch.Generator().manual_seed(2))
    out = torch.empty(72, 24, dtype=torch.bfloat16)
    to_ours(parts, lambda _: theirs, out)
    assert torch.equal(out[:24], (theirs.double() * 6**0.5).bfloat16())
    assert torch.equal(out[24:48], theirs.bfloat16())


def test_prefixes_and_buffers() -> None:
    """The published gpt2 files have no prefix, and older ones hold masks among the weights."""
    assert plain_name("transformer.h.0.ln_1.weight", "gpt2") == "h.0.ln_1.weight"
    assert plain_name("h.0.ln_1.weight", "openai-gpt") == "h.0.ln_1.weight"
    assert plain_name("model.layers.1.mlp.up_proj.weight", "llama") == "layers.1.mlp.up_proj.weight"
    assert plain_name("lm_head.weight", "qwen3") == "lm_head.weight"
    assert plain_name("h.0.attn.c_attn.bias", "gpt2") == "h.0.attn.c_attn.bias"
    assert plain_name("h.3.attn.bias", "gpt2") is None
    assert plain_name("transformer.h.3.attn.masked_bias", "gpt2") is None
    assert plain_name("transformer.h.3.attn.attention.bias", "gpt_neo") is None
    assert plain_name("transformer.h.3.attn.attention.out_proj.bias", "gpt_neo") is not None
    assert plain_name("model.layers.0.self_attn.rotary_emb.inv_freq", "llama") is None
