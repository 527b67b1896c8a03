"""How the tokens of a corpus are written to disk: the format of the token cache.

A store is a directory of
    manifest.json      what it is, and the size of every other file
    tokens-00000.bin   token ids, one record after the other, little-endian uint16 or uint32
    index.bin          a row of six int64 a record: COLUMNS
    blocks.npy         a row of six int64 a block: BLOCK_COLUMNS
    names.json         how the records' documents are called
A block is up to a thousand records of one shard, all in one file. It is the unit that is read at
once, and its checksum is verified when it is first read: a store opens without reading its tokens.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptcli import stop
from gptcli.data.readers import read_shards
from gptcli.data.shards import Shard
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError, ResourceError

log = logging.getLogger("gptcli")

MANIFEST, INDEX, BLOCKS, NAMES = "manifest.json", "index.bin", "blocks.npy", "names.json"
COLUMNS = ("tokens", "bytes", "part", "number", "name", "document")
BLOCK_COLUMNS = ("shard", "records", "file", "start", "tokens", "crc32")
BLOCK_RECORDS, BLOCK_TOKENS = 1024, 1 << 20
FILE_TOKENS = 1 << 29  # 2 GiB at most, which every file system takes
_CHUNK_BYTES = 256 * 1024  # text encoded by one call: much longer than starting a call takes
_FIRST_REPORT_SECONDS, _REPORT_SECONDS = 1.0, 5.0
_UNKNOWN_BYTES = 1 << 20  # weight of a file without a size (a builtin) in the progress

Ids = np.ndarray[Any, np.dtype[Any]]


def token_file(number: int) -> str:
    """Name of the store's file `number` of tokens."""
    return f"tokens-{number:05d}.bin"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where all ids fit into it, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_record(record: dict[str, Any], tokenizer: Tokenizer) -> Ids:
    """The record's tokens. DataError when one is outside the vocabulary (pre-tokenised sources)."""
    tokens: Ids = record["tokens"] if "tokens" in record else tokenizer.encode_numpy(record["text"])
    if len(tokens) and int(tokens.max()) >= tokenizer.vocab_size:
        raise DataError(
            f"{record['document']}: token id {int(tokens.max())} is outside the vocabulary of"
            f" {tokenizer.vocab_size}"
        )
    return tokens


def write_store(
    directory: Path, shards: list[Shard], tokenizer: Tokenizer, threads: int, about: dict[str, Any]
) -> None:
    """Read and encode all shards into the new `directory`, flushed to the disk; the manifest holds
    `about` too. Raises what reading raises, OSError when writing fails, ResourceError when the disk
    will not hold it, `stop.Stopped` on a stop request."""
    writer = _Writer(directory, token_dtype(tokenizer.vocab_size))
    progress = _Progress(directory, shards)
    try:
        for shard, record, tokens in _encoded(shards, tokenizer, threads):
            writer.add(shard, record, tokens, shards[shard].file.path)
            progress.report(shard, record["bytes"], writer)
        writer.finish(about)
    finally:
        writer.close()


def _encoded(
    shards: list[Shard], tokenizer: Tokenizer, threads: int
) -> Iterator[tuple[int, dict[str, Any], Ids]]:
    """Shard number, record and tokens of every record, in order; `threads` encode at once."""

    def encode(records: list[tuple[int, dict[str, Any]]]) -> list[Ids]:
        return [encode_record(record, tokenizer) for _, record in records]

    pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
    queue: deque[tuple[list[tuple[int, dict[str, Any]]], Future[list[Ids]]]] = deque()
    try:
        for records in _chunks(shards):
            queue.append((records, pool.submit(encode, records)))
            if len(queue) > 2 * threads:
                yield from _done(*queue.popleft())
        while queue:
            yield from _done(*queue.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(shards: list[Shard]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    chunk: list[tuple[int, dict[str, Any]]] = []
    size = 0
    for number, shard in enumerate(shards):
        for record in read_shards([shard]):
            stop.raise_if_requested()
            chunk.append((number, record))
            size += record["bytes"]
            if size >= _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _done(
    records: list[tuple[int, dict[str, Any]]], future: Future[list[Ids]]
) -> Iterator[tuple[int, dict[str, Any], Ids]]:
    for (shard, record), tokens in zip(records, future.result(), strict=True):
        yield shard, record, tokens


class _Writer:
    """The files of a store that is being written."""

    def __init__(self, directory: Path, dtype: np.dtype[Any]) -> None:
        self.tokens = 0  # written in all
        self.itemsize = dtype.itemsize
        self._directory, self._dtype = directory, dtype
        self._index: BinaryIO = (directory / INDEX).open("wb")
        self._files: list[BinaryIO] = []
        self._file_tokens = 0
        self._names: dict[tuple[bool, str], int] = {}
        self._blocks: list[tuple[int, ...]] = []
        self._shard, self._rows, self._parts = -1, [], []  # type: int, list[tuple[int, ...]], list[Ids]
        self._block_tokens, self._records, self._max_id = 0, 0, -1

    def add(self, shard: int, record: dict[str, Any], tokens: Ids, path: str) -> None:
        """Append one record of shard `shard`, which reads the file `path`."""
        full = len(self._rows) >= BLOCK_RECORDS or self._block_tokens >= BLOCK_TOKENS
        if shard != self._shard or full:
            self._write_block()
            self._shard = shard
        relative, text, number = _name(record["document"], path)
        name = self._names.setdefault((relative, text), len(self._names))
        self._rows.append(
            (len(tokens), record["bytes"], record["part"], record["number"], name, number)
        )
        self._parts.append(tokens)
        self._block_tokens += len(tokens)

    def finish(self, about: dict[str, Any]) -> None:
        """Write the last block, the tables and the manifest, all flushed to the disk."""
        self._write_block()
        blocks = np.array(self._blocks, dtype=np.int64).reshape(-1, len(BLOCK_COLUMNS))
        np.save(self._directory / BLOCKS, blocks, allow_pickle=False)
        (self._directory / NAMES).write_text(json.dumps(list(self._names)))
        self.close()
        paths = sorted(self._directory.iterdir())
        manifest = {
            **about,
            "dtype": self._dtype.name,
            "records": self._records,
            "tokens": self.tokens,
            "max_id": self._max_id,
            "bytes": {path.name: path.stat().st_size for path in paths},
            "sha256": {name: sha256(self._directory / name) for name in (BLOCKS, NAMES)},
        }
        (self._directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in [*paths, self._directory / MANIFEST, self._directory]:
            fsync(path)

    def close(self) -> None:
        """Close the files; what is not yet written is lost."""
        for file in [self._index, *self._files]:
            file.close()

    def _write_block(self) -> None:
        if not self._rows:
            return
        tokens = np.concatenate(self._parts).astype(self._dtype, copy=False)
        if not self._files or self._file_tokens + len(tokens) > FILE_TOKENS:
            name = token_file(len(self._files))
            self._files.append((self._directory / name).open("wb"))
            self._file_tokens = 0
        rows = np.array(self._rows, dtype=np.int64)
        self._index.write(rows.data)
        self._files[-1].write(tokens.data)
        self._blocks.append(
            (
                self._shard,
                len(rows),
                len(self._files) - 1,
                self._file_tokens,
                len(tokens),
                checksum(rows, tokens),
            )
        )
        self._file_tokens += len(tokens)
        self.tokens += len(tokens)
        self._records += len(rows)
        self._max_id = max(self._max_id, int(tokens.max(initial=0)))
        self._rows, self._parts, self._block_tokens = [], [], 0


class _Progress:
    """Tells every few seconds how far the writing is, and whether the disk will hold the rest."""

    def __init__(self, directory: Path, shards: list[Shard]) -> None:
        self._directory = directory
        self._weights = _weights(shards)
        self._total = max(sum(self._weights), 1.0)
        self._shard, self._before, self._inside = 0, 0.0, 0.0
        self._begin = time.monotonic()
        self._next = self._begin + _FIRST_REPORT_SECONDS  # a disk too small is told of at once

    def report(self, shard: int, size: int, writer: _Writer) -> None:
        """Count a record of `size` bytes."""
        if shard != self._shard:
            self._before += sum(self._weights[self._shard : shard])
            self._shard, self._inside = shard, 0.0
        self._inside = min(self._inside + size, self._weights[shard])
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _REPORT_SECONDS
        share = (self._before + self._inside) / self._total
        rate = writer.tokens / (now - self._begin)
        log.info(f"tokenising: {share:.0%}, {rate / 1e6:.1f} M tokens/s".replace("%", " %"))
        left = writer.tokens * writer.itemsize * (1.0 - share) / share if share >= 0.01 else 0.0
        free = shutil.disk_usage(self._directory).free
        if left > free:
            raise ResourceError(
                f"{self._directory.parent}: the token cache needs {left / 1e9:.1f} GB more,"
                f" and {free / 1e9:.1f} GB are free",
                hint="data.cache: off works without it; GPT_CACHE puts it on another disk",
            )


def _weights(shards: list[Shard]) -> list[float]:
    """About how many bytes each shard holds: its file's size over the file's shards."""
    counts = Counter(shard.file.path for shard in shards)
    sizes: dict[str, float] = {}
    for shard in shards:
        path = shard.file.path
        if path not in sizes:
            local = os.path.getsize(path) if os.path.isfile(path) else _UNKNOWN_BYTES
            sizes[path] = float(shard.file.size or local) / counts[path]
    return [sizes[shard.file.path] for shard in shards]


def _name(document: str, path: str) -> tuple[bool, str, int]:
    """A document's name without the number at its end (-1: it has none), so that the documents of
    a file share one: whether it begins with the file's path, what comes behind, the number."""
    relative = document.startswith(path)
    text = document.removeprefix(path)
    match = re.search(r"(?<![0-9])(0|[1-9][0-9]{0,17})\Z", text, re.ASCII)
    return (relative, text[: match.start()], int(match[1])) if match else (relative, text, -1)


def checksum(rows: Ids, tokens: Ids) -> int:
    """CRC-32 of a block: its rows of the index, then its tokens."""
    return zlib.crc32(tokens.data, zlib.crc32(rows.data))


def sha256(path: Path) -> str:
    """Of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
