"""The token cache: the tokens of a corpus, kept on disk and shared by the runs that read it.

A store gives the same records in the same order as reading and encoding the shards does, so a run
may begin with it and go on without it. A damaged one is never an error: it is written again.
"""

import contextlib
import errno
import hashlib
import json
import logging
import mmap
import os
import shutil
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gptcli import stop
from gptcli.data.cache_folder import cache_root
from gptcli.data.readers import read_shards
from gptcli.data.shards import Shard
from gptcli.data.store_lock import LOCK, locked
from gptcli.data.store_writer import (
    BLOCKS,
    COLUMNS,
    INDEX,
    MANIFEST,
    NAMES,
    Ids,
    checksum,
    encode_record,
    fsync,
    sha256,
    token_dtype,
    token_file,
    write_store,
)
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ResourceError

log = logging.getLogger("gptcli")

FORMAT = 1  # a number of its own for each change of what a store holds or how it is read
UNUSED_SECONDS = 60 * 24 * 3600
_BUILDING = ".building"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REPAIR_RECORDS = 64
_RELEASE_BYTES = 64 * 1024 * 1024  # of tokens; the index of short documents is as large again


class _DamagedError(Exception):
    """A store does not hold what it should; never leaves this module."""


@dataclass(frozen=True)
class StoreSize:
    """A store on disk: its size and when it was last opened (seconds since 1970)."""

    path: Path
    size_bytes: int
    last_used: float


@dataclass(frozen=True)
class TokenStore:
    """An open store: the tokens of `shards`, mapped into memory.

    `tokens` is their number (without the eot before documents); `blocks` has BLOCK_COLUMNS, `index`
    COLUMNS; block b's rows of the index begin at `block_rows[b]`, shard s's blocks at
    `shard_blocks[s]`.
    """

    path: Path
    shards: list[Shard]
    tokenizer: Tokenizer
    tokens: int
    files: list[Ids]
    index: Ids
    blocks: Ids
    block_rows: list[int]
    shard_blocks: list[int]
    names: list[tuple[bool, str]]
    verified: bytearray
    maps: list[mmap.mmap]

    def release(self) -> None:
        """Give the pages read so far back: the system keeps them as long as memory allows, but
        they no longer count as this process's. What is still in use is mapped again."""
        for mapped in self.maps:
            if sys.platform != "win32" and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


def open_store(
    shards: list[Shard],
    tokenizer: Tokenizer,
    key: str,
    threads: int,
    check_unchanged: Callable[[], None] = lambda: None,
) -> TokenStore:
    """The tokens of `shards`, written first where they are not yet there or damaged.

    `key` is a sha256 over what the shards' description leaves out: the files' fingerprint, reading
    options, filters and split; `check_unchanged` raises where a file is no longer what that says,
    and is called before a new store is kept. Two processes write one store once. Raises
    ResourceError when it cannot be written, `stop.Stopped` on a stop request, and what reading the
    shards raises.
    """
    assert all(shard.fields is None for shard in shards), "rows of finetuning are not cached"
    about = {
        "format": FORMAT,
        "key": key,
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "shards": _description(shards),
    }
    root = cache_root() / "tokens"
    path = root / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    try:
        _remove_unfinished(root)
        with contextlib.suppress(FileNotFoundError, _DamagedError):
            return _open(path, shards, tokenizer, about)
        root.mkdir(parents=True, exist_ok=True)
        with locked(path):
            try:
                return _open(path, shards, tokenizer, about)  # another process wrote it meanwhile
            except FileNotFoundError:
                pass
            except _DamagedError as error:
                log.warning(f"{path}: the token cache is damaged ({error}); tokenising again")
                shutil.rmtree(path)
            _build(path, shards, tokenizer, threads, about, check_unchanged)
        _remove_unused(root)
        return _open(path, shards, tokenizer, about)
    except _DamagedError as error:
        raise ResourceError(f"{path}: not what was just written there: {error}") from error
    except OSError as error:
        full = error.errno in _NO_SPACE
        raise ResourceError(
            f"{root}: the token cache cannot be written: {error.strerror or error}",
            hint=f"{'free some space; ' if full else ''}data.cache: off works without it; GPT_CACHE"
            " puts it elsewhere",
        ) from error


class StoreReader:
    """Records of a store, shard by shard: those that reading and encoding its shards gives."""

    def __init__(self, store: TokenStore) -> None:
        self.shards = len(store.shards)
        self._store = store
        self._mapped_bytes = 0  # read since pages were last given back
        self.open(range(self.shards), (0, 0))

    def open(self, order: Sequence[int], cursor: tuple[int, int]) -> None:
        """Walk the shards in this order, from a place in it and a number of records to skip."""
        self._order = order
        self._place, self._before = cursor  # `before`: records of the shard before `records`
        self._records: list[dict[str, Any]] = []
        self._at = 0
        self._source: Iterator[dict[str, Any]] | None = None  # where the store is damaged

    def next(self) -> dict[str, Any] | None:
        """The next record, with "tokens"; None behind the last shard."""
        while self._at == len(self._records):
            if self._place >= len(self._order):
                return None
            self._before += len(self._records)
            self._at = 0
            self._records = self._read()
            if not self._records:
                self._place, self._before = self._place + 1, 0
        record = self._records[self._at]
        self._at += 1
        return record

    def cursor(self) -> tuple[int, int]:
        """Behind the last record: the shard's place in the order, and how many of its records."""
        return self._place, self._before + self._at

    def _read(self) -> list[dict[str, Any]]:
        """Records of the present shard behind the first `before`; none at its end."""
        stop.raise_if_requested()
        store, shard = self._store, self._order[self._place]
        if self._source is None:
            try:
                records = _block_records(store, shard, self._before)
                self._mapped_bytes += sum(r["tokens"].nbytes for r in records)
                if self._mapped_bytes > _RELEASE_BYTES:
                    store.release()
                    self._mapped_bytes = 0
                return records
            except _DamagedError as error:
                if (store.path / MANIFEST).exists():  # the next start writes the store again
                    log.warning(f"{store.path}: the token cache is damaged ({error}); reading text")
                    with contextlib.suppress(OSError):
                        (store.path / MANIFEST).unlink()
                self._source = islice(read_shards([store.shards[shard]]), self._before, None)
        records = list(islice(self._source, _REPAIR_RECORDS))
        for record in records:
            record["tokens"] = encode_record(record, store.tokenizer)
        if not records:
            self._source = None
        return records


def _block_records(store: TokenStore, shard: int, skip: int) -> list[dict[str, Any]]:
    """Records of the block in which record `skip` of the shard is, from that one on."""
    begin, end = store.shard_blocks[shard], store.shard_blocks[shard + 1]
    row = store.block_rows[begin] + skip
    if row >= store.block_rows[end]:
        return []
    block = bisect_right(store.block_rows, row, begin, end) - 1
    first, last = store.block_rows[block], store.block_rows[block + 1]
    skip = row - first
    _, _, holder, place, count, crc = store.blocks[block].tolist()
    rows, ids = store.index[first:last], store.files[holder][place : place + count]
    if not store.verified[block]:
        if checksum(rows, ids) != crc:
            raise _DamagedError(f"wrong checksum in {token_file(holder)} or {INDEX}")
        store.verified[block] = True
    ends = np.cumsum(rows[:, 0])
    if skip:
        ids, ends, rows = ids[ends[skip - 1] :], ends[skip:] - ends[skip - 1], rows[skip:]
    file = store.shards[shard].file
    stops = ends.tolist()
    # Whole columns as lists: with short documents, time goes into the records, not the tokens.
    _, sizes, parts, numbers, names, documents = rows.T.tolist()
    prefix = {name: _prefix(store.names[name], file.path) for name in set(names)}
    return [
        {
            "document": f"{prefix[name]}{document}" if document >= 0 else prefix[name],
            "part": part,
            "number": number,
            "bytes": size,
            "source": file.number,
            "mixed": file.kind == "tokens",
            "tokens": ids[begin:end],
        }
        for begin, end, size, part, number, name, document in zip(
            [0, *stops[:-1]], stops, sizes, parts, numbers, names, documents, strict=True
        )
    ]


def _prefix(name: tuple[bool, str], path: str) -> str:
    relative, text = name
    return path + text if relative else text


def store_sizes() -> list[StoreSize]:
    """The stores in the cache, the one used last first."""
    sizes = []
    for path in _stores(cache_root() / "tokens"):
        with contextlib.suppress(OSError):  # removed meanwhile
            size = sum(file.stat().st_size for file in path.iterdir())
            sizes.append(StoreSize(path, size, (path / MANIFEST).stat().st_mtime))
    return sorted(sizes, key=lambda size: -size.last_used)


def _description(shards: list[Shard]) -> str:
    """sha256 over all that the shards say about what to read."""
    digest = hashlib.sha256()
    said = [field.name for field in fields(Shard) if field.name not in ("file", "dropped")]
    texts: dict[int, str] = {}  # by object: shards share their source and what is dropped
    for shard in shards:
        file, source, dropped = shard.file, shard.file.source, shard.dropped
        if id(source) not in texts:
            texts[id(source)] = source.model_dump_json(exclude={"weight"})
        if id(dropped) not in texts:
            texts[id(dropped)] = str(sorted(dropped))
        values = [file.path, file.kind, file.number, file.identity]
        values += [getattr(shard, name) for name in said]
        text = f"{values}{texts[id(source)]}{texts[id(dropped)]}"
        digest.update(text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _open(
    path: Path, shards: list[Shard], tokenizer: Tokenizer, about: dict[str, Any]
) -> TokenStore:
    """FileNotFoundError when there is no store, _DamagedError when it cannot be used."""
    if not path.is_dir():
        raise FileNotFoundError(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        _check(path, manifest, about)
        blocks = np.load(path / BLOCKS, allow_pickle=False)
        names = [
            (bool(relative), str(text)) for relative, text in json.loads((path / NAMES).read_text())
        ]
        maps: list[mmap.mmap] = []
        files = sum(name.startswith("tokens-") for name in manifest["bytes"])
        dtype = token_dtype(tokenizer.vocab_size)
        store = TokenStore(
            path,
            shards,
            tokenizer,
            manifest["tokens"],
            [_map(path / token_file(n), dtype, maps) for n in range(files)],
            _map(path / INDEX, np.dtype("<i8"), maps).reshape(-1, len(COLUMNS)),
            blocks,
            [0, *np.cumsum(blocks[:, 1]).tolist()],
            np.searchsorted(blocks[:, 0], np.arange(len(shards) + 1)).tolist(),
            names,
            bytearray(len(blocks)),
            maps,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(str(error)) from error
    with contextlib.suppress(OSError):  # a cache of another user
        os.utime(path / MANIFEST)
    return store


def _check(path: Path, manifest: dict[str, Any], about: dict[str, Any]) -> None:
    """ValueError unless the files are as the manifest says, and the manifest as asked for."""
    for name, value in about.items():
        if manifest[name] != value:
            raise ValueError(f"{MANIFEST} has another {name}")
    if not manifest["max_id"] < about["vocab_size"]:
        raise ValueError(f"token id {manifest['max_id']} is outside the vocabulary")
    for name, size in manifest["bytes"].items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} has another size")
    for name, digest in manifest["sha256"].items():
        if sha256(path / name) != digest:
            raise ValueError(f"wrong checksum of {name}")


def _map(path: Path, dtype: np.dtype[Any], maps: list[mmap.mmap]) -> Ids:
    """The file as an array; its mapping is added to `maps`. An empty file cannot be mapped."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    with path.open("rb") as f:
        maps.append(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    return np.frombuffer(maps[-1], dtype=dtype)


def _build(
    path: Path,
    shards: list[Shard],
    tokenizer: Tokenizer,
    threads: int,
    about: dict[str, Any],
    check_unchanged: Callable[[], None],
) -> None:
    building = path.with_name(path.name + _BUILDING)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        write_store(building, shards, tokenizer, threads, about)
        check_unchanged()
        building.rename(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _stores(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*") if path.is_dir() and not path.suffix)


def _remove_unfinished(root: Path) -> None:
    """Remove what builds left behind whose process was killed."""
    for left in [*root.glob(f"*{_BUILDING}"), *root.glob(f"*{LOCK}")]:
        with contextlib.suppress(OSError), locked(left.with_suffix(""), wait=False) as mine:
            if mine:
                shutil.rmtree(left.with_suffix(_BUILDING), ignore_errors=True)


def _remove_unused(root: Path) -> None:
    """Remove the stores that no run has opened for 60 days."""
    for store in store_sizes():
        if time.time() - store.last_used > UNUSED_SECONDS:
            with contextlib.suppress(OSError), locked(store.path, wait=False) as mine:
                if mine:
                    shutil.rmtree(store.path, ignore_errors=True)
                    log.info(f"{store.path}: not used for 60 days, removed")
