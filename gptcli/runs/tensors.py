"""A checkpoint's safetensors files. Read: the header first, then one tensor at a time."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptcli import stop
from gptcli.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]


def scale_name(name: str) -> str:
    """What the scales of the int8 tensor NAME.weight are called: NAME.scale."""
    return name.removesuffix("weight") + "scale"


def stored_shapes(path: Path) -> Shapes:
    """Shapes by name from the file's header.

    CheckpointError for tensors of whole numbers other than int8 with its scales, and for scales of
    anything else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            for name, part in slices.items():
                dtype, scaled = part.get_dtype(), scale_name(name) in slices
                if not (dtype == "I8" if scaled else re.fullmatch(r"B?F\d+", dtype)):
                    kind = "int8, but has scales" if scaled else "floats"
                    raise CheckpointError(f"{path}: {name} holds {dtype}, not {kind}")
            return {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_tensors(
    path: Path, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Copies of the tensors on `device` (the CPU) as `dtype` (as stored), one read after the other.

    Those of whole numbers stay what they are. Copies, because the file is mapped and its fate must
    not reach a live run. CheckpointError when it cannot be read, `stop.Stopped`.
    """
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                stop.raise_if_requested()
                mapped = file.get_tensor(name)
                kind = dtype if dtype and mapped.is_floating_point() else mapped.dtype
                tensors[name] = mapped.to(device or "cpu", kind, copy=True)
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


def untied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without second names of the same memory, and second name -> first name."""
    unique: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in names:
            tied[name] = names[place]
        else:
            names[place] = name
            unique[name] = tensor
    return unique, tied


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write them as a file that is the same for the same tensors."""
    # One metadata key: several would be written in random order, and equal weights must give
    # equal files. This one is what transformers wants to see.
    ready = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    save_file(ready, path, metadata={"format": "pt"})
