"""The one place that opens data: local or remote files, archives, and text of other encodings."""

import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import pyarrow as pa

from gptcli.data.files import SourceFile, damaged_hint
from gptcli.data.hub import open_remote
from gptcli.errors import DataError

_UTF8_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 256 * 1024
# UTF-32 first: the mark of its little-endian form begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEAD_BYTES = 1024  # of a file, by which other encodings are recognised


@contextmanager
def open_utf8(
    file: SourceFile, replaced: Callable[[int], None] | None = None
) -> Iterator[BinaryIO]:
    """The file's content as UTF-8 bytes, a byte-order mark left out; kind binary: as it is.

    Memory is bounded whatever the file's size. In archives and other encodings, seeking back
    starts again from the beginning. While text of another encoding is transcoded, `replaced` is
    told how many invalid sequences became U+FFFD. DataError when the file is unreadable, a damaged
    archive, or in another encoding than it says.
    """
    with data_errors(file), _open_content(file) as content:
        if file.kind == "binary":
            yield content
            return
        if not file.is_utf8:
            yield _forward(lambda: _transcoded(file, content, replaced))
            return
        head = content.read(HEAD_BYTES)
        refuse_utf16(file.path, head, file.source.encoding)
        content.seek(0)
        yield _without(content, len(_UTF8_BOM)) if head.startswith(_UTF8_BOM) else content


def refuse_utf16(name: str, head: bytes, said: str = "utf-8") -> None:
    """Raise a DataError if the file `name`, which begins with `head` and is `said` to be UTF-8, is
    UTF-16 or UTF-32: by its byte-order mark, or by zero bytes between the letters."""
    marked = (encoding for mark, encoding in _MARKS.items() if head.startswith(mark))
    encoding = next(marked, None) or _unmarked(head)
    if encoding is not None:
        raise DataError(
            f"{name}: {encoding[:6].upper()} text, not {said}",
            hint="write the source with its encoding in the YAML (data.train, eval.data):"
            f" {{path: {json.dumps(name)}, encoding: {encoding}}}",
        )


def _unmarked(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: zeros in most of the high bytes, hardly any in the low."""
    for encoding, width, low, high in (
        ("utf-32-le", 4, 0, 2),
        ("utf-32-be", 4, 3, 1),
        ("utf-16-le", 2, 0, 1),
        ("utf-16-be", 2, 1, 0),
    ):
        units = len(head) // width
        zeros = [head[place::width].count(0) for place in (low, high)]
        if units >= 2 and zeros[0] <= units // 20 and zeros[1] > units // 2:
            return encoding
    return None


def byte_order_mark(file: SourceFile) -> int:
    """Bytes of the mark that `open_utf8` leaves out of UTF-8 text."""
    with data_errors(file), _open_content(file) as content:
        return len(_UTF8_BOM) if content.read(len(_UTF8_BOM)) == _UTF8_BOM else 0


@contextmanager
def open_stored(file: SourceFile) -> Iterator[BinaryIO]:
    """The file's bytes as they are stored, compressed or not. DataError when unreadable."""
    with data_errors(file), _stored(file) as stored:
        yield stored


@contextmanager
def data_errors(file: SourceFile) -> Iterator[None]:
    """Failures to read the file as DataErrors that name it."""
    try:
        yield
    except GeneratorExit:  # a reader left open when Python ends: the names below may be gone
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        message = f"{file.path}: damaged or truncated archive: {error}"
        raise DataError(message, hint=damaged_hint(file)) from error
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror or error}") from error


def _stored(file: SourceFile) -> BinaryIO:
    if file.is_remote:
        return open_remote(file.path, file.size, file.identity)
    return open(file.path, "rb")


@contextmanager
def _open_content(file: SourceFile) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed."""
    with _stored(file) as stored:
        if not file.compression:
            yield stored
            return
        if not stored.read(1):  # gzip takes it for an archive of nothing
            raise EOFError("it has 0 bytes")
        stored.seek(0)
        if file.compression == ".gz":
            with gzip.GzipFile(fileobj=stored) as content:
                yield cast(BinaryIO, content)
        elif file.compression == ".xz":
            with lzma.LZMAFile(stored) as content:
                yield cast(BinaryIO, content)
        else:
            yield _forward(lambda: _unpacked_zstd(file))


def _unpacked_zstd(file: SourceFile) -> Iterator[bytes]:
    # A stream of its own each time: pyarrow closes what it reads from.
    with _stored(file) as stored:
        stream = pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd")
        while True:
            try:
                block = stream.read(_BLOCK_BYTES)
            except OSError as error:
                raise EOFError(error) if error.errno is None else error from error
            if not block:
                return
            yield block


def _transcoded(
    file: SourceFile, content: BinaryIO, replaced: Callable[[int], None] | None
) -> Iterator[bytes]:
    """UTF-8 blocks of text in another encoding, its byte-order mark left out."""
    strict = file.source.on_bad_text == "error"
    decoder_type = codecs.getincrementaldecoder(file.source.encoding)
    decoder: Any = decoder_type("strict" if strict else "replace")
    content.seek(0)
    place, at_start, final = 0, True, False
    while not final:
        block = content.read(_BLOCK_BYTES)
        final = not block
        state = decoder.getstate()
        try:
            text = decoder.decode(block, final)
        except UnicodeError as error:
            raise _not_text(file, error, place + len(block)) from error
        place += len(block)
        bad = 0
        if "\ufffd" in text and replaced is not None:
            # What `ignore` leaves out is what `replace` replaced; the text may hold U+FFFD itself.
            other: Any = decoder_type("ignore")
            other.setstate(state)
            bad = len(text) - len(other.decode(block, final))
        if at_start and text:
            text, at_start = text.removeprefix("\ufeff"), False
        data, surrogates = _encoded(text)
        if surrogates and strict:
            raise _not_text(file, "lone surrogates", place)
        if bad + surrogates and replaced is not None:
            replaced(bad + surrogates)
        if data:
            yield data


def _encoded(text: str) -> tuple[bytes, int]:
    """UTF-8, and how many lone surrogates, which UTF-8 cannot spell, became U+FFFD."""
    try:
        return text.encode(), 0
    except UnicodeEncodeError:
        whole, count = re.subn(r"[\ud800-\udfff]", "\ufffd", text)
        return whole.encode(), count


def _not_text(file: SourceFile, error: UnicodeError | str, end: int) -> DataError:
    """`end` is how many bytes were read before the error was met."""
    where = ""
    if isinstance(error, UnicodeDecodeError):
        where = f" at byte {end - len(error.object) + error.start}"
        error = error.reason
    return DataError(
        f"{file.path}: not {file.source.encoding} text{where}: {error}",
        hint="on_bad_text: replace reads it with U+FFFD",
    )


def _forward(start: Callable[[], Iterator[bytes]]) -> BinaryIO:
    return io.BufferedReader(_Forward(start), _BLOCK_BYTES)


def _without(content: BinaryIO, skip: int) -> BinaryIO:
    return io.BufferedReader(_Without(content, skip), _BLOCK_BYTES)


class _Forward(io.RawIOBase):
    """Blocks of bytes as a file. Seeking forward reads on, seeking back starts again."""

    def __init__(self, start: Callable[[], Iterator[bytes]]) -> None:
        self._start = start
        self._blocks, self._rest, self._place = start(), memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = self._ready(len(buffer))
        buffer[:size] = self._rest[:size]
        self._pass(size)
        return size

    def seek(self, offset: int, whence: int = 0) -> int:
        target = offset + (self._place if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end is not known")
        if target < self._place:
            self._blocks, self._rest, self._place = self._start(), memoryview(b""), 0
        while size := self._ready(target - self._place):
            self._pass(size)
        return self._place

    def _ready(self, most: int) -> int:
        """How many bytes, at most `most`, are there now; 0 at the end."""
        while most and not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        return min(most, len(self._rest))

    def _pass(self, size: int) -> None:
        self._rest = self._rest[size:]
        self._place += size


class _Without(io.RawIOBase):
    """A binary file whose first `skip` bytes are left out."""

    def __init__(self, raw: BinaryIO, skip: int) -> None:
        self._raw, self._skip = raw, skip
        raw.seek(skip)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._raw.tell() - self._skip

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset + (0 if whence else self._skip), whence) - self._skip
