"""Importing: a published model becomes a checkpoint directory, in the dtype it was published in."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.config.load import dump_config
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.hf_folder import HFFolder, open_folder
from gptcli.interop.hf_weights import layout
from gptcli.interop.safetensors_file import write_tensors
from gptcli.model.empty import empty_model
from gptcli.runs.load import published_config
from gptcli.runs.manifest import CONFIG, MODEL, OPTIMIZER, STATE, TOKENIZER, write_manifest
from gptcli.runs.resolve import ModelPlace, locate
from gptcli.runs.run_dir import new_directory, refuse_existing

log = logging.getLogger("gptcli")


@dataclass(frozen=True)
class ImportResult:
    """What was imported. `bytes` is the size of the weights' file, `commit` the hub's, if any."""

    path: Path
    family: str
    parameters: int
    dtype: str
    tokenizer: str
    vocab_size: int
    bytes: int
    commit: str | None


def import_model(source: str, out: Path, *, allow_pickle: bool = False) -> ImportResult:
    """Write `source`, a Hugging Face folder or a name on the hub, as a checkpoint directory `out`.

    It computes the same numbers as the folder itself. Tensors go one by one from the mapped source
    into the file. Raises ConfigError for a source that is no such folder or an `out` that is not
    empty, CheckpointError for one that cannot be read, ResourceError when the disk does not take
    it, `stop.Stopped`; then nothing is left behind.
    """
    if not source or source.endswith(".gguf"):
        raise ConfigError(
            f"SOURCE {source!r} is no Hugging Face folder and no name on the hub",
            hint="a GGUF file cannot be imported, but the folder it was made from can",
        )
    refuse_existing(out)  # before anything is fetched
    place = locate(source, allow_pickle=allow_pickle)
    if place.kind != "folder":
        raise ConfigError(
            f"{source} is a {place.kind} of gpt's own, which needs no import",
            hint=f"use it as it is: gpt generate --model {source}",
        )
    folder = open_folder(place.path, allow_pickle=allow_pickle)
    with new_directory(out) as temp:
        result = _write(temp, folder, place, source)
    return ImportResult(path=out, commit=place.commit, **result)


def _write(temp: Path, folder: HFFolder, place: ModelPlace, source: str) -> dict[str, Any]:
    """Fill `temp`, manifest.json last; facts for the result."""
    model = empty_model(folder.config.model, folder.config.vocab_size)
    config = published_config(place.name, model.config)
    tied = {"head.weight": "wte.weight"} if model.config.tie_embeddings else {}
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    dtype = _dtype(folder)
    weights = write_tensors(temp / MODEL, shapes, dtype, _finite(folder, dtype))
    write_tensors(temp / OPTIMIZER, {}, dtype, [])
    state = {
        "job": "import",
        "step": 0,
        "source": source,
        "commit": place.commit,
        "family": folder.config.family,
    }
    (temp / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    (temp / CONFIG).write_text(dump_config(config), encoding="utf-8")
    folder.tokenizer.save(temp / TOKENIZER)
    write_manifest(temp, 0, tied, folder.tokenizer.identity)
    return {
        "family": folder.config.family,
        "parameters": model.parameter_count(),
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": folder.tokenizer.kind,
        "vocab_size": folder.config.vocab_size,
        "bytes": weights,
    }


def _dtype(folder: HFFolder) -> torch.dtype:
    """The source's; fp32 where weights are scaled on the way, which would be rounded in less."""
    config = folder.config
    table = layout(config.model, config.vocab_size, config.family)
    if any(part.scale != 1.0 for parts in table.values() for part in parts):
        return torch.float32
    return folder.dtype


def _finite(folder: HFFolder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights; CheckpointError for nan and infinity, which are never saved."""
    for name, tensor in folder.weights(dtype):
        if not tensor.isfinite().all():
            raise CheckpointError(f"{folder.path}: {name} holds numbers that are not finite")
        yield name, tensor
