"""Sizes of a model: its parameters by part, its KV cache."""

import torch

from gptcli.config.model_schema import ModelConfig
from gptcli.model.cache import KVCache
from gptcli.model.gpt import GPT

_PARTS = {"wte": "embeddings", "wpe": "embeddings", "attn": "attention", "mlp": "feed_forward"}


def parameters_by_part(model: GPT) -> dict[str, int]:
    """Parameters by part, tied ones with the embeddings, and their total."""
    counts = dict.fromkeys(["embeddings", "attention", "feed_forward", "norms", "head"], 0)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        part = next((_PARTS[p] for p in parts if p in _PARTS), "head")
        counts["norms" if any("norm" in p for p in parts) else part] += parameter.numel()
    return {**counts, "total": sum(counts.values())}


def cache_bytes(model: ModelConfig) -> int:
    """Of the keys and values of one text that fills the block, fp32."""
    size = max(model.windows) if model.rolls else model.block_size
    meta = torch.device("meta")
    cache = KVCache(model.windows, size, 1, model.kv_heads, model.head_size, meta, torch.float32)
    return cache.row_bytes
