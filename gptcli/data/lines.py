"""Lines of a file: JSON rows, and documents that are a line or a paragraph.

A shard holds the lines that start in its bytes. Memory is bounded however long a line is.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from gptcli import stop
from gptcli.data.opening import open_utf8
from gptcli.data.shards import MAX_ROW_BYTES, PIECE_BYTES, Problems, Shard, bad_row, decode

HELD_BYTES = 1024 * 1024  # a longer document is not kept in memory


@dataclass
class LineDocument:
    """A line or a paragraph at bytes [begin, begin + size) of the content; its line end is left
    out. `data` is its text, or only its first `HELD_BYTES` where it is longer than these."""

    begin: int
    size: int = 0
    data: bytes = b""
    _parts: list[bytes] = field(default_factory=list)
    _held: int = 0
    _last: bytes = b""

    @property
    def is_held(self) -> bool:
        """Whether `data` is all of it."""
        return len(self.data) == self.size

    def add(self, chunk: bytes) -> None:
        """Append bytes."""
        if self._held < HELD_BYTES:
            self._parts.append(chunk)
            self._held += len(chunk)
        self._last = chunk if len(chunk) > 1 else self._last[-1:] + chunk
        self.size += len(chunk)

    def close(self) -> "LineDocument":
        """The document without its line end."""
        ends = len(self._last) - len(self._last.rstrip(b"\r\n"))
        self.size -= ends
        self.data = b"".join(self._parts)[: min(self.size, HELD_BYTES)]
        return self


def line_documents(shard: Shard) -> Iterator[LineDocument]:
    """Documents of a shard of kind lines: each line that is not blank, or each run of these."""
    paragraphs = shard.file.source.document == "paragraph"
    document: LineDocument | None = None
    for offset, chunk, starts, ends in _chunks(shard):
        if starts and not paragraphs:
            if document is not None:
                yield document.close()
                document = None
            if ends:  # nearly all lines: no parts to join
                data = chunk.rstrip(b"\r\n")
                if data and not data.isspace():
                    yield LineDocument(offset, len(data), data)
                continue
        if starts and ends and chunk.isspace():
            if document is not None:
                yield document.close()
            document = None
            continue
        if document is None:
            document = LineDocument(offset)
        document.add(chunk)
    if document is not None:
        yield document.close()


def _chunks(shard: Shard) -> Iterator[tuple[int, bytes, bool, bool]]:
    """Lines in chunks of at most 64 KiB: offset, bytes, whether a line starts and ends with it."""
    with open_utf8(shard.file) as f:
        offset = _first_line(f, shard)
        starts = True
        while not (starts and offset >= shard.stop):
            chunk = f.readline(PIECE_BYTES)
            if not chunk:
                return
            ends = chunk.endswith(b"\n") or len(chunk) < PIECE_BYTES
            yield offset, chunk, starts, ends
            offset, starts = offset + len(chunk), ends


def _first_line(f: BinaryIO, shard: Shard) -> int:
    """Go to the first line that starts in the shard; the line around its border belongs to the
    shard where that starts. Returns its offset, `shard.stop` if there is none."""
    if not shard.start:
        f.seek(0)
        return 0
    place = shard.start - 1
    f.seek(place)
    while place < shard.stop:
        stop.raise_if_requested()
        chunk = f.readline(PIECE_BYTES)
        place += len(chunk)
        if chunk.endswith(b"\n"):
            return place
        if not chunk:
            break
    return shard.stop


def json_rows(shard: Shard, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a shard of JSON lines, with the offsets of their lines."""
    with open_utf8(shard.file) as f:
        offset = _first_line(f, shard)
        while offset < shard.stop:
            line = f.readline(MAX_ROW_BYTES + 1)
            size = len(line)
            if not line:
                return
            if size > MAX_ROW_BYTES and not line.endswith(b"\n"):
                del line
                size += skip_line(f)
                bad_row(too_long(size), shard.file, offset, problems)
            elif not line.isspace():
                row = _json_row(line, shard, offset, problems)
                if row is not None:
                    yield offset, row
            offset += size


def skip_line(f: BinaryIO) -> int:
    """Read up to the end of the line in bounded memory; returns the bytes passed."""
    size = 0
    while chunk := f.readline(PIECE_BYTES):
        stop.raise_if_requested()
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


def too_long(size: int) -> str:
    """What is said of a row of `size` bytes."""
    return f"a row of {size} bytes, more than {MAX_ROW_BYTES >> 20} MiB"


def _json_row(line: bytes, shard: Shard, offset: int, problems: Problems) -> dict[str, Any] | None:
    try:
        row = json.loads(decode(line, shard.file, offset, problems).strip())
        if isinstance(row, dict):
            return row
        problem = f"a row must be a JSON object, not {type(row).__name__}"
    except (ValueError, RecursionError) as error:
        problem = f"not a JSON row: {error}"
    bad_row(problem, shard.file, offset, problems)
    return None
