"""Reading a checkpoint's safetensors files: the header first, then one tensor at a time."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptcli import stop
from gptcli.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]


def stored_shapes(path: Path) -> Shapes:
    """Shapes by name from the file's header. CheckpointError for tensors of whole numbers."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            for name, part in slices.items():
                if not re.fullmatch(r"B?F\d+", part.get_dtype()):
                    raise CheckpointError(f"{path}: {name} holds {part.get_dtype()}, not floats")
            return {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_tensors(
    path: Path, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Copies of the tensors on `device` (the CPU) as `dtype` (as stored), one read after the other.

    Copies, because the file is mapped and its fate must not reach a live run. CheckpointError when
    it cannot be read, `stop.Stopped`.
    """
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                stop.raise_if_requested()
                mapped = file.get_tensor(name)
                tensors[name] = mapped.to(device or "cpu", dtype or mapped.dtype, copy=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tensors


def with_tied(
    stored: dict[str, Tensor], tied: dict[str, str], directory: Path
) -> dict[str, Tensor]:
    """The stored tensors and those `tied` to them by a manifest. CheckpointError for loose ends."""
    if loose := [f"{name} is tied to {kept}" for name, kept in tied.items() if kept not in stored]:
        raise CheckpointError(f"{directory}: {loose[0]}, which is missing")
    return stored | {name: stored[kept] for name, kept in tied.items()}
