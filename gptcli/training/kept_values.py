"""Numbers that a model gave for a run's rows before training, kept in a file of the run."""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from gptcli.errors import CheckpointError
from gptcli.runs.run_dir import write_atomic
from gptcli.runs.tensors import read_tensors

_HINT = "it is written when a run begins: start a new one"


def write_kept(path: Path, keys: Tensor, values: Tensor) -> None:
    """Write `keys` (N,) int64 and `values` (N, D) fp32 whole or not at all."""
    write_atomic(path, save({"keys": keys, "values": values}))


def read_kept(path: Path, width: int, what: str) -> tuple[Tensor, Tensor]:
    """Keys (N,) int64 and values (N, `width`) fp32 of the file, which are `what`.

    CheckpointError when it is missing, damaged or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, which has the {what} of the rows", hint=_HINT)
    tensors = read_tensors(path)
    keys, values = tensors.get("keys"), tensors.get("values")
    if (
        keys is None
        or values is None
        or (keys.dtype, values.dtype) != (torch.int64, torch.float32)
        or keys.ndim != 1
        or values.shape != (len(keys), width)
    ):
        raise CheckpointError(f"{path} holds no {what} of rows", hint=_HINT)
    return keys, values
