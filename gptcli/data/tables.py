"""Rows of tables: .csv and .tsv by the bytes where they start, .parquet and .arrow by number."""

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gptcli import stop
from gptcli.data.files import SourceFile, damaged_hint, text_field_hint
from gptcli.data.lines import skip_line, too_long
from gptcli.data.opening import open_stored, open_utf8
from gptcli.data.shards import (
    MAX_ROW_BYTES,
    SHARD_BYTES,
    Problems,
    Shard,
    bad_row,
    count,
    decode,
    row_place,
)
from gptcli.errors import DataError

_BATCH_BYTES = 8 * 1024 * 1024
_BATCH_ROWS = 256
_READ_BYTES = 1024 * 1024  # of a parquet column at once; without it, a whole row group's column


def table_rows(shard: Shard, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a shard of a table, numbered by where they start (bytes of .csv and .tsv, else rows).

    Rows of .csv that cannot be used are errors or counted; a damaged .parquet or .arrow, or one
    whose text field is missing or holds no text, is a DataError.
    """
    if shard.file.by_bytes:
        return _csv_rows(shard, problems)
    return _typed_rows(shard, problems)


def csv_borders(file: SourceFile) -> tuple[int, ...]:
    """Bytes where shards of a .csv or .tsv may begin: at 0, and at rows about 1 MiB apart."""
    borders = [0]
    with open_utf8(file) as f:
        lines = _CsvLines(f, lambda line, _: line.decode("latin-1"))  # the same rows, but faster
        for begin, _ in _parsed(lines, file):
            if begin - borders[-1] >= SHARD_BYTES:
                stop.raise_if_requested()
                borders.append(begin)
    return tuple(borders)


def row_count_and_borders(file: SourceFile) -> tuple[int, tuple[int, ...]]:
    """Number of rows of a .parquet or .arrow, and where shards may begin: at row groups or batches,
    each at least 1 MiB behind the one before."""
    sizes: Iterator[tuple[int, int]]
    with _table_errors(file):
        if file.format == ".parquet":
            with _parquet(file) as table:
                groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
                sizes = ((group.num_rows, group.total_byte_size) for group in groups)
                return _borders(sizes)
        sizes = ((batch.num_rows, batch.nbytes) for batch in _arrow_batches(file))
        return _borders(sizes)


def _borders(sizes: Iterator[tuple[int, int]]) -> tuple[int, tuple[int, ...]]:
    rows, bytes_behind, borders = 0, 0, [0]
    for more, size in sizes:
        if bytes_behind >= SHARD_BYTES:
            borders.append(rows)
            bytes_behind = 0
        rows, bytes_behind = rows + more, bytes_behind + size
    return rows, tuple(borders)


class _BadLine(Exception):  # noqa: N818  becomes a bad row
    """A line that csv must not see."""


class _CsvLines:
    """Decoded lines for `csv.reader`; `offset` is behind the last of them, so behind each row."""

    def __init__(self, f: BinaryIO, text_of: Any) -> None:
        self._f, self._text_of = f, text_of
        self.offset = self.row_start = 0

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        line = self._f.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        begin = self.offset
        self.offset += len(line)
        if self.offset - self.row_start > MAX_ROW_BYTES:
            if not line.endswith(b"\n"):
                self.offset += skip_line(self._f)
            raise _BadLine(too_long(self.offset - self.row_start))
        if b"\0" in line:
            raise _BadLine("a NUL byte in a row of text")
        text: str = self._text_of(line, begin)
        return text

    def seek(self, offset: int) -> None:
        """Go on at this byte."""
        self._f.seek(offset)
        self.offset = offset


def _parsed(lines: _CsvLines, file: SourceFile) -> Iterator[tuple[int, list[str] | str]]:
    """Rows with their offsets: the fields, or what is wrong. Blank lines are left out."""
    csv.field_size_limit(MAX_ROW_BYTES)  # its own limit is 128 KiB
    # strict: text behind a closing quote, and a quote that is never closed, are errors.
    reader = csv.reader(lines, delimiter="\t" if file.format == ".tsv" else ",", strict=True)
    while True:
        begin = lines.row_start = lines.offset
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield begin, f"not a row of CSV: {error}"
        except _BadLine as error:
            yield begin, str(error)
        else:
            if len(fields) > 1 or (fields and fields[0].strip()):
                yield begin, fields


def _csv_rows(shard: Shard, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    file = shard.file
    with open_utf8(file) as f:
        f.seek(0)
        lines = _CsvLines(f, lambda line, offset: decode(line, file, offset, problems))
        rows = _parsed(lines, file)
        names = _header(next(rows, None), file)
        if names is None:
            return
        if shard.start > 0:
            lines.seek(shard.start)
        for begin, fields in rows:
            if begin >= shard.stop:
                return
            problem = fields if isinstance(fields, str) else _ragged(fields, names)
            if problem is None:
                yield begin, dict(zip(names, fields, strict=True))
            else:
                bad_row(problem, file, begin, problems)


def _header(row: tuple[int, list[str] | str] | None, file: SourceFile) -> list[str] | None:
    if row is None:
        return None
    place, names = row
    if isinstance(names, str):
        raise DataError(f"{row_place(file, place)}: the header line: {names}")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise DataError(f"{row_place(file, place)}: two columns are called {twice[0]!r}")
    return names


def _ragged(fields: list[str], names: list[str]) -> str | None:
    if len(fields) == len(names):
        return None
    return f"{len(fields)} fields, but the header has {len(names)} ({', '.join(names)})"


def _typed_rows(shard: Shard, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    with _table_errors(shard.file):
        for first, batch in _batches(shard):
            stop.raise_if_requested()
            names = batch.schema.names
            columns = [
                _values(column, name, first, shard, problems)
                for name, column in zip(names, batch.columns, strict=True)
            ]
            for i, values in enumerate(zip(*columns, strict=True)):
                yield first + i, dict(zip(names, values, strict=True))


def _batches(shard: Shard) -> Iterator[tuple[int, Any]]:
    """Batches of at most 256 rows of the shard, with the number of their first row."""
    first = 0
    batches = _parquet_batches(shard) if shard.file.format == ".parquet" else _arrow_columns(shard)
    for rows, batch in batches:
        if batch is not None:
            begin, end = max(shard.start - first, 0), min(shard.stop - first, rows)
            for low in range(begin, end, _BATCH_ROWS):
                yield first + low, batch.slice(low, min(_BATCH_ROWS, end - low))
        first += rows
        if first >= shard.stop:
            return


def _parquet_batches(shard: Shard) -> Iterator[tuple[int, Any]]:
    """Row counts with batches; None for row groups before the shard, which are not read."""
    with _parquet(shard.file) as table:
        columns, first = _needed(table.schema_arrow, shard), 0
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            first += group.num_rows
            if first <= shard.start:
                yield group.num_rows, None
                continue
            row_bytes = group.total_byte_size // max(group.num_rows, 1) + 1
            size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))
            for batch in table.iter_batches(size, [number], columns, use_threads=False):
                yield batch.num_rows, batch


def _arrow_columns(shard: Shard) -> Iterator[tuple[int, Any]]:
    columns: list[str] | None = None
    for i, batch in enumerate(_arrow_batches(shard.file)):
        if i == 0:
            needed = _needed(batch.schema, shard)
            columns = None if needed is None else [name.split(".")[0] for name in needed]
            if needed is not None and needed[0] in batch.schema.names:
                columns = needed
        yield batch.num_rows, batch if columns is None else batch.select(columns)


@contextmanager
def _parquet(file: SourceFile) -> Iterator[pq.ParquetFile]:
    # Local files are opened by Arrow itself, whose reads do not hold Python's lock.
    options = {"buffer_size": _READ_BYTES, "page_checksum_verification": True}
    if file.is_remote:
        with open_stored(file) as f, pq.ParquetFile(pa.PythonFile(f, "r"), **options) as table:
            yield table
    else:
        with pq.ParquetFile(file.path, **options) as table:
            yield table


def _arrow_batches(file: SourceFile) -> Iterator[pa.RecordBatch]:
    """All batches of an Arrow file or stream; those of local files are memory maps."""
    if file.is_remote:
        with open_stored(file) as f:
            yield from _ipc_batches(pa.PythonFile(f, "r"))
    elif not os.path.getsize(file.path):
        raise EOFError("it has 0 bytes")
    else:
        with pa.memory_map(file.path) as f:
            yield from _ipc_batches(f)


def _ipc_batches(f: Any) -> Iterator[pa.RecordBatch]:
    magic = f.read(6)
    f.seek(0)
    if magic == b"ARROW1":
        reader = pa.ipc.open_file(f)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
    else:
        yield from pa.ipc.open_stream(f)


@contextmanager
def _table_errors(file: SourceFile) -> Iterator[None]:
    """Damage that pyarrow reports, by errors of many types, as DataErrors that name the file."""
    try:
        yield
    except (pa.ArrowException, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{file.path}: cannot be read: {error.strerror}") from error
        what = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"{file.path}: damaged or truncated {file.format}: {what}"
        raise DataError(message, hint=damaged_hint(file)) from error


def _needed(schema: pa.Schema, shard: Shard) -> list[str] | None:
    """Columns that must be read: the text's; all (None) for rows that stay whole."""
    if shard.fields is not None:
        return None
    name = shard.file.source.text_field
    path, hint = shard.file.path, text_field_hint(shard.file)
    steps = [name] if name in schema.names else name.split(".")
    fields, kind = {field.name: field.type for field in schema}, None
    for i, step in enumerate(steps):
        if step not in fields:
            have = ", ".join(".".join([*steps[:i], field]) for field in fields) or "none"
            raise DataError(f"{path}: no field {name!r} (has: {have})", hint=hint)
        kind = fields[step]
        fields = {f.name: f.type for f in kind} if pa.types.is_struct(kind) else {}
    if not (_is_text(kind) or pa.types.is_null(kind)):
        have = ", ".join(schema.names)
        raise DataError(f"{path}: field {name!r} is not text but {kind} (has: {have})", hint=hint)
    return [name]


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    t = pa.types
    return t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)


def _values(column: Any, name: str, first: int, shard: Shard, problems: Problems) -> list[Any]:
    """The column as Python values; invalid UTF-8 in text is repaired and counted."""
    try:
        column.validate(full=True)  # a damaged file must not be read out of bounds
        values: list[Any] = column.to_pylist()
        return values
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error) or not _is_text(column.type):
            raise
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    raw = column.cast(pa.large_binary()).to_pylist()
    return [
        data if data is None else _repaired(data, name, first + i, shard, problems)
        for i, data in enumerate(raw)
    ]


def _repaired(data: bytes, name: str, number: int, shard: Shard, problems: Problems) -> str:
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    if bad and shard.file.source.on_bad_text == "error":
        raise DataError(
            f"{row_place(shard.file, number)}: invalid UTF-8 in field {name!r}",
            hint="on_bad_text: replace reads it with U+FFFD",
        )
    if bad:
        count(problems.invalid_utf8, shard.file, bad)
    return text
