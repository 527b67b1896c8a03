"""Records of shards: pieces of text files and raw files, documents of lines, rows and tables."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO

from gptcli import stop
from gptcli.data.builtin import builtin_rows
from gptcli.data.cleaned import cleaned
from gptcli.data.cleaning import CleaningReport
from gptcli.data.files import SourceFile, text_field_hint
from gptcli.data.lines import LineDocument, json_rows, line_documents
from gptcli.data.opening import open_utf8
from gptcli.data.pretokenised import read_tokens
from gptcli.data.shards import (
    PIECE_BYTES,
    Problems,
    Shard,
    bad_row,
    count,
    decode,
    last_end,
    row_place,
)
from gptcli.data.tables import table_rows
from gptcli.errors import DataError

_HASHED_BYTES = 4 * PIECE_BYTES  # hold the 65536 characters that `content_hash` takes


def read_shards(
    shards: list[Shard],
    problems: Problems | None = None,
    report: CleaningReport | None = None,
) -> Iterator[dict[str, Any]]:
    """Records of the shards in order: {"document": name, "part": piece number, "number": where it
    starts, in the unit of Shard.start, "bytes": UTF-8 size, "source": number of the source}.

    Texts are as the filters of their source leave them, which `report` counts.
    With "text" (str, or bytes for encoding: binary), "row" (a mapping, for shards with `fields`) or
    "tokens". Lines and rows come with the "digest" by which they are split. DataError for what
    cannot be read, `stop.Stopped` when a stop is asked for.
    """
    problems = problems if problems is not None else Problems()
    for shard in shards:
        records = _records(shard, problems)
        filtered = shard.file.source.filters.active
        yield from cleaned(records, shard, report) if filtered else records


def _records(shard: Shard, problems: Problems) -> Iterator[dict[str, Any]]:
    if shard.file.kind == "text":
        return _pieces(shard, problems)
    if shard.file.kind == "binary":
        return _raw_pieces(shard)
    if shard.file.kind == "tokens":
        return read_tokens(shard)
    if shard.file.kind == "lines":
        return _line_records(shard, problems)
    if shard.file.kind == "canary":
        return _text_records(shard, shard.start, shard.text)
    return _row_records(shard, _rows(shard, problems), problems)


def _rows(shard: Shard, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    if shard.file.kind == "rows":
        return json_rows(shard, problems)
    if shard.file.kind == "table":
        return table_rows(shard, problems)
    rows = builtin_rows(shard.file.path.removeprefix("builtin:"))
    return enumerate(rows[shard.start : shard.stop], shard.start)


def content_hash(content: str | dict[str, Any]) -> int:
    """64-bit hash of a document (its first 65536 characters) or row, the same on every machine."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str)
    data = text[:PIECE_BYTES].encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def row_bytes(row: dict[str, Any]) -> int:
    """Size of a row by which progress through an epoch is measured."""
    return len(json.dumps(row, default=str))  # tables hold dates and other values JSON has not


def tail_start(data: bytes, fraction: float) -> int:
    """Where the last `fraction` of UTF-8 text `data` begins: after a line end or space nearby,
    never later than the exact place, and never so early that the part becomes twice as long."""
    place = int(len(data) * (1.0 - fraction))
    return _cut(data, place, len(data) - place)


def file_tail_start(file: SourceFile, size: int, fraction: float) -> int:
    """`tail_start` of a file of `size` bytes, reading only around the place."""
    with open_utf8(file) as f:
        return _tail_start(f, 0, size, fraction)


def _tail_start(f: BinaryIO, begin: int, size: int, fraction: float) -> int:
    place = int(size * (1.0 - fraction))
    low = max(0, place - 4096)
    f.seek(begin + low)
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
    with open_utf8(shard.file) as f:
        begin = _piece_end(f, shard, shard.start - 1) if shard.start else shard.low
        f.seek(begin)
        data = b""  # from `begin` on; what is behind a piece's end stays for the next one
        for number in range(shard.start, shard.stop):
            stop.raise_if_requested()
            grid = min(shard.low + (number + 1) * PIECE_BYTES, shard.high)
            data += f.read(grid - begin - len(data))
            end = last_end(data, max(0, grid - PIECE_BYTES - begin), grid == shard.high)
            if end and number not in shard.dropped:
                text = decode(data[:end], shard.file, begin, problems)
                yield _piece(shard, number, end, text)
            begin, data = begin + end, data[end:]


def _piece_end(f: BinaryIO, shard: Shard, number: int) -> int:
    grid = min(shard.low + (number + 1) * PIECE_BYTES, shard.high)
    low = max(shard.low, grid - PIECE_BYTES)
    f.seek(low)
    return low + last_end(f.read(grid - low), 0, grid == shard.high)


def _raw_pieces(shard: Shard) -> Iterator[dict[str, Any]]:
    """Bytes as they are: piece k is the k-th 64 KiB."""
    with open_utf8(shard.file) as f:
        f.seek(shard.low + shard.start * PIECE_BYTES)
        for number in range(shard.start, shard.stop):
            stop.raise_if_requested()
            data = f.read(min(PIECE_BYTES, shard.high - shard.low - number * PIECE_BYTES))
            if data and number not in shard.dropped:
                yield _piece(shard, number, len(data), data)


def _piece(shard: Shard, number: int, size: int, text: str | bytes) -> dict[str, Any]:
    place = {"document": shard.file.path, "part": number, "number": number, "bytes": size}
    return {**place, "source": shard.file.number, "text": text}


def _line_records(shard: Shard, problems: Problems) -> Iterator[dict[str, Any]]:
    """Records of lines or paragraphs. Long ones are read again by a second file behind the first,
    because where the held-out tail begins is known at their end only."""
    with ExitStack() as stack:
        behind: BinaryIO | None = None
        for document in line_documents(shard):
            stop.raise_if_requested()
            if document.begin in shard.dropped:
                continue
            if document.is_held:
                text = decode(document.data, shard.file, document.begin, problems)
                yield from _text_records(shard, document.begin, text)
            else:
                behind = behind or stack.enter_context(open_utf8(shard.file))
                yield from _long_records(shard, document, behind, problems)


def _long_records(
    shard: Shard, document: LineDocument, f: BinaryIO, problems: Problems
) -> Iterator[dict[str, Any]]:
    digest = content_hash(document.data[:_HASHED_BYTES].decode("utf-8", "replace"))
    split, low, high = shard.split, 0, document.size
    if split.kind == "hash" and not split.has(digest):
        return
    if split.kind == "tail":
        cut = _tail_start(f, document.begin, document.size, split.fraction)
        low, high = (0, cut) if split.part == "train" else (cut, high)
    place = document.begin + low
    f.seek(place)
    for part, piece in enumerate(_cut_pieces(f.read, high - low)):
        stop.raise_if_requested()
        text = decode(piece, shard.file, place, problems)
        yield _row_record(shard, document.begin, part, text, len(piece), digest)
        place += len(piece)


def _row_records(
    shard: Shard, rows: Iterator[tuple[int, dict[str, Any]]], problems: Problems
) -> Iterator[dict[str, Any]]:
    """Records of numbered rows, as far as they are in the shard's part of the split."""
    for number, row in rows:
        stop.raise_if_requested()
        if number in shard.dropped:
            continue
        if shard.fields is not None:
            yield from _whole_row(shard, number, row, problems)
            continue
        text = _row_text(shard, number, row, problems)
        if text is not None:
            text = _without_surrogates(text, shard, number, problems)
            if _is_blank(text):
                count(problems.blank_rows, shard.file)
            yield from _text_records(shard, number, text)


def _whole_row(
    shard: Shard, number: int, row: dict[str, Any], problems: Problems
) -> Iterator[dict[str, Any]]:
    problem = shard.fields.problem(row) if shard.fields is not None else None
    if problem is not None:
        hint = "finetune.fields names the task's fields; on_bad_row: skip leaves such rows out"
        bad_row(problem, shard.file, number, problems, hint)
        return
    digest = content_hash(row)
    if shard.split.kind == "none" or shard.split.has(digest):
        yield {
            "document": _row_name(shard, number),
            "part": 0,
            "number": number,
            "bytes": row_bytes(row),
            "source": shard.file.number,
            "digest": digest,
            "row": row,
        }


def _text_records(shard: Shard, number: int, text: str) -> Iterator[dict[str, Any]]:
    """Pieces of the document that starts at `number`, as far as it is in the shard's part."""
    split = shard.split
    if _is_blank(text):
        return
    digest = content_hash(text)
    if split.kind == "hash" and not split.has(digest):
        return
    data = text.encode()
    if split.kind == "tail":
        cut = tail_start(data, split.fraction)
        data = data[:cut] if split.part == "train" else data[cut:]
    elif len(data) <= PIECE_BYTES:
        yield _row_record(shard, number, 0, text, len(data), digest)
        return
    for part, piece in enumerate(_cut_pieces(io.BytesIO(data).read, len(data))):
        yield _row_record(shard, number, part, piece.decode(), len(piece), digest)


def _is_blank(text: str) -> bool:
    """Whether a text is no document: it is empty, or there are only blanks in it."""
    return not text or text.isspace()


def _row_record(
    shard: Shard, number: int, part: int, text: str, size: int, digest: int
) -> dict[str, Any]:
    return {
        "document": _row_name(shard, number),
        "part": part,
        "number": number,
        "bytes": size,
        "source": shard.file.number,
        "digest": digest,
        "text": text,
    }


def _row_name(shard: Shard, number: int) -> str:
    return f"{shard.file.path}, row {'at byte ' if shard.file.by_bytes else ''}{number}"


def _cut_pieces(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    """`size` bytes of UTF-8 text as pieces of at most 64 KiB, cut at line ends."""
    data = b""
    while size or data:
        more = read(min(PIECE_BYTES - len(data), size))
        size = size - len(more) if more else 0
        data += more
        end = last_end(data, 0, final=not size)
        if end:
            yield data[:end]
        data = data[end:]


def _row_text(shard: Shard, number: int, row: dict[str, Any], problems: Problems) -> str | None:
    """The row's text; None for null (counted) and for a bad row that may be skipped."""
    name = shard.file.source.text_field
    value: Any = row
    # A name with dots is a path into the row, unless a field is called just that.
    steps = [name] if name in row else name.split(".")
    problem = None
    for i, step in enumerate(steps):
        if not isinstance(value, dict) or step not in value:
            problem = _no_field(value, name, steps[:i]) if isinstance(value, dict) else None
            problem = problem or _not_a_mapping(value, ".".join(steps[:i]))
            break
        value = value[step]
        if value is None:
            count(problems.null_rows, shard.file)
            return None
    problem = problem or _not_text(value, name, row)
    if problem is None:
        return str(value)
    bad_row(problem, shard.file, number, problems, text_field_hint(shard.file))
    return None


def _no_field(row: dict[str, Any], name: str, path: list[str] | None = None) -> str:
    fields = ", ".join(".".join([*(path or []), str(field)]) for field in row)
    return f"no field {name!r} (has: {fields or 'none'})"


def _not_a_mapping(value: Any, name: str) -> str:
    return f"field {name!r} has no fields: it is {type(value).__name__}"


def _not_text(value: Any, name: str, row: dict[str, Any]) -> str | None:
    """What is wrong with the value of the row's field that must hold text."""
    if isinstance(value, str):
        return None
    kind = "null" if value is None else type(value).__name__
    return f"field {name!r} is not text but {kind} (has: {', '.join(map(str, row))})"


def _without_surrogates(text: str, shard: Shard, number: int, problems: Problems) -> str:
    r"""Lone surrogates, which JSON can spell (`\ud83d`) and UTF-8 cannot, as U+FFFD, counted."""
    try:
        text.encode()  # much faster than a search, and nearly always enough
        return text
    except UnicodeEncodeError:
        whole, found = re.subn(r"[\ud800-\udfff]", "\ufffd", text)
    if shard.file.source.on_bad_text == "error":
        raise DataError(
            f"{row_place(shard.file, number)}: the text has a lone surrogate",
            hint="on_bad_text: replace reads it with U+FFFD",
        )
    count(problems.invalid_utf8, shard.file, found)
    return whole
