"""What is read at once: a range of a file, its part of the split, and what was wrong in it."""

from dataclasses import dataclass, field
from typing import Literal

from gptcli.data.files import SourceFile
from gptcli.data.opening import byte_order_mark, open_utf8
from gptcli.data.row_fields import RowFields
from gptcli.errors import DataError

PIECE_BYTES = 64 * 1024
SHARD_PIECES = 16  # 1 MiB
SHARD_BYTES = PIECE_BYTES * SHARD_PIECES
MAX_ROW_BYTES = 64 * 1024 * 1024  # a longer row of JSON or CSV is a bad row


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
    """A range of one file: pieces [start, stop) of the bytes (or tokens) [low, high) for kinds
    text, binary and tokens; bytes [start, stop) for lines, rows and .csv; row numbers for .parquet,
    .arrow and builtins.

    With `fields`, rows stay whole (finetuning) and have these. Rows and lines whose numbers are in
    `dropped` are left out; `judged` says that filters have chosen these already. `eot` tells
    where documents begin (kind tokens); `text` is the one document of kind canary.
    """

    file: SourceFile
    start: int
    stop: int
    split: Split
    low: int = 0
    high: int = 0
    fields: RowFields | None = None
    dropped: frozenset[int] = frozenset()
    eot: int | None = None
    judged: bool = True
    text: str = ""


@dataclass
class Problems:
    """What was repaired or left out while reading, by file: invalid UTF-8 sequences (and lone
    surrogates) read as U+FFFD, rows that could not be used, rows whose text is null or blank."""

    invalid_utf8: dict[str, int] = field(default_factory=dict)
    skipped_rows: dict[str, int] = field(default_factory=dict)
    null_rows: dict[str, int] = field(default_factory=dict)
    blank_rows: dict[str, int] = field(default_factory=dict)


def count(counts: dict[str, int], file: SourceFile, more: int = 1) -> None:
    """Add to the file's number in one of the `Problems`."""
    counts[file.path] = counts.get(file.path, 0) + more


def bad_row(
    problem: str, file: SourceFile, number: int, problems: Problems, hint: str | None = None
) -> None:
    """Count a row that cannot be used where the source allows that, else raise DataError."""
    if file.source.on_bad_row == "skip":
        count(problems.skipped_rows, file)
        return
    raise DataError(
        f"{row_place(file, number)}: {problem}",
        hint=hint or "on_bad_row: skip leaves such rows out",
    )


def row_place(file: SourceFile, number: int) -> str:
    """`path:line` of the row that starts at byte `number`, or `path row N` of a counted one."""
    if not file.by_bytes:
        return f"{file.path} row {number}"
    line = 1
    with open_utf8(file) as f:
        f.seek(0)
        while number > 0 and (block := f.read(min(number, SHARD_BYTES))):
            line, number = line + block.count(b"\n"), number - len(block)
    return f"{file.path}:{line}"


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
        count(problems.invalid_utf8, file, bad)
        return text


def whole_characters(data: bytes) -> int:
    """Length of UTF-8 `data` without a character that is cut short at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # where a character begins
            width = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if width > back else len(data)
    return len(data)


def last_end(data: bytes, after: int, final: bool) -> int:
    """Length of the piece in `data`, which reaches to the grid line: up to the last line end at
    or behind `after`, else up to the last whole character."""
    if final:
        return len(data)
    newline = data.rfind(b"\n", after)
    return newline + 1 if newline >= 0 else whole_characters(data)
