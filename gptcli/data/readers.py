"""Shards of a corpus and the records in them.

A shard is about 1 MiB of one file, so a saved cursor finds its place by one seek. Text files are
one document each, cut into pieces at line ends; JSON lines are one document a row.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from gptcli import stop
from gptcli.data.builtin import builtin_rows
from gptcli.data.files import SourceFile, open_utf8
from gptcli.errors import DataError

log = logging.getLogger("gptcli")

PIECE_BYTES = 64 * 1024
SHARD_PIECES = 16  # 1 MiB
SHARD_BYTES = PIECE_BYTES * SHARD_PIECES
BUILTIN_SHARD_ROWS = 256


@dataclass(frozen=True)
class Split:
    """Which part of the corpus to read. tail: the last `fraction` of each document is held out;
    hash: documents whose hash is below `threshold` are; none: nothing is."""

    kind: Literal["none", "tail", "hash"]
    part: Literal["train", "val"] = "train"
    fraction: float = 0.0
    threshold: int = 0

    def has(self, digest: int) -> bool:
        """Whether a document with this hash is in the part (kind hash)."""
        return (digest < self.threshold) == (self.part == "val")


@dataclass(frozen=True)
class Shard:
    """A range of one file: pieces [start, stop) of the bytes [low, high) for text, bytes
    [start, stop) for rows, row numbers for a builtin."""

    file: SourceFile
    start: int
    stop: int
    split: Split
    low: int = 0
    high: int = 0
    as_rows: bool = False


@dataclass
class Problems:
    """What was repaired or left out while reading, by file."""

    replaced_bytes: dict[str, int] = field(default_factory=dict)
    skipped_rows: dict[str, int] = field(default_factory=dict)


def read_shards(shards: list[Shard], problems: Problems | None = None) -> Iterator[dict[str, Any]]:
    """Records of the shards in order: {"document": id, "part": piece number, "bytes": UTF-8 size}
    with "text", or with "row" (a mapping) for shards read `as_rows`."""
    problems = problems if problems is not None else Problems()
    for shard in shards:
        if shard.file.kind == "text":
            yield from _pieces(shard, problems)
        elif shard.file.kind == "rows":
            yield from _from_rows(shard, _json_rows(shard, problems), problems)
        else:
            name = shard.file.path.removeprefix("builtin:")
            rows = list(enumerate(builtin_rows(name)))[shard.start : shard.stop]
            yield from _from_rows(shard, iter(rows), problems)


def content_hash(content: str | dict[str, Any]) -> int:
    """64-bit hash of a document (its first 64 KiB) or row, the same on every machine."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    data = text[:PIECE_BYTES].encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def row_bytes(row: dict[str, Any]) -> int:
    """Size of a row by which progress through an epoch is measured."""
    return len(json.dumps(row))


def tail_start(data: bytes, fraction: float) -> int:
    """Where the last `fraction` of UTF-8 text `data` begins: after a line end or space nearby,
    never later than the exact place."""
    return _cut(data, int(len(data) * (1.0 - fraction)))


def file_tail_start(file: SourceFile, size: int, fraction: float) -> int:
    """`tail_start` of a file of `size` bytes, reading only around the place."""
    place = int(size * (1.0 - fraction))
    low = max(0, place - 4096)
    with open_utf8(file) as f:
        f.seek(low)
        return low + _cut(f.read(place - low + 1), place - low)


def _cut(data: bytes, place: int) -> int:
    """The last line end in the 4096 bytes before `place`, else the last space in 256, else the
    start of the character at `place`."""
    for mark, reach in ((b"\n", 4096), (b" ", 256)):
        found = data.rfind(mark, max(0, place - reach), place)
        if found > 0:
            return found + 1
    while place > 0 and place < len(data) and data[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _pieces(shard: Shard, problems: Problems) -> Iterator[dict[str, Any]]:
    """Text pieces: piece k ends at the last line end of the k-th 64 KiB, or within a character
    of its end where there is none, so every piece is found without reading those before it."""
    with open_utf8(shard.file) as f:
        begin = _piece_end(f, shard, shard.start - 1) if shard.start else shard.low
        f.seek(begin)
        for number in range(shard.start, shard.stop):
            stop.raise_if_requested()
            grid = min(shard.low + (number + 1) * PIECE_BYTES, shard.high)
            data = f.read(grid - begin)
            end = begin + _last_end(data, max(0, grid - PIECE_BYTES - begin), grid == shard.high)
            if end < grid:
                f.seek(end)
            data = data[: end - begin]
            if data:
                text = _decode(data, shard, begin, problems)
                yield {
                    "document": shard.file.path,
                    "part": number,
                    "bytes": len(data),
                    "text": text,
                }
            begin = end


def _piece_end(f: BinaryIO, shard: Shard, number: int) -> int:
    grid = min(shard.low + (number + 1) * PIECE_BYTES, shard.high)
    low = max(shard.low, grid - PIECE_BYTES)
    f.seek(low)
    return low + _last_end(f.read(grid - low), 0, grid == shard.high)


def _last_end(data: bytes, after: int, final: bool) -> int:
    """Length of the piece in `data`, which reaches to the grid line: up to the last line end at
    or behind `after`, else up to the last whole character."""
    if final:
        return len(data)
    newline = data.rfind(b"\n", after)
    if newline >= 0:
        return newline + 1
    for back in range(1, min(4, len(data)) + 1):  # a lead byte whose character is not whole
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            width = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if width > back else len(data)
    return len(data)


def _decode(data: bytes, shard: Shard, offset: int, problems: Problems) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        path = shard.file.path
        if shard.file.source.on_bad_text == "error":
            raise DataError(
                f"{path}: invalid UTF-8 at byte {offset + error.start}",
                hint="on_bad_text: replace reads it with U+FFFD",
            ) from error
        text = data.decode("utf-8", "replace")
        bad = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
        problems.replaced_bytes[path] = problems.replaced_bytes.get(path, 0) + bad
        return text


def _json_rows(shard: Shard, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows whose line starts in the shard's bytes, with the line's offset as their number."""
    with open_utf8(shard.file) as f:
        offset = shard.start
        if offset:  # the line around the border belongs to the shard where it starts
            f.seek(offset - 1)
            offset += len(f.readline()) - 1
        while offset < shard.stop:
            line = f.readline()
            if not line:
                break
            if line.strip():
                row = _json_row(line, shard, offset, problems)
                if row is not None:
                    yield offset, row
            offset += len(line)


def _json_row(
    line: bytes, shard: Shard, offset: int, problems: Problems
) -> dict[str, Any] | None:
    try:
        row = json.loads(_decode(line, shard, offset, problems))
        if isinstance(row, dict):
            return row
        problem = f"a row must be a JSON object, not {type(row).__name__}"
    except (ValueError, RecursionError) as error:
        problem = f"not a JSON row: {error}"
    _bad_row(problem, shard, offset, problems)
    return None


def _bad_row(problem: str, shard: Shard, number: int, problems: Problems) -> None:
    if shard.file.source.on_bad_row == "skip":
        path = shard.file.path
        problems.skipped_rows[path] = problems.skipped_rows.get(path, 0) + 1
        return
    raise DataError(
        f"{row_place(shard.file, number)}: {problem}", hint="on_bad_row: skip leaves such rows out"
    )


def row_place(file: SourceFile, number: int) -> str:
    """`path:line` of the row that starts at byte `number`; a builtin's row number as it is."""
    if file.kind == "builtin":
        return f"{file.path} row {number}"
    with open_utf8(file) as f:
        f.seek(0)
        line = f.read(number).count(b"\n") + 1
    return f"{file.path}:{line}"


def _from_rows(
    shard: Shard, rows: Iterator[tuple[int, dict[str, Any]]], problems: Problems
) -> Iterator[dict[str, Any]]:
    for number, row in rows:
        stop.raise_if_requested()
        document = f"{shard.file.path}:{number}"
        if shard.as_rows:
            if shard.split.kind == "none" or shard.split.has(content_hash(row)):
                yield {"document": document, "part": 0, "bytes": row_bytes(row), "row": row}
            continue
        text = _text_field(shard, number, row, problems)
        if text is None or (shard.split.kind == "hash" and not shard.split.has(content_hash(text))):
            continue
        if shard.split.kind == "tail":
            data = text.encode("utf-8", "replace")
            cut = tail_start(data, shard.split.fraction)
            data = data[:cut] if shard.split.part == "train" else data[cut:]
            text = data.decode("utf-8", "replace")
        yield from _cut_text(document, text)


def _text_field(
    shard: Shard, number: int, row: dict[str, Any], problems: Problems
) -> str | None:
    name = shard.file.source.text_field
    value = row.get(name)
    if isinstance(value, str):
        return value or None
    if name in row and value is None:
        path = shard.file.path
        problems.skipped_rows[path] = problems.skipped_rows.get(path, 0) + 1
        return None
    problem = f"field {name!r} is not text but {type(value).__name__}"
    if name not in row:
        problem = f"no field {name!r} (has: {', '.join(row)}); set data.train[0].text_field"
    _bad_row(problem, shard, number, problems)
    return None


def _cut_text(document: str, text: str) -> Iterator[dict[str, Any]]:
    """A row's text as pieces of at most about 64 KiB, cut at line ends."""
    part = 0
    data = text.encode("utf-8", "replace")
    while data:
        end = _last_end(data[:PIECE_BYTES], 0, final=len(data) <= PIECE_BYTES)
        piece, data = data[:end], data[end:]
        yield {"document": document, "part": part, "bytes": len(piece), "text": piece.decode()}
        part += 1
