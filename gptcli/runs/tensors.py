"""A checkpoint's safetensors files. Read: the header first, then one tensor at a time."""

import hashlib
import os
import re
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptcli import stop
from gptcli.errors import CheckpointError, NonFiniteError
from gptcli.interop.safetensors_file import file_header, numbers

Shapes = dict[str, tuple[int, ...]]
# Written and not yet hashed, at most: copies in memory, where the tensors are on another device.
_AHEAD_BYTES = 2 * 2**30


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


def stored_dtypes(path: Path) -> dict[str, str]:
    """Types by name from the file's header: F32, BF16, ... CheckpointError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
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


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, in the same memory; of a whole one all of it."""
    share = getattr(tensor.detach(), "to_local", None)
    return share() if share is not None else tensor


def untied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without second names of the same memory, and second name -> first name."""
    unique: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        held = local(tensor)
        place = (tensor.device, held.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if held.numel() and place in names:
            tied[name] = names[place]
        else:
            names[place] = name
            unique[name] = tensor
    return unique, tied


def refuse_non_finite(step: int, model: dict[str, Tensor]) -> None:
    """NonFiniteError where one of the weights is nan or infinite."""
    floats = [(name, t) for name, t in model.items() if t.is_floating_point() and t.numel()]
    # The extremes of what holds a nan are nan; a mask of every number would take ten times as long.
    bad = [name for name, t in floats if not torch.stack(torch.aminmax(t)).isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise NonFiniteError(
            f"step {step}: weights that are not finite are never saved: {bad[0]}{more}",
            hint="lower optimizer.lr, then resume: earlier checkpoints are as they were",
        )


def save_tensors(tensors: dict[str, Tensor], path: Path) -> str:
    """Write them as a file that is the same for the same tensors, on disk when this returns.

    Returns the sha256 of what was to be written, which a second thread computes meanwhile. OSError
    when the disk does not take it.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    shapes = {name: tuple(tensors[name].shape) for name in order}
    header, _, _ = file_header(shapes, {name: tensors[name].dtype for name in order})
    pieces = chain[bytes | memoryview]([header], (numbers(tensors[name]) for name in order))
    return save_pieces(path, pieces)


def save_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write the pieces as a file, on disk when this returns; returns the sha256 of what was to be
    written. OSError when the disk does not take it."""
    digest, waiting, ahead = hashlib.sha256(), deque[tuple[Future[None], int]](), 0
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hasher:
        for piece in pieces:
            waiting.append((hasher.submit(digest.update, piece), len(piece)))
            ahead += len(piece)
            file.write(piece)
            while ahead > _AHEAD_BYTES:
                hashed, size = waiting.popleft()
                hashed.result()
                ahead -= size
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
