"""Checkpoints of models of which each process has a share.

torch.distributed.checkpoint writes what each process has, all at the same time, in files of a few
tensors, so that it never holds much of it twice. Rank 0 puts them together to the safetensors files
of any other checkpoint. From such files only the shares that are needed are read, whatever the
number of processes was.
"""

import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli import world
from gptcli.errors import CheckpointError, NonFiniteError, ResourceError
from gptcli.interop.safetensors_file import file_header, stored_places
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.manifest import MODEL, OPTIMIZER
from gptcli.runs.space import check_space
from gptcli.runs.tensors import local, refuse_non_finite, save_pieces, save_tensors, untied

_CHUNK_BYTES = 2**24
# A process holds one file twice while it writes it; and there are at most some 64 of one.
_FILE_BYTES, _MOST_FILES = 2**24, 64


class Together:
    """Writes the tensors of one checkpoint, when all processes call it."""

    def __init__(self) -> None:
        self._began = False

    def __call__(self, folder: Path | None, contents: Contents) -> dict[str, str]:
        """Write the tensors into the folder that rank 0 gives.

        Returns the sha256 of each file, to rank 0. ResourceError, for all, where one cannot write.
        """
        self._began = True
        place = world.told(str(folder) if folder is not None else None)
        if place is None:
            raise ResourceError("rank 0 could not begin the checkpoint")
        tensors = {MODEL: untied(contents.model)[0], OPTIMIZER: contents.optimizer}
        return {name: _write(found, Path(place), name) for name, found in tensors.items()}

    def give_up(self) -> None:
        """Let the others know, where rank 0 failed before it came to writing."""
        if world.current().leads and not self._began:
            world.told(None)


def publish_together(run_dir: Path, step: int, contents: Contents, *, in_shares: bool) -> Path:
    """`checkpoint.publish` by rank 0, of which all processes learn how it went: ResourceError for
    all, or for none. `in_shares`: of each tensor a process has a share, which it writes."""
    if in_shares:
        _refuse_non_finite_shares(step, contents)
    leads, write = world.current().leads, Together() if in_shares else checkpoint.write_whole
    path, problem = checkpoint.checkpoint_dir(run_dir, step), None
    try:
        if leads:
            if step == 0:
                check_space(run_dir, checkpoint.space_needed(contents, in_shares))
            checkpoint.publish(run_dir, step, contents, write)
        elif isinstance(write, Together):
            write(None, contents)
    except ResourceError as error:
        problem = error
        if isinstance(write, Together):
            write.give_up()
    told = world.told(None if problem is None else problem.message)
    if problem is not None and (leads or told is None):
        raise problem
    if told is not None:
        raise ResourceError(told)
    return path


def _refuse_non_finite_shares(step: int, contents: Contents) -> None:
    """NonFiniteError for all where any process's share of a weight is not finite."""
    shares = {name: local(tensor) for name, tensor in contents.model.items()}
    try:
        refuse_non_finite(step, shares)
        problem = None
    except NonFiniteError as error:
        problem = [error.message, error.hint]
    found = [text for text in world.gathered(problem) if text is not None]
    if found:
        raise NonFiniteError(*found[0])


def read_together(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill this process's shares of `tensors` from a checkpoint's files; all processes call this.

    CheckpointError, for all, where one cannot.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        reader = HuggingFaceStorageReader(str(directory))
        load(dict(tensors), storage_reader=reader, process_group=world.patient_group())
    except (CheckpointException, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{directory} cannot be read in shares: {error}") from error


def _write(tensors: dict[str, Tensor], folder: Path, name: str) -> str:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    leads = world.current().leads
    if not tensors:  # no optimizer has a state before its first step
        return save_tensors({}, folder / name) if leads else ""
    place = folder / f"shares-{name}"
    writer: Any = HuggingFaceStorageWriter(
        path=str(place), fqn_to_index_mapping=_files(tensors), save_distributed=True
    )
    try:
        save(tensors, storage_writer=writer, process_group=world.patient_group())
    except CheckpointException as error:
        reasons = [found[0] for found in error.failures.values()]
        raise ResourceError("; ".join(sorted(set(map(str, reasons))))) from reasons[0]
    digest, problem = "", None
    if leads:
        try:
            digest = _put_together(tensors, place, folder / name)
            shutil.rmtree(place)
        except OSError as error:
            problem = error
    told = world.told(None if problem is None else problem.strerror or str(problem))
    if told is not None:  # nobody begins the next file, which needs all
        raise ResourceError(told) from problem
    return digest


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file that each tensor goes to, from 1: of each process, a few tensors are
    in one file, and are in memory twice while it is written."""
    most = max(_FILE_BYTES, sum(t.nbytes for t in tensors.values()) // _MOST_FILES)
    most *= world.current().size
    found, number, held = {}, 1, 0
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > most:
            number, held = number + 1, 0
        found[name], held = number, held + tensor.nbytes
    return found


def _put_together(tensors: dict[str, Tensor], place: Path, path: Path) -> str:
    """Make one file of the shares in `place` and return its sha256. Each process has rows of a
    tensor, the first rows rank 0, and of those that all have whole one wrote them."""
    parts: dict[str, list[tuple[Path, int, int]]] = {name: [] for name in tensors}
    for file in sorted(place.glob("*.safetensors")):  # shard-RANK-...
        for name, (begin, end) in stored_places(file).items():
            parts[name].append((file, begin, end))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    for name in order:
        found = sum(end - begin for _, begin, end in parts[name])
        if found != tensors[name].nbytes:
            raise OSError(f"{name} has {found} of {tensors[name].nbytes} bytes in {place}")
    header, _, _ = file_header({name: shapes[name] for name in order}, dtypes)
    pieces = (piece for name in order for part in parts[name] for piece in _pieces(*part))
    return save_pieces(path, chain([header], pieces))


def _pieces(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end`, some at a time."""
    with open(path, "rb") as file:
        file.seek(begin)
        while begin < end and (piece := file.read(min(_CHUNK_BYTES, end - begin))):
            begin += len(piece)
            yield piece


def empty_like(
    names: Mapping[str, tuple[int, ...]], whole: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors to be read: those of the optimizer by their names and shapes, each cut as the
    parameter that it belongs to."""
    found = {}
    for name, shape in names.items():
        parameter = whole.get(name.rpartition(".")[0])
        if parameter is not None and tuple(parameter.shape) == tuple(shape):
            found[name] = torch.zeros_like(parameter.detach())
        else:
            found[name] = torch.zeros(shape)
    return found
