"""The files of a Hugging Face folder: which hold the weights, and what their headers say."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptcli import stop
from gptcli.data.json_file import read_json_object
from gptcli.data.published_files import (
    PICKLE,
    PICKLE_INDEX,
    PICKLES,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from gptcli.errors import CheckpointError
from gptcli.interop.hf_pickle import unpickled
from gptcli.interop.safetensors_file import DTYPES

_MAX_INDEX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, by the file's header."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: none of `DTYPES`
    dtype_name: str


def inside(folder: Path, name: str) -> Path | None:
    """The regular file `name` of the folder; None when there is none.

    A link may not lead out of the folder, except in the hub's cache, whose snapshots are links to
    the blobs beside them. CheckpointError otherwise.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        target, home = path.resolve(strict=True), folder.resolve()
        regular = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise CheckpointError(
            f"{path} is a link out of its folder, to {target}", hint="put the file itself there"
        )
    if not regular:
        raise CheckpointError(f"{path} is not a regular file")
    return path


def weight_files(folder: Path, allow_pickle: bool) -> tuple[Path, ...]:
    """The files that hold the weights: model.safetensors, its shards, or else pytorch_model.bin.

    CheckpointError when there are none, one is missing, or all are pickles and may not be read.
    """
    for name, index_name in ((WEIGHTS, WEIGHTS_INDEX), (PICKLE, PICKLE_INDEX)):
        whole, index = inside(folder, name), inside(folder, index_name)
        if whole is None and index is None:
            continue
        if name == PICKLE and not allow_pickle:
            raise _pickled(whole or folder / index_name)
        return (whole,) if whole is not None else _shards(folder, index_name)
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise _pickled(pickles[0], readable=False)
    raise CheckpointError(
        f"{folder} has no weights (no {WEIGHTS})",
        hint="was the download finished? are they in a folder inside it?",
    )


def _pickled(path: Path, readable: bool = True) -> CheckpointError:
    hint = f"where you trust it, save its state_dict as {WEIGHTS}"
    if readable:  # tensors and nothing else
        hint = f"where you trust it: gpt import {path.parent} OUT --allow-pickle"
    return CheckpointError(
        f"{path} is a pickle file, which can run any code when it is read, so gpt does not", hint
    )


def _shards(folder: Path, index: str) -> tuple[Path, ...]:
    raw = read_json_object(folder / index, CheckpointError, _MAX_INDEX_BYTES)
    places = raw.get("weight_map")
    if not isinstance(places, dict) or not all(type(name) is str for name in places.values()):
        raise CheckpointError(f"{folder / index}: no weight_map from tensors to files")
    found = []
    suffix = Path(WEIGHTS if index == WEIGHTS_INDEX else PICKLE).suffix
    plain = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*" + re.escape(suffix))
    for name in sorted(set(places.values())):
        if not plain.fullmatch(name):
            raise CheckpointError(
                f"{folder / index}: {name[:80]!r} is not the name of a {suffix} file beside it"
            )
        path = inside(folder, name)
        if path is None:
            raise CheckpointError(
                f"{folder / name} is missing, which {index} names", hint="download it again"
            )
        found.append(path)
    return tuple(found)


def headers(files: tuple[Path, ...]) -> list[Stored]:
    """What tensors the files hold; of pickles, which have no header, tensors are mapped for it.

    CheckpointError for a file that is damaged.
    """
    found: list[Stored] = []
    for path in files:
        stop.raise_if_requested()
        with _reported(path):
            found += _pickle_header(path) if path.suffix in PICKLES else _header(path)
    return found


def _header(path: Path) -> Iterator[Stored]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            kind = part.get_dtype()
            yield Stored(name, path, tuple(part.get_shape()), DTYPES.get(kind), kind)


def _pickle_header(path: Path) -> Iterator[Stored]:
    for name, tensor in unpickled(path).items():
        kind = str(tensor.dtype).removeprefix("torch.")
        dtype = tensor.dtype if tensor.dtype in DTYPES.values() else None
        yield Stored(name, path, tuple(tensor.shape), dtype, kind)


class Reader:
    """Gives stored tensors, memory-mapped and as stored; its files stay open as long as it lives.

    CheckpointError for what the header promised and the file does not hold.
    """

    def __init__(self) -> None:
        self._opened: dict[Path, Callable[[str], Tensor]] = {}

    def __call__(self, stored: Stored) -> Tensor:
        """The tensor itself."""
        path = stored.path
        with _reported(path):
            if path not in self._opened:
                pickled = path.suffix in PICKLES
                self._opened[path] = (
                    unpickled(path).__getitem__
                    if pickled
                    else safe_open(path, framework="pt").get_tensor
                )
            tensor = self._opened[path](stored.name)
        if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
            raise CheckpointError(f"{path} has changed while it was read")
        return tensor


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Whatever a damaged file leads to, as a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
