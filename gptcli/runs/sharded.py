"""Checkpoints of models of which each process has a share.

torch.distributed.checkpoint writes what each process has, all at the same time, and rank 0 puts it
together to the safetensors files of any other checkpoint. It reads from such files only the shares
that are needed, whatever the number of processes was.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli import world
from gptcli.errors import CheckpointError, NonFiniteError, ResourceError
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.manifest import MODEL, OPTIMIZER
from gptcli.runs.space import check_space
from gptcli.runs.tensors import local, refuse_non_finite, save_tensors, untied

_CHUNK_BYTES = 2**24


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
                check_space(run_dir, checkpoint.space_needed(contents))
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
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)))
    except (CheckpointException, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{directory} cannot be read in shares: {error}") from error


def _write(tensors: dict[str, Tensor], folder: Path, name: str) -> str:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if not tensors:  # no optimizer has a state before its first step
        return save_tensors({}, folder / name) if world.current().leads else ""
    # Consolidation loses the numbers of tensors without dimensions.
    tensors = {n: t.reshape(1) if t.ndim == 0 else t for n, t in sorted(tensors.items())}
    place = folder / f"shares-{name}"
    writer: Any = HuggingFaceStorageWriter(
        path=str(place),
        fqn_to_index_mapping=dict.fromkeys(tensors, 1),
        save_distributed=True,
        enable_consolidation=True,
    )
    try:
        save(tensors, storage_writer=writer)
    except CheckpointException as error:
        reasons = [str(found[0]) for found in error.failures.values()]
        raise ResourceError(f"{place}: {'; '.join(reasons[:2])}") from error
    digest, problem = "", None
    if world.current().leads:
        try:
            (written,) = place.glob("*.safetensors")
            os.replace(written, folder / name)
            shutil.rmtree(place)
            digest = _synced_hash(folder / name)
        except OSError as error:
            problem = f"{folder / name}: {error.strerror or error}"
    if (told := world.told(problem)) is not None:  # nobody begins the next file, which needs all
        raise ResourceError(told)
    return digest


def _synced_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        os.fsync(file.fileno())
    return digest.hexdigest()


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
