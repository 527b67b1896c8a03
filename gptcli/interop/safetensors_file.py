"""Writing safetensors files tensor by tensor, so that they are never all in memory twice.

The format: 8 bytes with the header's length, the header (JSON: dtype, shape and place of each
tensor), then the numbers (https://github.com/huggingface/safetensors, "Format").
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptcli import stop

# The floats that are read and written, by their names in the header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT_BYTES = 8  # of the numbers' beginning


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    tensors: Iterable[tuple[str, Tensor]],
) -> int:
    """Write `tensors`, in whatever order they come, as `dtype`; returns the file's bytes.

    `dtype` is one for all or one for each name. Their places are in the order of `shapes`: those of
    larger numbers must come first, as each begins at a multiple of its numbers' size. ValueError
    when they are others than `shapes` says; `stop.Stopped` leaves the file cut short.
    """
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    header, places, end = file_header(shapes, dtypes)
    base = len(header)
    with open(path, "wb") as file:
        file.write(header)
        for name, tensor in tensors:
            stop.raise_if_requested()
            if name not in places or tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} {list(tensor.shape)} is not in the header, or came twice")
            file.seek(base + places.pop(name))
            file.write(numbers(tensor.to(dtype=dtypes[name])))
    if places:
        raise ValueError(f"{next(iter(places))} has not come")
    return base + end


def file_header(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> tuple[bytes, dict[str, int], int]:
    """A file's bytes before the numbers, where each tensor's begin behind them, and their bytes.

    The places are in the order of `shapes`.
    """
    # One metadata key, as several would come in any order; transformers wants to see this one.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        places[name], end = end, end + torch.Size(shape).numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtypes[name]],
            "shape": list(shape),
            "data_offsets": [places[name], end],
        }
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT_BYTES)
    return len(content).to_bytes(8, "little") + content, places, end


def stored_places(path: Path) -> dict[str, tuple[int, int]]:
    """Where in the file the bytes of each tensor begin and end. The file is one that was just
    written, not one to be wary of."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = {name: entry["data_offsets"] for name, entry in header.items() if name[0] != "_"}
    return {name: (8 + length + begin, 8 + length + end) for name, (begin, end) in places.items()}


def numbers(tensor: Tensor) -> memoryview:
    """The tensor's bytes in the order of a file; of one on the CPU that is contiguous, no copy."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
