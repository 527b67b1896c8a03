"""Our parameters and those of transformers' models: one table for both directions."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.config.model_schema import ModelConfig
from gptcli.interop.hf_config import Family


@dataclass(frozen=True)
class Part:
    """One tensor of theirs, of which one of our parameters is made or a part of it.

    `shape` is the stored one; `transposed` tensors are (in, out), as transformers' Conv1D keeps
    them. Ours = theirs x `scale`.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    scale: float = 1.0

    @property
    def rows(self) -> int:
        """How many rows of our parameter it gives."""
        return self.shape[1] if self.transposed else self.shape[0]


def layout(model: ModelConfig, vocab_size: int, family: Family) -> dict[str, list[Part]]:
    """Our parameter name -> their tensors, which follow one another along our dimension 0.

    In the order of `GPT.named_parameters`. Tied embeddings are listed once, as `wte.weight`. Names
    are those of transformers' models with a head, prefix included.
    """
    if family in ("openai-gpt", "gpt2"):
        block, names = _conv_block, _GPT1 if family == "openai-gpt" else _GPT2
    else:
        block, names = (_neo_block, _GPT2) if family == "gpt_neo" else (_rotary_block, _ROTARY)
    width = model.n_embd
    table = {"wte.weight": [Part(names["wte"], (vocab_size, width))]}
    if model.position == "learned":
        table["wpe.weight"] = [Part(names["wpe"], (model.block_size, width))]
    for layer in range(model.n_layer):
        parts = block(model, f"{names['block']}.{layer}.")
        table |= {f"blocks.{layer}.{name}": found for name, found in parts.items()}
    if model.norm_position == "pre":
        table |= _norm("norm", names["norm"], width, model.norm == "layernorm")
    if not model.tie_embeddings:
        table["head.weight"] = [Part("lm_head.weight", (vocab_size, width))]
    return table


def our_shape(parts: list[Part]) -> tuple[int, ...]:
    """The shape of our parameter that these parts make."""
    first = parts[0]
    return sum(p.rows for p in parts), *(first.shape[:1] if first.transposed else first.shape[1:])


def to_ours(parts: list[Part], read: Callable[[str], Tensor], out: Tensor) -> None:
    """Fill `out`, one of our parameters, with its parts, read by name and converted."""
    start = 0
    with torch.no_grad():
        for part in parts:
            theirs = read(part.name)
            theirs = theirs.t() if part.transposed else theirs
            if part.scale != 1.0:  # rounded once, whatever the dtypes
                theirs = theirs.to(torch.float64) * part.scale
            out[start : start + part.rows].copy_(theirs)
            start += part.rows


def to_theirs(parts: list[Part], ours: Tensor) -> dict[str, Tensor]:
    """Their tensors, by name and contiguous, of one of our parameters; of our dtype."""
    found, start = {}, 0
    for part in parts:
        piece = ours.detach()[start : start + part.rows]
        if part.scale != 1.0:
            piece = (piece.to(torch.float64) / part.scale).to(ours.dtype)
        found[part.name] = (piece.t() if part.transposed else piece).contiguous()
        start += part.rows
    return found


def plain_name(name: str, family: Family) -> str | None:
    """The tensor's name without the prefix that models with a head put before it.

    None for what older files hold besides the weights: causal masks, rotary frequencies, positions.
    """
    prefix = "model." if family in ("llama", "mistral", "qwen2", "qwen3") else "transformer."
    name = name.removeprefix(prefix)
    return None if _NO_WEIGHT.fullmatch(name) else name


_NO_WEIGHT = re.compile(
    r"h\.\d+\.attn\.(attention\.)?(bias|masked_bias)"
    r"|(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|position_ids"
)
_GPT2 = {
    "wte": "transformer.wte.weight",
    "wpe": "transformer.wpe.weight",
    "block": "transformer.h",
    "norm": "transformer.ln_f",
}
_GPT1 = {
    **_GPT2,
    "wte": "transformer.tokens_embed.weight",
    "wpe": "transformer.positions_embed.weight",
}
_ROTARY = {"wte": "model.embed_tokens.weight", "block": "model.layers", "norm": "model.norm"}


def _norm(ours: str, theirs: str, width: int, bias: bool) -> dict[str, list[Part]]:
    ends = ("weight", "bias") if bias else ("weight",)
    return {f"{ours}.{end}": [Part(f"{theirs}.{end}", (width,))] for end in ends}


def _linear(
    ours: str, theirs: list[tuple[str, int]], width: int, bias: bool, scale: float = 1.0
) -> dict[str, list[Part]]:
    """A matrix of `width` inputs made of theirs (name, outputs); `scale` is the first one's."""
    scales = [scale, *[1.0] * (len(theirs) - 1)]
    found = {
        f"{ours}.weight": [
            Part(f"{name}.weight", (rows, width), scale=factor)
            for (name, rows), factor in zip(theirs, scales, strict=True)
        ]
    }
    if bias:
        found[f"{ours}.bias"] = [
            Part(f"{name}.bias", (rows,), scale=factor)
            for (name, rows), factor in zip(theirs, scales, strict=True)
        ]
    return found


def _conv(ours: str, theirs: str, width: int, rows: int) -> dict[str, list[Part]]:
    return {
        f"{ours}.weight": [Part(f"{theirs}.weight", (width, rows), transposed=True)],
        f"{ours}.bias": [Part(f"{theirs}.bias", (rows,))],
    }


def _conv_block(model: ModelConfig, at: str) -> dict[str, list[Part]]:
    width, inner = model.n_embd, model.inner_size
    return (
        _norm("norm1", f"{at}ln_1", width, bias=True)
        | _norm("norm2", f"{at}ln_2", width, bias=True)
        | _conv("attn.qkv", f"{at}attn.c_attn", width, 3 * width)
        | _conv("attn.proj", f"{at}attn.c_proj", width, width)
        | _conv("mlp.up", f"{at}mlp.c_fc", width, inner)
        | _conv("mlp.proj", f"{at}mlp.c_proj", inner, width)
    )


def _neo_block(model: ModelConfig, at: str) -> dict[str, list[Part]]:
    width, inner = model.n_embd, model.inner_size
    qkv = [(f"{at}attn.attention.{name}_proj", width) for name in "qkv"]
    # GPT-Neo does not divide the scores by sqrt(head size); ours are divided.
    scale = model.head_size**0.5
    return (
        _norm("norm1", f"{at}ln_1", width, bias=True)
        | _norm("norm2", f"{at}ln_2", width, bias=True)
        | _linear("attn.qkv", qkv, width, bias=False, scale=scale)
        | _linear("attn.proj", [(f"{at}attn.attention.out_proj", width)], width, bias=True)
        | _linear("mlp.up", [(f"{at}mlp.c_fc", inner)], width, bias=True)
        | _linear("mlp.proj", [(f"{at}mlp.c_proj", width)], inner, bias=True)
    )


def _rotary_block(model: ModelConfig, at: str) -> dict[str, list[Part]]:
    width, inner, head = model.n_embd, model.inner_size, model.head_size
    rows = {"q": model.n_head * head, "k": model.kv_heads * head, "v": model.kv_heads * head}
    qkv = [(f"{at}self_attn.{name}_proj", count) for name, count in rows.items()]
    up = [(f"{at}mlp.gate_proj", inner), (f"{at}mlp.up_proj", inner)]
    found = (
        _norm("norm1", f"{at}input_layernorm", width, bias=False)
        | _norm("norm2", f"{at}post_attention_layernorm", width, bias=False)
        | _linear("attn.qkv", qkv, width, model.has_qkv_bias)
        | _linear("attn.proj", [(f"{at}self_attn.o_proj", width)], rows["q"], model.bias)
    )
    if model.qk_norm:
        for name in ("q_norm", "k_norm"):
            found |= _norm(f"attn.{name}", f"{at}self_attn.{name}", head, bias=False)
    found |= _linear("mlp.up", up, width, model.bias)
    return found | _linear("mlp.proj", [(f"{at}mlp.down_proj", width)], inner, model.bias)
