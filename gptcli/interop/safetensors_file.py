"""Writing safetensors files tensor by tensor, so that never all of them are in memory.

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
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "I8"}
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
    # One metadata key, as several would come in any order; transformers wants to see this one.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
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
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        base = file.tell()
        for name, tensor in tensors:
            stop.raise_if_requested()
            if name not in places or tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} {list(tensor.shape)} is not in the header, or came twice")
            file.seek(base + places.pop(name))
            plain = tensor.detach().to("cpu", dtypes[name]).contiguous().flatten()
            file.write(plain.view(torch.uint8).numpy().data)
    if places:
        raise ValueError(f"{next(iter(places))} has not come")
    return base + end
