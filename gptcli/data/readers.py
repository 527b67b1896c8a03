"""Shards of a corpus and the records in them.

A shard is about 1 MiB of one file, so a saved cursor finds its place by one seek. Text files are
one document each, cut into pieces at line ends; JSON lines are one document a row.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from gptcli import stop
from gptcli.data.builtin import builtin_rows
from gptcli.data.files import SourceFile, byte_order_mark, open_utf8
from gptcli.errors import DataError

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
    [start, stop) for rows, row numbers for a builtin. With `fields`, rows stay whole (finetuning)
    and hold text in each of them."""

    file: SourceFile
    start: int
    stop: int
    split: Split
    low: int = 0
    high: int = 0
    fields: tuple[str, ...] | None = None


@dataclass
class Problems:
    """What was repaired or left out while reading, by file: invalid UTF-8 sequences (and lone
    surrogates) read as U+FFFD, rows that could not be used, and rows whose text is null."""

    invalid_utf8: dict[str, int] = field(default_factory=dict)
    skipped_rows: dict[str, int] = field(default_factory=dict)
    null_rows: dict[str, int] = field(default_factory=dict)


def read_shards(shards: list[Shard], problems: Problems | None = None) -> Iterator[dict[str, Any]]:
    """Records of the shards in order: {"document": name, "part": piece number, "bytes": UTF-8 size}
    with "text", or with "row" (a mapping) for shards with `fields`. Rows come with the "digest" by
    which they are split."""
    problems = problems if problems is not None else Problems()
    for shard in shards:
        if shard.file.kind == "text":
            yield from _pieces(shard, problems)
        elif shard.file.kind == "lines":
            yield from _from_rows(shard, _text_rows(shard, problems), problems)
        elif shard.file.kind == "rows":
            yield from _from_rows(shard, _json_rows(shard, problems), problems)
        else:
            name = shard.file.path.removeprefix("builtin:")
            rows = builtin_rows(name)[shard.start : shard.stop]
            yield from _from_rows(shard, enumerate(rows, shard.start), problems)


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
    never later than the exact place, and never so early that the part becomes twice as long."""
    place = int(len(data) * (1.0 - fraction))
    return _cut(data, place, len(data) - place)


def file_tail_start(file: SourceFile, size: int, fraction: float) -> int:
    """`tail_start` of a file of `size` bytes, reading only around the place."""
    place = int(size * (1.0 - fraction))
    low = max(0, place - 4096)
    with open_utf8(file) as f:
        f.seek(low)
        return low + _cut(f.read(place - low + 1), place - low, size - place)


def _cut(data: bytes, place: int, most: int) -> int:
    """The last line end in the 4096 bytes before `place`, else the last space in 256, both at most
    `most` before it, else the start of the character at `place`."""
    for mark, reach in ((b"\n", min(4096, most)), (b" ", min(256, most))):
        found = data.rfind(mark, max(0, place - reach), place)
        if found > 0:
            return found + 1
    while place > 0 and place < len(data) and data[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _pieces(shard: Shard, problems: Problems) -> Iterator[dict[str, Any]]:
    """Text pieces: piece k ends at the last line end of the k-th 64 KiB, or within a character
    of its end where there is none, so every piece is found without reading those before it."""
    file = shard.file
    with open_utf8(file) as f:
        begin = _piece_end(f, shard, shard.start - 1) if shard.start else shard.low
        f.seek(begin)
        data = b""  # from `begin` on; what is behind a piece's end stays for the next one
        for number in range(shard.start, shard.stop):
            stop.raise_if_requested()
            grid = min(shard.low + (number + 1) * PIECE_BYTES, shard.high)
            data += f.read(grid - begin - len(data))
            end = _last_end(data, max(0, grid - PIECE_BYTES - begin), grid == shard.high)
            if end:
                text = decode(data[:end], file, begin, problems)
                yield {"document": file.path, "part": number, "bytes": end, "text": text}
            begin, data = begin + end, data[end:]


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
    return newline + 1 if newline >= 0 else whole_characters(data)


def whole_characters(data: bytes) -> int:
    """Length of UTF-8 `data` without a character that is cut short at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # where a character begins
            width = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if width > back else len(data)
    return len(data)


def decode(data: bytes, file: SourceFile, offset: int, problems: Problems) -> str:
    """Text of `data`, which stands at `offset` of the file's content.

    Invalid UTF-8 is a DataError with its place, or becomes U+FFFD and is counted.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if file.source.on_bad_text == "error":
            place = offset + error.start + byte_order_mark(file)
            raise DataError(
                f"{file.path}: invalid UTF-8 at byte {place}",
                hint="on_bad_text: replace reads it with U+FFFD",
            ) from error
        text = data.decode("utf-8", "replace")
        bad = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
        _count(problems.invalid_utf8, file, bad)
        return text


def _count(counts: dict[str, int], file: SourceFile, more: int = 1) -> None:
    counts[file.path] = counts.get(file.path, 0) + more


def _json_rows(shard: Shard, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows whose line starts in the shard's bytes, with the line's offset as their number."""
    for offset, line in _lines(shard):
        if line.strip():
            row = _json_row(line, shard, offset, problems)
            if row is not None:
                yield offset, row


def _text_rows(shard: Shard, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line, or each paragraph (lines up to a blank one), as a row with the text field."""
    source = shard.file.source
    begin, lines = 0, b""
    for offset, line in _lines(shard):
        if lines and (source.document == "line" or not line.strip()):
            yield begin, {source.text_field: _plain(lines, shard, begin, problems)}
            lines = b""
        if line.strip():
            begin, lines = (begin, lines + line) if lines else (offset, line)
    if lines:
        yield begin, {source.text_field: _plain(lines, shard, begin, problems)}


def _plain(lines: bytes, shard: Shard, offset: int, problems: Problems) -> str:
    return decode(lines.rstrip(b"\r\n"), shard.file, offset, problems)


def _lines(shard: Shard) -> Iterator[tuple[int, bytes]]:
    """Lines that start in the shard's bytes, with their offsets."""
    with open_utf8(shard.file) as f:
        offset = shard.start
        if offset:  # the line around the border belongs to the shard where it starts
            f.seek(offset - 1)
            offset += len(f.readline()) - 1
        while offset < shard.stop:
            line = f.readline()
            if not line:
                break
            yield offset, line
            offset += len(line)


def _json_row(line: bytes, shard: Shard, offset: int, problems: Problems) -> dict[str, Any] | None:
    try:
        row = json.loads(decode(line, shard.file, offset, problems).strip())
        if isinstance(row, dict):
            return row
        problem = f"a row must be a JSON object, not {type(row).__name__}"
    except (ValueError, RecursionError) as error:
        problem = f"not a JSON row: {error}"
    _bad_row(problem, shard, offset, problems)
    return None


def _bad_row(
    problem: str, shard: Shard, number: int, problems: Problems, hint: str | None = None
) -> None:
    """Count the row where the source allows that, else raise DataError."""
    if shard.file.source.on_bad_row == "skip":
        _count(problems.skipped_rows, shard.file)
        return
    raise DataError(
        f"{row_place(shard.file, number)}: {problem}",
        hint=hint or "on_bad_row: skip leaves such rows out",
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
    """Records of numbered rows, as far as they are in the shard's part of the split."""
    split = shard.split
    for number, row in rows:
        stop.raise_if_requested()
        where = (
            f"{shard.file.path}, row {'' if shard.file.kind == 'builtin' else 'at byte '}{number}"
        )
        if shard.fields is not None:
            problem = next(filter(None, (_not_text(row, name) for name in shard.fields)), None)
            if problem is not None:
                hint = "name the fields in finetune.fields: {prompt: ..., response: ...}"
                _bad_row(problem, shard, number, problems, hint)
                continue
            digest = content_hash(row)
            if split.kind == "none" or split.has(digest):
                size = row_bytes(row)
                yield {"document": where, "part": 0, "bytes": size, "row": row, "digest": digest}
            continue
        text = _text_field(shard, number, row, problems)
        if text is None or not text.strip():  # blanks only are no document
            continue
        text = _without_surrogates(text, shard, number, problems)
        digest = content_hash(text)
        if split.kind == "hash" and not split.has(digest):
            continue
        data = text.encode()
        if split.kind == "tail":
            cut = tail_start(data, split.fraction)
            data = data[:cut] if split.part == "train" else data[cut:]
        yield from _cut_text(where, data, digest)


def _text_field(shard: Shard, number: int, row: dict[str, Any], problems: Problems) -> str | None:
    """The row's text; None for null (counted) and for a bad row that may be skipped."""
    name = shard.file.source.text_field
    if name in row and row[name] is None:
        _count(problems.null_rows, shard.file)
        return None
    problem = _not_text(row, name)
    if problem is None:
        return str(row[name])
    _bad_row(problem, shard, number, problems, "set text_field of the source to the text's field")
    return None


def _without_surrogates(text: str, shard: Shard, number: int, problems: Problems) -> str:
    r"""Lone surrogates, which JSON can spell (`\ud83d`) and UTF-8 cannot, as U+FFFD, counted."""
    whole, count = re.subn(r"[\ud800-\udfff]", "\ufffd", text)
    if not count:
        return text
    if shard.file.source.on_bad_text == "error":
        raise DataError(
            f"{row_place(shard.file, number)}: the text has a lone surrogate",
            hint="on_bad_text: replace reads it with U+FFFD",
        )
    _count(problems.invalid_utf8, shard.file, count)
    return whole


def _not_text(row: dict[str, Any], name: str) -> str | None:
    """What is wrong with a field that must hold text."""
    if name not in row:
        return f"no field {name!r} (has: {', '.join(row) or 'none'})"
    if isinstance(row[name], str):
        return None
    kind = "null" if row[name] is None else type(row[name]).__name__
    return f"field {name!r} is not text but {kind}"


def _cut_text(document: str, data: bytes, digest: int) -> Iterator[dict[str, Any]]:
    """A row's UTF-8 text as pieces of at most 64 KiB, cut at line ends."""
    part = 0
    while data:
        end = _last_end(data[:PIECE_BYTES], 0, final=len(data) <= PIECE_BYTES)
        piece, data = data[:end].decode(), data[end:]
        yield {"document": document, "part": part, "bytes": end, "text": piece, "digest": digest}
        part += 1
