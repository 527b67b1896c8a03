"""How large a file is, what identifies its content, and where shards of it may begin."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from gptcli import stop
from gptcli.data.builtin import builtin_rows
from gptcli.data.files import SourceFile
from gptcli.data.opening import open_stored, open_utf8
from gptcli.data.pretokenised import token_count
from gptcli.data.shards import SHARD_BYTES, Problems, count
from gptcli.data.tables import csv_borders, row_count_and_borders

UNKNOWN_SIZE = 2**62  # of remote files that would have to be read to the end to be measured
_WHOLE = (0,)
_BLANK_LINE = re.compile(rb"\n\s*\n")


@dataclass(frozen=True)
class Layout:
    """`size` counts bytes of content (decompressed UTF-8 text without its mark), rows (.parquet,
    .arrow, builtin) or tokens; `UNKNOWN_SIZE` where a remote file does not tell it. `sha256` is
    that of the content, of the stored bytes for .parquet, .arrow and tokens, or the identity of a
    remote file. Shards may begin at `borders` only; None: anywhere.
    """

    size: int
    sha256: str
    borders: tuple[int, ...] | None


def layout(file: SourceFile, problems: Problems) -> Layout:
    """Measure and hash the file; a remote one is not read, but for what its format tells in a place
    of its own, and for compressed documents.

    `problems` counts what was replaced while text of another encoding was transcoded: nobody who
    reads the records can see that. DataError when the file is damaged, `stop.Stopped`.
    """
    if file.is_remote:
        return _remote(file, problems)
    if file.kind == "builtin":
        rows = builtin_rows(file.path.removeprefix("builtin:"))
        return Layout(len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest(), None)
    if file.kind == "tokens":
        return Layout(token_count(file), _stored_hash(file), None)
    if file.kind == "binary":
        size, sha256, _ = _content(file, problems)
        return Layout(size, sha256, None)
    if file.kind == "table" and not file.by_bytes:
        rows_found, borders = row_count_and_borders(file)
        return Layout(rows_found, _stored_hash(file), borders)
    size, sha256, paragraphs = _content(file, problems)
    if not file.seekable:
        return Layout(size, sha256, _WHOLE)
    if file.kind == "table":
        return Layout(size, sha256, csv_borders(file))
    by_paragraphs = file.kind == "lines" and file.source.document == "paragraph"
    return Layout(size, sha256, paragraphs if by_paragraphs else None)


def _remote(file: SourceFile, problems: Problems) -> Layout:
    size, name = file.size, f"{file.path} {file.size}".encode()
    sha256 = file.identity or hashlib.sha256(name).hexdigest()
    if file.kind == "tokens":
        return Layout(token_count(file), sha256, None)
    if file.kind == "table" and file.format == ".parquet":
        rows, borders = row_count_and_borders(file)
        return Layout(rows, sha256, borders)
    if file.kind == "table" and file.format == ".arrow":
        return Layout(UNKNOWN_SIZE, sha256, _WHOLE)
    if file.kind == "text" and not file.seekable:  # cut into pieces, so its size must be known
        return Layout(_content(file, problems)[0], sha256, _WHOLE)
    if not file.seekable or size is None:
        return Layout(UNKNOWN_SIZE, sha256, _WHOLE)
    anywhere = file.kind != "table" and file.source.document != "paragraph"
    return Layout(size, sha256, None if anywhere else _WHOLE)


def _stored_hash(file: SourceFile) -> str:
    digest = hashlib.sha256()
    with open_stored(file) as f:
        for block in _blocks(f):
            digest.update(block)
    return digest.hexdigest()


def _content(file: SourceFile, problems: Problems) -> tuple[int, str, tuple[int, ...]]:
    """Size and sha256 of the content, and where paragraphs begin about 1 MiB apart."""
    digest, size, borders, edge = hashlib.sha256(), 0, [0], b""
    look = file.source.document == "paragraph" and file.seekable
    with open_utf8(file, lambda bad: count(problems.invalid_utf8, file, bad)) as f:
        for block in _blocks(f):
            digest.update(block)
            if look:
                data = edge + bytes(block)
                found = _BLANK_LINE.search(data, max(0, borders[-1] + SHARD_BYTES - size))
                if found is not None:
                    borders.append(size - len(edge) + found.end())
                edge = data[-1:]
            size += len(block)
    return size, digest.hexdigest(), tuple(border for border in borders if border < max(size, 1))


def _blocks(f: BinaryIO) -> Iterator[Any]:
    """The file from its start in blocks of at most 1 MiB, each valid until the next."""
    f.seek(0)
    reader: Any = f
    buffer = memoryview(bytearray(SHARD_BYTES))
    while size := reader.readinto(buffer):
        stop.raise_if_requested()
        yield buffer[:size]
