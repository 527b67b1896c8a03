"""The job behind `gpt export`: a model as a folder for transformers, as a GGUF file, or as a
checkpoint with int8 weights; an adapter for peft, or merged into its base."""

import importlib.util
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from gptcli.config.load import dump_config
from gptcli.data.published_files import CONFIG as HF_CONFIG
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.gguf_export import GGUFType, write_gguf
from gptcli.interop.hf_config import family_of
from gptcli.interop.hf_export import HF_DTYPES, write_hf
from gptcli.interop.hf_folder import open_folder
from gptcli.interop.peft import write_peft
from gptcli.interop.safetensors_file import DTYPES, write_tensors
from gptcli.model.gpt import GPT
from gptcli.model.heads import has_task_head
from gptcli.model.packed import int8_tensors, is_quantized
from gptcli.reports.model_card import model_card
from gptcli.runs.adapter import Adapter
from gptcli.runs.load import LoadedModel, load_model
from gptcli.runs.manifest import CONFIG, MODEL, OPTIMIZER, STATE, TOKENIZER, write_manifest
from gptcli.runs.run_dir import new_directory, new_place, refuse_existing

log = logging.getLogger("gptcli")

Target = Literal["hf", "gguf", "peft", "gpt"]

_CARD = "README.md"
_INT8 = "int8"
_DTYPES: dict[str, tuple[str, ...]] = {
    "hf": tuple(HF_DTYPES),
    "gguf": get_args(GGUFType),
    "peft": ("f32",),
    "gpt": (_INT8, "f32"),
}
_READERS = {"hf": "transformers", "gguf": "llama.cpp", "peft": "peft", "gpt": "gpt"}
_REASONS = {
    ("hf", "q8_0"): "q8_0 is a format of GGUF files",
    ("gguf", "bf16"): "bf16 in GGUF files runs on few devices",
}


@dataclass(frozen=True)
class ExportResult:
    """What was written: a folder (hf, peft, gpt) or a file (gguf), with weights of `dtype`."""

    path: Path
    to: Target
    dtype: str
    parameters: int
    bytes: int


def export(
    model: str | None,
    out: Path,
    to: str | None,
    dtype: str | None,
    quantize: str | None = None,
    merge: bool = False,
) -> ExportResult:
    """Write MODEL to `out`: for transformers (a folder), for llama.cpp (a GGUF file), or, with
    `quantize` int8, as a checkpoint of int8 weights, which `load_model` reads.

    Of a run with an adapter these hold the model with the adapter merged into it; `merge` alone
    writes that as a checkpoint of whole fp32 weights. `to` peft writes the adapter alone, for the
    twin of its base. A task head goes into checkpoints only.

    `dtype` is f32, bf16 or f16 for hf, f32, f16 or q8_0 for gguf; None is what the weights are
    stored as, f32 where the target lacks that. A folder as `out` of a GGUF file gets NAME.gguf.
    What is at `out` afterwards is whole or not there.

    Raises ConfigError when `out` exists or a choice is wrong, CheckpointError for a model that the
    target cannot compute, DataError for a tokenizer that it cannot have, ResourceError for a full
    disk, `stop.Stopped`.
    """
    target = _check(out, to, dtype, quantize, merge)
    loaded = load_model(model, torch.device("cpu"), merge=target != "peft")
    if loaded.adapter is None and (merge or target == "peft"):
        raise ConfigError(
            f"{loaded.path} has no adapter: its weights are whole ones",
            hint="--to hf and --to gguf write them; adapters are what finetune.method lora trains",
        )
    if target != "gpt" and has_task_head(loaded.model):
        log.warning(f"the task head is left out: {_READERS[target]} has no place for it")
    if is_quantized(loaded.model):
        raise CheckpointError(
            f"{loaded.path} holds int8 weights already",
            hint="export the model that they were made from",
        )
    chosen = _chosen_dtype(loaded, target, dtype, quantize)
    if target == "hf":
        _write_hf(loaded, chosen, out)
    elif target == "peft":
        _write_peft(loaded, out)
    elif target == "gpt":
        _write_checkpoint(loaded, chosen, out)
    else:
        out = out / f"{loaded.name}.gguf" if out.is_dir() else out
        _write_gguf(loaded, chosen, out)
    files = [path for path in (out.rglob("*") if out.is_dir() else [out]) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    parameters = loaded.model.parameter_count()
    log.info(
        f"exported {loaded.name} ({parameters:,} parameters, {chosen}, {size / 1e6:,.1f} MB) for"
        f" {_READERS[target]}: {out}"
    )
    return ExportResult(out, target, chosen, parameters, size)


def _check(
    out: Path, to: str | None, dtype: str | None, quantize: str | None, merge: bool
) -> Target:
    """The target, once everything is checked that needs no model."""
    if quantize not in (None, _INT8):
        raise ConfigError(f"--quantize {quantize}: expected int8")
    if quantize is not None or to == "gpt" or (merge and to is None):
        if quantize is None and not merge:
            raise ConfigError("--to gpt needs --quantize int8, or --merge")
        if to not in (None, "gpt") or dtype is not None:
            asked = "--quantize int8" if quantize else "--merge"
            raise ConfigError(
                f"{asked} writes a checkpoint for gpt: not with --dtype"
                + (", nor --to hf or gguf" if quantize else "")
            )
        refuse_existing(out)
        return "gpt"
    if to is None:
        raise ConfigError("give --to hf, --to gguf, --to peft, --quantize int8 or --merge")
    if to not in _DTYPES:
        raise ConfigError(f"--to {to!r}: expected hf (transformers) or gguf (llama.cpp), or peft")
    if to == "peft" and merge:
        raise ConfigError("--to peft writes the adapter alone, --merge a model without one")
    if dtype is not None and dtype not in _DTYPES[to]:
        why = _REASONS.get((to, dtype))
        raise ConfigError(
            f"--dtype {dtype} with --to {to}: expected {', '.join(_DTYPES[to])}"
            + (f"; {why}" if why else "")
        )
    if to == "gguf":
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError("--to gguf needs the package gguf", hint="pip install 'gptcli[gguf]'")
        if not out.is_dir():
            refuse_existing(out)
        return "gguf"
    refuse_existing(out)
    return "peft" if to == "peft" else "hf"


def _chosen_dtype(
    loaded: LoadedModel, target: Target, dtype: str | None, quantize: str | None
) -> str:
    if target == "gpt":
        return quantize or "f32"
    return dtype or ("f32" if loaded.adapter is not None else _as_stored(loaded, target))


def _as_stored(loaded: LoadedModel, target: Target) -> str:
    """The format of the stored weights; f32 where the target has none like it, which is exact."""
    if loaded.state is None:
        stored = open_folder(loaded.path).dtype
    else:
        with safe_open(loaded.path / MODEL, framework="pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        stored = DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
    name = next((name for name, dtype in HF_DTYPES.items() if dtype == stored), "f32")
    return name if name in _DTYPES[target] else "f32"


def _write_hf(loaded: LoadedModel, dtype: str, out: Path) -> None:
    card = model_card(loaded, out.absolute().name, dtype)
    with new_directory(out) as temp:
        write_hf(loaded.model, loaded.tokenizer, temp, HF_DTYPES[dtype])
        (temp / _CARD).write_text(card, encoding="utf-8")
    if family_of(loaded.model.config) == "qwen2":
        log.warning(
            "AutoTokenizer of transformers 5 gives models of type qwen2 a tokenizer of its own;"
            f" {out / _CARD} says how to load this one"
        )


def _write_gguf(loaded: LoadedModel, dtype: str, out: Path) -> None:
    facts = {"version": loaded.manifest.get("gptcli"), "step": loaded.step}
    chosen = cast(GGUFType, dtype)  # `_check` lets no other through
    with new_place(out) as place:
        write_gguf(loaded.model, loaded.tokenizer, loaded.name, place, chosen, facts)


def _write_peft(loaded: LoadedModel, out: Path) -> None:
    adapter = Adapter.from_json(loaded.adapter or {}, str(loaded.path))
    base, _, revision = adapter.base.partition("@")
    name: str | None = base
    if os.path.isabs(adapter.base):  # a folder for transformers, or a checkpoint, which is none
        published = (Path(adapter.base) / HF_CONFIG).is_file()
        name, revision = adapter.base if published else None, ""
    with new_directory(out) as temp:
        write_peft(loaded.model, adapter.lora, name, revision or None, temp)
    if name is None:
        log.warning(
            f"the adapter's base is a checkpoint: gpt export --to hf --model {adapter.base} makes"
            " the model that peft puts the adapter on"
        )
    if adapter.lora.quantize is not None:
        log.warning("the adapter was trained on int8 weights: on others its logits differ a little")


def _write_checkpoint(loaded: LoadedModel, dtype: str, out: Path) -> None:
    """A checkpoint with weights of `dtype`, f32 or int8, and without an optimizer's state."""
    quantized = dtype == _INT8
    tensors = dict(int8_tensors(loaded.model)) if quantized else _whole_tensors(loaded.model)
    # The large numbers first: there each begins at a multiple of its size.
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    shapes = {name: tuple(tensors[name].shape) for name in names}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    ties = {"head.weight": "wte.weight", "head.scale": "wte.scale"}
    tied = {a: b for a, b in ties.items() if b in tensors and a not in tensors}
    state = {**(loaded.state or {"job": "import", "step": loaded.step})}
    state |= {"quantized": _INT8} if quantized else {}
    with new_directory(out) as temp:
        write_tensors(temp / MODEL, shapes, dtypes, tensors.items())
        write_tensors(temp / OPTIMIZER, {}, torch.float32, [])
        (temp / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        (temp / CONFIG).write_text(dump_config(loaded.config), encoding="utf-8")
        loaded.tokenizer.save(temp / TOKENIZER)
        write_manifest(temp, loaded.step, tied, loaded.tokenizer.identity)


def _whole_tensors(model: GPT) -> dict[str, Tensor]:
    """All tensors by name, tied ones once, as wte."""
    tied = model.config.tie_embeddings
    return {n: t for n, t in model.state_dict().items() if not (tied and n == "head.weight")}
