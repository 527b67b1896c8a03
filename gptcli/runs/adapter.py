"""What a checkpoint with an adapter says of the model that it belongs to, its base."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from gptcli import __version__
from gptcli.config.finetune_schema import LoraConfig
from gptcli.errors import CheckpointError
from gptcli.interop.fit import misfit
from gptcli.interop.hf_files import weight_files
from gptcli.model.gpt import GPT
from gptcli.model.heads import attach_head
from gptcli.model.lora import adapter_shapes, adapter_tensors, add_lora
from gptcli.runs.manifest import ADAPTER, MANIFEST, MODEL, read_manifest, sha256_of
from gptcli.runs.resolve import ModelPlace, hub_name, locate
from gptcli.runs.tensors import Shapes

log = logging.getLogger("gptcli")

HEAD_WEIGHT, HEAD_BIAS = "task_head.weight", "task_head.bias"


@dataclass(frozen=True)
class Adapter:
    """The base, as `locate` finds it from any working directory, the hash of its weights (see
    `weights_sha256`), and what the adapter is like."""

    base: str
    base_sha256: str
    lora: LoraConfig

    def to_json(self) -> dict[str, Any]:
        """For adapter.json."""
        return {
            "base": self.base,
            "base_sha256": self.base_sha256,
            "gptcli": __version__,
            "lora": self.lora.model_dump(),
        }

    @staticmethod
    def from_json(value: dict[str, Any], where: str) -> "Adapter":
        """CheckpointError, which opens with `where`, for what `to_json` never gives."""
        base, digest = value.get("base"), value.get("base_sha256")
        if not isinstance(base, str) or not isinstance(digest, str):
            raise CheckpointError(f"{where}: {ADAPTER} names no base model")
        try:
            return Adapter(base, digest, LoraConfig.model_validate(value.get("lora")))
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise CheckpointError(f"{where}: {ADAPTER} has no valid lora: {problem}") from error


def adapter_on(base: Path, hub: str | None, lora: LoraConfig) -> Adapter:
    """A new adapter of the model in `base`, a checkpoint or a Hugging Face folder; of one from the
    hub, `hub` is owner/name@commit. Raises CheckpointError, `stop.Stopped`."""
    return Adapter(hub or os.path.abspath(base), weights_sha256(base), lora)


def weights_sha256(path: Path) -> str:
    """What identifies the weights of a checkpoint or of a Hugging Face folder.

    Of one file, its sha256; of several, that of their hashes, sorted by the files' names. With an
    adapter, adapter.json is one of them, and so is the base. CheckpointError, `stop.Stopped`.
    """
    if os.path.lexists(path / MANIFEST):
        listed = read_manifest(path)["files"]
        hashes = [listed[name]["sha256"] for name in (ADAPTER, MODEL) if name in listed]
    else:
        try:
            hashes = [sha256_of(file, stoppable=True) for file in sorted(weight_files(path, False))]
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(hashes) == 1:
        return str(hashes[0])
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def find_base(adapter: Adapter, where: str) -> ModelPlace:
    """The adapter's base, whose weights are what they were. CheckpointError, which opens with
    `where` and says what to do, when it is gone or changed; `stop.Stopped`."""
    if hub_name(adapter.base) is not None:
        log.info(f"the base of this adapter is on the hub: {adapter.base}")
    try:
        place = locate(adapter.base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{where} is an adapter, and its base is gone: {error.message}",
            hint=f"put the base model back to {adapter.base}; where both are still together,"
            " gpt export --merge makes a model that needs no base",
        ) from error
    if weights_sha256(place.path) != adapter.base_sha256:
        raise CheckpointError(
            f"{where} is an adapter, and its base has changed: the weights of {adapter.base} are"
            " not those that it was trained on",
            hint=f"put the weights back whose sha256 is {adapter.base_sha256[:16]}..., or train"
            " the adapter again",
        )
    return place


def give_adapter(model: GPT, adapter: Adapter, tensors: dict[str, Tensor], where: str) -> None:
    """Add an adapter with these `tensors` to its base `model`, and the task head that is with them.

    CheckpointError, which opens with `where`, when they do not fit.
    """
    expected = adapter_shapes(model, adapter.lora)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_fit(expected | head_shapes(found, model.config.n_embd), found, where)
    add_lora(model, adapter.lora, torch.Generator())
    if HEAD_WEIGHT in tensors:
        attach_head(model, len(tensors[HEAD_WEIGHT]), torch.Generator())
    fill_adapter(model, tensors, where)


def fill_adapter(model: GPT, tensors: dict[str, Tensor], where: str) -> None:
    """Give the adapter of `model` (and its task head) the values of `tensors`; see
    `give_adapter`."""
    own = adapter_tensors(model)
    expected, found = ({name: tuple(t.shape) for name, t in of.items()} for of in (own, tensors))
    check_fit(expected, found, where)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def head_shapes(found: Shapes, n_embd: int) -> Shapes:
    """The shapes that a task head must have, where `found` has one."""
    if HEAD_WEIGHT not in found:
        return {}
    outputs = found[HEAD_WEIGHT][0] if found[HEAD_WEIGHT] else 0
    return {HEAD_WEIGHT: (outputs, n_embd), HEAD_BIAS: (outputs,)}


def check_fit(expected: Shapes, found: Shapes, where: str) -> None:
    """CheckpointError, which opens with `where`, listing the tensors that differ."""
    if problem := misfit(expected, found):
        raise CheckpointError(f"{where} does not fit the model; {problem}")
