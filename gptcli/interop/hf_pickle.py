"""Old .bin weights: the one place that unpickles, and only tensors, where the user allowed it."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.errors import CheckpointError


def unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, memory-mapped where its format allows.

    torch's own unpickler makes tensors and plain containers and refuses everything else.
    CheckpointError for what is no dictionary of tensors.
    """
    try:
        raw = _load(path)
    except Exception as error:  # a damaged pickle fails in any way there is
        # Not the error's own text: torch advises there to switch its protection off.
        raise CheckpointError(
            f"{path} cannot be read as tensors and nothing else ({type(error).__name__})",
            hint="download it again, or convert it to safetensors where you trust it",
        ) from error
    if not isinstance(raw, dict) or not all(
        type(name) is str and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in raw.items()
    ):
        raise CheckpointError(f"{path} is no dictionary of tensors")
    return raw


def _load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of storages, for library authors
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
