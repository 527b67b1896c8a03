"""Files that hold token ids instead of text: .npy arrays, and .bin files of nanoGPT and llm.c."""

import os
from collections.abc import Iterator
from tokenize import TokenError
from typing import Any

import numpy as np

from gptcli import stop
from gptcli.data.files import SourceFile, damaged_hint
from gptcli.data.shards import Shard
from gptcli.errors import DataError

PIECE_TOKENS = 16 * 1024

# llm.c, dev/data/data_common.py: a header of 256 int32 (magic, version, number of tokens), then the
# tokens. No file of nanoGPT starts with one of these numbers: its first token would be above 55000.
_HEADER_BYTES = 256 * 4
_LLMC_EVAL_MAGIC = 20240522
_LLMC: dict[int, tuple[int, np.dtype[Any]]] = {
    20240520: (1, np.dtype("<u2")),  # GPT-2
    20240801: (7, np.dtype("<u4")),  # Llama 3
}
_NPY_DTYPES = [np.dtype(name) for name in ("<u2", "<i4", "<u4", "<i8")]

_Ids = np.ndarray[Any, np.dtype[Any]]


def token_count(file: SourceFile) -> int:
    """Number of token ids in the file; only its header is read.

    DataError when it is not an array of token ids, or shorter or longer than it says.
    """
    return len(_open(file))


def token_bytes(file: SourceFile) -> int:
    """Bytes that the token ids take in the file, as the records' "bytes" add up to."""
    return _open(file).nbytes


def read_tokens(shard: Shard) -> Iterator[dict[str, Any]]:
    """Records of a shard of kind tokens: pieces of about 16384 tokens (uint16 or uint32).

    Piece k ends before the last `shard.eot` of the k-th 16384 tokens of [shard.low, shard.high), or
    with them where there is none, so that every piece is found without reading those before it.
    A piece that begins where a document does has part 0 and is given without the eot before it; the
    eots inside a piece stay. "bytes" is the size in the file. DataError as `token_count`, and for
    ids that are negative or do not fit into 32 bits.
    """
    file, ids = shard.file, _open(shard.file)
    if not 0 <= shard.low <= shard.high <= len(ids):
        raise DataError(f"{file.path}: has {len(ids)} tokens only; it changed while it was read")
    begin = _piece_end(ids, shard, shard.start - 1) if shard.start else shard.low
    for number in range(shard.start, shard.stop):
        stop.raise_if_requested()
        end = _piece_end(ids, shard, number)
        size = (end - begin) * ids.itemsize
        tokens = _unsigned(ids[begin:end], file, begin)
        first = shard.eot is not None and len(tokens) > 0 and int(tokens[0]) == shard.eot
        # The last eot of the file is that of nanoGPT, which writes one behind each document; what
        # comes next in training is given one anyway.
        last = end == shard.high and len(tokens) > first and int(tokens[-1]) == shard.eot
        tokens = tokens[int(first) : len(tokens) - int(last)]
        if len(tokens):
            yield {
                "document": file.path,
                "part": 0 if first else number,
                "number": number,
                "bytes": size,
                "source": file.number,
                "mixed": True,  # pieces of one file are of many documents
                "tokens": tokens,
            }
        begin = end


def _piece_end(ids: _Ids, shard: Shard, number: int) -> int:
    low = min(shard.low + number * PIECE_TOKENS, shard.high)
    grid = min(low + PIECE_TOKENS, shard.high)
    if grid == shard.high or shard.eot is None:
        return grid
    found = np.flatnonzero(ids[low:grid] == shard.eot)
    return low + int(found[-1]) if len(found) else grid


def _unsigned(ids: _Ids, file: SourceFile, begin: int) -> _Ids:
    """The ids as uint16 or uint32, in memory."""
    if ids.dtype.kind == "u":
        return ids.copy()
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= 2**32):
        bad = int(np.flatnonzero((ids < 0) | (ids.astype(np.int64) >= 2**32))[0])
        raise DataError(f"{file.path}: {int(ids[bad])} at place {begin + bad} is not a token id")
    return ids.astype(np.uint32)


def _open(file: SourceFile) -> _Ids:
    """The ids, mapped into memory. np.asarray: slices of a np.memmap object are slow."""
    if "://" in file.path:
        raise DataError(f"{file.path}: files of token ids are read from the local disk only")
    try:
        return _open_npy(file.path) if file.path.endswith(".npy") else _open_bin(file.path)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, SyntaxError, TokenError) as error:  # of a header, in Python
        kinds = "a 1-D .npy (uint16, int32, uint32 or int64) or a .bin of nanoGPT (uint16) or llm.c"
        raise DataError(
            f"{file.path}: not a file of token ids: {error}",
            hint=damaged_hint(file, f"token ids are {kinds}"),
        ) from error


def _open_npy(path: str) -> _Ids:
    ids = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(ids, np.ndarray):
        raise ValueError("an .npz archive, not one array")
    if ids.ndim != 1:
        raise ValueError(f"an array of shape {ids.shape}, not 1-D")
    if ids.dtype not in _NPY_DTYPES:
        raise ValueError(f"an array of {ids.dtype}")
    if not len(ids):
        raise ValueError("it is empty")
    return np.asarray(ids)


def _open_bin(path: str) -> _Ids:
    size = os.path.getsize(path)
    if not size:
        raise ValueError("it is empty")
    with open(path, "rb") as f:
        header = f.read(_HEADER_BYTES)
    magic, version, count = (int(n) for n in np.frombuffer(header[:12].ljust(12, b"\0"), "<i4"))
    if magic == _LLMC_EVAL_MAGIC:
        raise ValueError("an evaluation set of llm.c")
    if magic not in _LLMC:
        if size % 2:
            raise ValueError(f"{size} bytes are no whole number of uint16")
        return np.asarray(np.memmap(path, dtype="<u2", mode="r"))
    expected, dtype = _LLMC[magic]
    if version != expected:
        raise ValueError(f"llm.c's format version {version}, where {expected} is read")
    if count <= 0 or size != _HEADER_BYTES + count * dtype.itemsize:
        raise ValueError(f"its header says {count} tokens, which its {size} bytes are not")
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=_HEADER_BYTES, shape=(count,)))
