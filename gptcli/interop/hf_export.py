"""A model as a Hugging Face folder, which transformers loads without code of ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.data.published_files import CONFIG, GENERATION_CONFIG, WEIGHTS
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError
from gptcli.interop.hf_config import family_of, hf_config
from gptcli.interop.hf_weights import Part, layout, to_theirs
from gptcli.interop.safetensors_file import write_tensors
from gptcli.interop.tokenizer_export import json_bytes, tokenizer_files
from gptcli.model.gpt import GPT

HF_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def write_hf(model: GPT, tokenizer: Tokenizer, directory: Path, dtype: torch.dtype) -> None:
    """Write config, weights as `dtype`, tokenizer and generation settings into `directory`.

    The weights are converted tensor by tensor. Raises CheckpointError for a model that no model of
    transformers computes, DataError for a tokenizer that its library cannot copy, ConfigError for
    weights too large for f16, `stop.Stopped`, OSError.
    """
    config = hf_config(model.config, model.vocab_size) | token_ids(tokenizer)
    config["dtype"] = str(dtype).removeprefix("torch.")
    files = tokenizer_files(tokenizer, model.config.block_size)
    files[CONFIG] = json_bytes(config)
    files[GENERATION_CONFIG] = json_bytes(token_ids(tokenizer))
    for name, content in files.items():
        (directory / name).write_bytes(content)
    table = layout(model.config, model.vocab_size, family_of(model.config))
    shapes = {part.name: part.shape for parts in table.values() for part in parts}
    write_tensors(directory / WEIGHTS, shapes, dtype, _tensors(model, table, dtype))


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of special tokens as config.json and generation_config.json name them, eot first.

    Without a tokenizer all are null: left out, they would be the defaults of transformers, which
    are ordinary ids of such a model or beyond them.
    """
    source = tokenizer.source
    ends = sorted(tokenizer.ends, key=lambda i: (i != tokenizer.eot, i))
    return {
        "bos_token_id": tokenizer.start
        if tokenizer.bos is not None
        else source.get("bos_token_id", tokenizer.start),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        # None for models made here: one that learns to ignore its padding would forget the token
        # that serves as it.
        "pad_token_id": source.get("pad_token_id"),
    }


def _tensors(
    model: GPT, table: dict[str, list[Part]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    weights = model.state_dict()  # references, no copies
    for name, parts in table.items():
        for theirs, tensor in to_theirs(parts, weights[name]).items():
            if dtype == torch.float16 and not tensor.to(dtype).isfinite().all():
                raise ConfigError(
                    f"--dtype f16: {theirs} holds {tensor.abs().max().item():.4g},"
                    f" and f16 ends at {torch.finfo(dtype).max:,.0f}",
                    hint="bf16 takes as little space and reaches as far as f32",
                )
            yield theirs, tensor
