"""Adapters as peft reads them, for the model's twin in transformers.

An adapter of ours that lies on a matrix made of several of theirs (q, k and v; gate and up) becomes
one for each: they share A, and B is cut.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptcli.config.finetune_schema import LoraConfig
from gptcli.interop.hf_config import family_of
from gptcli.interop.hf_weights import Part, layout
from gptcli.interop.safetensors_file import write_tensors
from gptcli.model.gpt import GPT
from gptcli.model.lora import adapter_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write_peft(
    model: GPT, settings: LoraConfig, base: str | None, revision: str | None, directory: Path
) -> None:
    """Write the adapters of `model`, which are not merged, into `directory`.

    `base` names the model for transformers that they belong to: a folder, or one of the hub's with
    its `revision`; None leaves it open. A task head is left out. Weights are fp32. Raises
    CheckpointError for a model that no model of transformers computes, `stop.Stopped`, OSError.
    """
    table, own = (
        layout(model.config, model.vocab_size, family_of(model.config)),
        adapter_tensors(model),
    )
    adapted = {n: p for n, p in table.items() if f"{n.removesuffix('weight')}lora_a" in own}
    tensors = dict(_tensors(model, adapted))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(directory / WEIGHTS, shapes, torch.float32, tensors.items())
    parts = [part for found in adapted.values() for part in found]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted({".".join(part.name.split(".")[-3:-1]) for part in parts}),
        "fan_in_fan_out": parts[0].transposed,  # transformers' Conv1D
        "bias": "none",
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tensors(model: GPT, adapted: dict[str, list[Part]]) -> Iterator[tuple[str, Tensor]]:
    for name, parts in adapted.items():
        layer, start = name.removesuffix(".weight"), 0
        a = model.get_parameter(f"{layer}.lora_a").detach()
        b = model.get_parameter(f"{layer}.lora_b").detach()
        for part in parts:
            theirs = _PREFIX + part.name.removesuffix(".weight")
            yield f"{theirs}.lora_A.weight", a
            yield f"{theirs}.lora_B.weight", b[start : start + part.rows] / part.scale
            start += part.rows
