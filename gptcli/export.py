"""The job behind `gpt export`: a model as a folder for transformers, as a GGUF file, or as a
checkpoint with int8 weights."""

import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from safetensors import safe_open

from gptcli.config.load import dump_config
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.gguf_export import GGUFType, write_gguf
from gptcli.interop.hf_config import family_of
from gptcli.interop.hf_export import HF_DTYPES, write_hf
from gptcli.interop.hf_folder import open_folder
from gptcli.interop.safetensors_file import DTYPES, write_tensors
from gptcli.model.packed import int8_tensors, is_quantized
from gptcli.reports.model_card import model_card
from gptcli.runs.load import LoadedModel, load_model
from gptcli.runs.manifest import CONFIG, MODEL, OPTIMIZER, STATE, TOKENIZER, write_manifest
from gptcli.runs.run_dir import new_directory, new_place, refuse_existing

log = logging.getLogger("gptcli")

Target = Literal["hf", "gguf", "gpt"]

_CARD = "README.md"
_INT8 = "int8"
_DTYPES: dict[str, tuple[str, ...]] = {
    "hf": tuple(HF_DTYPES),
    "gguf": get_args(GGUFType),
    "gpt": (_INT8,),
}
_READERS = {"hf": "transformers", "gguf": "llama.cpp", "gpt": "gpt"}
_REASONS = {
    ("hf", "q8_0"): "q8_0 is a format of GGUF files",
    ("gguf", "bf16"): "bf16 in GGUF files runs on few devices",
}


@dataclass(frozen=True)
class ExportResult:
    """What was written: a folder (hf, gpt) or a file (gguf), with weights of `dtype`."""

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
) -> ExportResult:
    """Write MODEL to `out`: for transformers (a folder), for llama.cpp (a GGUF file), or, with
    `quantize` int8, as a checkpoint of int8 weights, which `load_model` reads.

    `dtype` is f32, bf16 or f16 for hf, f32, f16 or q8_0 for gguf; None is what the weights are
    stored as, f32 where the target lacks that. A folder as `out` of a GGUF file gets NAME.gguf.
    What is at `out` afterwards is whole or not there.

    Raises ConfigError when `out` exists or a choice is wrong, CheckpointError for a model that the
    target cannot compute, DataError for a tokenizer that it cannot have, ResourceError for a full
    disk, `stop.Stopped`.
    """
    target = _check(out, to, dtype, quantize)
    loaded = load_model(model, torch.device("cpu"))
    if is_quantized(loaded.model):
        raise CheckpointError(
            f"{loaded.path} holds int8 weights already",
            hint="export the model that they were made from",
        )
    chosen = _INT8 if target == "gpt" else dtype or _as_stored(loaded, target)
    if target == "hf":
        _write_hf(loaded, chosen, out)
    elif target == "gpt":
        _write_int8(loaded, out)
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


def _check(out: Path, to: str | None, dtype: str | None, quantize: str | None) -> Target:
    """The target, once everything is checked that needs no model."""
    if quantize is not None or to == "gpt":
        if quantize is None:
            raise ConfigError("--to gpt needs --quantize int8")
        if quantize != _INT8:
            raise ConfigError(f"--quantize {quantize}: expected int8")
        if to not in (None, "gpt") or dtype is not None:
            raise ConfigError(
                "--quantize int8 writes a checkpoint for gpt: not with --dtype, nor --to hf or gguf"
            )
        refuse_existing(out)
        return "gpt"
    if to is None:
        raise ConfigError("give --to hf, --to gguf or --quantize int8")
    if to not in _DTYPES:
        raise ConfigError(f"--to {to!r}: expected hf (transformers) or gguf (llama.cpp)")
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
    return "hf"


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


def _write_int8(loaded: LoadedModel, out: Path) -> None:
    """A checkpoint with int8 weights and without an optimizer's state."""
    tensors = dict(int8_tensors(loaded.model))
    # The large numbers first: there each begins at a multiple of its size.
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    shapes = {name: tuple(tensors[name].shape) for name in names}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    ties = {"head.weight": "wte.weight", "head.scale": "wte.scale"}
    tied = ties if loaded.model.config.tie_embeddings else {}
    state = {**(loaded.state or {"job": "import", "step": loaded.step}), "quantized": _INT8}
    with new_directory(out) as temp:
        write_tensors(temp / MODEL, shapes, dtypes, tensors.items())
        write_tensors(temp / OPTIMIZER, {}, torch.float32, [])
        (temp / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        (temp / CONFIG).write_text(dump_config(loaded.config), encoding="utf-8")
        loaded.tokenizer.save(temp / TOKENIZER)
        write_manifest(temp, loaded.step, tied, loaded.tokenizer.identity)
