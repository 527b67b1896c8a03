"""Models as GGUF files, which llama.cpp and what is built on it run.

The architectures gpt2, llama and qwen3 (our `modern`) of llama.cpp; every other model is refused.
"""

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, ConfigError, ResourceError
from gptcli.interop.gguf_tokenizer import Vocabulary, vocabulary
from gptcli.model.gpt import GPT
from gptcli.model.rope import inverse_frequencies

log = logging.getLogger("gptcli")

GGUFType = Literal["f32", "f16", "q8_0"]
Architecture = Literal["gpt2", "llama", "qwen3"]

_HINT = "gpt export --to hf, where a twin in transformers exists"
_SWITCHES: dict[Architecture, dict[str, Any]] = {
    "gpt2": {
        "norm": "layernorm",
        "norm_position": "pre",
        "position": "learned",
        "activation": "gelu_tanh",
        "gated": False,
        "qk_norm": False,
    },
    "llama": {
        "norm": "rmsnorm",
        "norm_position": "pre",
        "position": "rope",
        "activation": "silu",
        "gated": True,
        "qk_norm": False,
    },
}
_SWITCHES["qwen3"] = {**_SWITCHES["llama"], "qk_norm": True}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


@dataclass(frozen=True)
class _Part:
    """A tensor of the file: rows of one of ours, in llama.cpp's order of them.

    `kind` is its name in gguf's list of tensors. `heads` > 0: the rows are those of so many heads,
    whose halves are rotated as pairs, and go to where llama.cpp rotates neighbours.
    """

    kind: str
    source: Tensor
    layer: int = 0
    suffix: str = ".weight"
    heads: int = 0

    def tensor(self) -> Tensor:
        """On the CPU, fp32."""
        rows = self.source.detach().to("cpu", torch.float32)
        return interleave(rows, self.heads) if self.heads else rows


def write_gguf(
    model: GPT,
    tokenizer: Tokenizer,
    name: str,
    out: Path,
    dtype: GGUFType,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write model and tokenizer to the file `out`, which appears only when it is complete.

    Matrices are stored as `dtype`, norms, biases and learned positions as f32. `facts` (texts and
    numbers) become metadata gptcli.KEY. One tensor at a time is copied. CheckpointError with the
    reason when llama.cpp has no such model or tokenizer, or a weight does not fit f16; ConfigError
    without the package gguf; ResourceError when `out` cannot be written.
    """
    architecture = architecture_of(model.config)
    tokens = vocabulary(tokenizer, model.vocab_size)
    gguf = _gguf()
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    _add_model(writer, gguf, model, name, dtype)
    _add_tokenizer(writer, tokens)
    for key, value in (facts or {}).items():
        _add_fact(writer, f"gptcli.{key}", value)
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        _write(writer, gguf, list(_parts(model, architecture)), dtype, temporary)
        os.replace(temporary, out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written: {error}") from error
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of llama.cpp that computes what the config says.

    CheckpointError that names every switch in the way when there is none.
    """
    nearest: Architecture = "gpt2" if config.position == "learned" else "llama"
    if nearest == "llama" and config.qk_norm:
        nearest = "qwen3"
    problems = [
        f"{key} {_shown(getattr(config, key))} ({nearest} has {_shown(value)})"
        for key, value in _SWITCHES[nearest].items()
        if getattr(config, key) != value
    ]
    if any(0 < window < config.block_size for window in config.windows):
        problems.append("window (it attends to all tokens)")
    if nearest == "gpt2" and config.n_head * config.head_size != config.n_embd:
        problems.append(f"n_head x head_dim {config.n_head * config.head_size}, not n_embd")
    if nearest == "qwen3" and config.bias:
        problems.append("bias (qwen3 has none with qk_norm)")
    if (scaling := config.rope_scaling) is not None:
        kind = scaling.kind
        if kind == "dynamic":
            problems.append("rope_scaling dynamic (llama.cpp knows linear, yarn and llama3)")
        elif kind == "llama3" and nearest == "qwen3":
            problems.append("rope_scaling llama3 (only without qk_norm)")
        elif kind == "yarn" and (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
            problems.append("rope_scaling yarn with beta_fast, beta_slow (it takes 32 and 1)")
    if problems:
        raise CheckpointError(f"no GGUF: llama.cpp cannot run {'; '.join(problems)}", hint=_HINT)
    return nearest


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, ...) with row i and D/2 + i of each head as rows 2i and 2i + 1.

    We rotate the halves of a head against each other, llama.cpp's llama neighbours (the original
    form of Su et al. 2021): with both queries and keys reordered, their products are the same.
    """
    width = rows.size(0) // heads
    halves = rows.reshape(heads, 2, width // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ConfigError(
            f"--to gguf needs the package gguf ({error})", hint="pip install 'gptcli[gguf]'"
        ) from error
    return gguf


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parts(model: GPT, architecture: Architecture) -> Iterator[_Part]:
    """The file's tensors in order; views of the model's weights."""
    config, state = model.config, model.state_dict()
    yield _Part("TOKEN_EMBD", state["wte.weight"])
    if architecture == "gpt2":
        yield _Part("POS_EMBD", state["wpe.weight"])
    elif config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        plain = inverse_frequencies(config.head_size, config.rope_theta)
        scaled = inverse_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
        yield _Part("ROPE_FREQS", plain / scaled)
    for layer in range(config.n_layer):
        block = {
            key.removeprefix(f"blocks.{layer}."): tensor
            for key, tensor in state.items()
            if key.startswith(f"blocks.{layer}.")
        }
        yield from _block_parts(config, architecture, block, layer)
    yield _Part("OUTPUT_NORM", state["norm.weight"])
    if architecture == "gpt2":
        yield _Part("OUTPUT_NORM", state["norm.bias"], suffix=".bias")
    if not config.tie_embeddings:
        yield _Part("OUTPUT", state["head.weight"])


def _block_parts(
    config: ModelConfig, architecture: Architecture, block: dict[str, Tensor], layer: int
) -> Iterator[_Part]:
    yield from _both("ATTN_NORM", "norm1", block, layer)
    if architecture == "gpt2":
        yield from _both("ATTN_QKV", "attn.qkv", block, layer, bias_needed=True)
    else:
        heads = (config.n_head, config.kv_heads, 0) if architecture == "llama" else (0, 0, 0)
        kv_width = config.kv_heads * config.head_size
        widths = [config.n_head * config.head_size, kv_width, kv_width]
        for suffix in (".weight", ".bias"):
            if f"attn.qkv{suffix}" in block:
                rows = torch.split(block[f"attn.qkv{suffix}"], widths)
                for kind, part, n in zip(("ATTN_Q", "ATTN_K", "ATTN_V"), rows, heads, strict=True):
                    yield _Part(kind, part, layer, suffix, heads=n)
    if config.qk_norm:
        yield from _both("ATTN_Q_NORM", "attn.q_norm", block, layer)
        yield from _both("ATTN_K_NORM", "attn.k_norm", block, layer)
    needed = architecture == "gpt2"  # its biases are compulsory, so ours without them get zeros
    yield from _both("ATTN_OUT", "attn.proj", block, layer, bias_needed=needed)
    yield from _both("FFN_NORM", "norm2", block, layer)
    if config.gated:
        for suffix in (".weight", ".bias"):
            if f"mlp.up{suffix}" in block:
                gate, up = block[f"mlp.up{suffix}"].chunk(2)
                yield _Part("FFN_GATE", gate, layer, suffix)
                yield _Part("FFN_UP", up, layer, suffix)
    else:
        yield from _both("FFN_UP", "mlp.up", block, layer, bias_needed=needed)
    yield from _both("FFN_DOWN", "mlp.proj", block, layer, bias_needed=needed)


def _both(
    kind: str, ours: str, block: dict[str, Tensor], layer: int, bias_needed: bool = False
) -> Iterator[_Part]:
    """Weight and, where there is one or must be one, bias."""
    weight = block[f"{ours}.weight"]
    yield _Part(kind, weight, layer)
    if f"{ours}.bias" in block:
        yield _Part(kind, block[f"{ours}.bias"], layer, ".bias")
    elif bias_needed:
        yield _Part(kind, torch.zeros(weight.size(0)), layer, ".bias")


def _add_model(writer: Any, gguf: Any, model: GPT, name: str, dtype: GGUFType) -> None:
    config = model.config
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.inner_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_vocab_size(model.vocab_size)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    _add_rope_scaling(writer, gguf, config)


def _add_rope_scaling(writer: Any, gguf: Any, config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":  # llama3 is a tensor of factors
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType[scaling.kind.upper()])
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_block_size)
        if scaling.attention_factor is not None:  # llama.cpp multiplies the usual one with it
            usual = 0.1 * math.log(scaling.factor) + 1.0
            writer.add_rope_scaling_attn_factors(scaling.attention_factor / usual)


def _add_tokenizer(writer: Any, tokens: Vocabulary) -> None:
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.types)
    if tokens.merges:
        writer.add_token_merges(tokens.merges)
    if tokens.scores:
        writer.add_token_scores(tokens.scores)
    if tokens.unknown is not None:
        writer.add_unk_token_id(tokens.unknown)
    if tokens.start is not None:
        writer.add_bos_token_id(tokens.start)
    writer.add_add_bos_token(tokens.adds_start)
    add_end = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, end in zip(add_end, tokens.ends, strict=False):
        add(end)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(tokens.model == "llama")


def _add_fact(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float64(key, value)
    elif value is not None:
        writer.add_string(key, str(value))


def _write(writer: Any, gguf: Any, parts: list[_Part], dtype: GGUFType, path: Path) -> None:
    """Header and metadata, then tensor by tensor."""
    stored = [_stored_type(part, dtype) for part in parts]
    names = [
        gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[part.kind]].format(bid=part.layer) + part.suffix
        for part in parts
    ]
    odd = [n for n, s, p in zip(names, stored, parts, strict=True) if s == "f16" and _big(p)]
    if dtype == "q8_0" and odd:
        log.info("as f16, because their rows do not divide by 32: %s", ", ".join(odd))
    for name, part, kind in zip(names, parts, stored, strict=True):
        quantised = gguf.GGMLQuantizationType[kind.upper()]
        values, size = gguf.GGML_QUANT_SIZES[quantised]
        n_bytes = part.source.numel() // values * size
        shape = list(part.source.shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, quantised)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, part, kind in zip(names, parts, stored, strict=True):
        stop.raise_if_requested()
        writer.write_tensor_data(_stored(gguf, part.tensor(), kind, name))
    writer.flush()
    for file in writer.fout:
        os.fsync(file.fileno())


def _big(part: _Part) -> bool:
    """Whether it is a matrix that every position or word passes through (not learned positions)."""
    return part.source.ndim == 2 and part.kind != "POS_EMBD"


def _stored_type(part: _Part, dtype: GGUFType) -> GGUFType:
    if not _big(part):
        return "f32"
    return "f16" if dtype == "q8_0" and part.source.size(1) % 32 else dtype


def _stored(gguf: Any, tensor: Tensor, kind: GGUFType, name: str) -> Any:
    """The array to write. CheckpointError for numbers that `kind` cannot hold."""
    array = tensor.contiguous().numpy()
    if kind == "f32":
        return array
    largest = float(np.abs(array).max())
    if not largest <= 65504:
        raise CheckpointError(
            f"no GGUF as {kind}: {name} holds {largest}, beyond f16", hint="export with --dtype f32"
        )
    return gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind.upper()])
