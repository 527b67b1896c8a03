"""Which files a source names, and how they are opened: always as UTF-8 bytes, plain or gzipped."""

import codecs
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from gptcli.config.schema import SourceConfig
from gptcli.data.builtin import BUILTIN_ROWS, stdlib_files
from gptcli.errors import ConfigError, DataError

Kind = Literal["text", "lines", "rows", "builtin"]  # lines: text of many documents
_SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".text": "text",
    ".py": "text",
    ".jsonl": "rows",
    ".ndjson": "rows",
}
_READABLE = ", ".join(_SUFFIXES) + " (plain or .gz)"
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SourceFile:
    """One file of a source (or a builtin corpus, whose path is its name)."""

    source: SourceConfig
    path: str
    kind: Kind

    @property
    def is_utf8(self) -> bool:
        """Whether its bytes are read as they are."""
        return codecs.lookup(self.source.encoding).name in ("utf-8", "utf-8-sig")

    @property
    def seekable(self) -> bool:
        """Whether reading may start in the middle: a plain UTF-8 file."""
        return not self.path.endswith(".gz") and self.is_utf8


def resolve(sources: list[SourceConfig]) -> list[SourceFile]:
    """The files of all sources, each source's in sorted order.

    DataError when a pattern matches nothing or files are missing (all are listed).
    """
    files: list[SourceFile] = []
    missing: list[str] = []
    for source in sources:
        _check_options(source)
        if source.path.startswith("builtin:"):
            files += _builtin(source)
        else:
            files += _local(source, missing)
    if missing:
        raise DataError("\n".join(missing))
    return files


def _check_options(source: SourceConfig) -> None:
    if source.document != "file" and source.path.startswith("builtin:"):
        raise ConfigError(f"{source.path}: document is for text files; leave it out")
    try:
        codecs.lookup(source.encoding)
    except LookupError:
        raise DataError(f"{source.path}: no encoding is called {source.encoding!r}") from None


def _builtin(source: SourceConfig) -> list[SourceFile]:
    name = source.path.removeprefix("builtin:")
    if name == "python":
        return [SourceFile(source, str(path), "text") for path in stdlib_files()]
    if name in BUILTIN_ROWS:
        return [SourceFile(source, source.path, "builtin")]
    known = ", ".join((*BUILTIN_ROWS, "python"))
    raise DataError(f"no builtin corpus {name!r}; there are: {known}")


def _local(source: SourceConfig, missing: list[str]) -> list[SourceFile]:
    text = source.path
    path = Path(os.path.expanduser(text))
    if text.startswith("hub:"):
        raise DataError(f"{text}: hub corpora are not read by this version; name local files")
    exists = os.path.exists(path)  # os.path: a name too long for the file system is just missing
    if os.path.isdir(path):
        names = sorted(str(p) for p in path.rglob("*") if p.is_file() and _kind(str(p)))
        if not names:
            missing.append(f"{text}: no file in this directory is one of {_READABLE}")
    elif glob.has_magic(text) and not exists:
        names = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not names:
            missing.append(f"{text}: the pattern matches no files")
    else:
        names = [str(path)]
        if not os.path.isfile(path):
            missing.append(f"{text}: {'not a regular file' if exists else 'no such file'}")
    files = []
    for name in names if not missing else []:
        kind = _kind(name)
        if kind is None:
            raise DataError(f"{name}: not a kind of file that is read here; use {_READABLE}")
        if source.document != "file":
            if kind != "text":
                raise ConfigError(f"{name}: document is for text files; leave it out")
            kind = "lines"
        files.append(SourceFile(source, name, kind))
    return files


def _kind(name: str) -> Kind | None:
    return _SUFFIXES.get(Path(name.removesuffix(".gz")).suffix.lower())


@contextmanager
def open_utf8(file: SourceFile) -> Iterator[BinaryIO]:
    """The file's content as UTF-8 bytes, a byte-order mark left out.

    DataError when it is unreadable, a damaged archive, or in another encoding than it says.
    """
    try:
        with _open_raw(file) as raw:
            if not file.is_utf8:
                yield io.BytesIO(_as_utf8(raw.read(), file))
                return
            head = raw.read(len(_UTF8_BOM))
            if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(
                    f"{file.path}: UTF-16 text, not {file.source.encoding}",
                    hint="write the source as {path: ..., encoding: utf-16}",
                )
            raw.seek(0)
            yield cast(BinaryIO, _Without(raw, len(_UTF8_BOM))) if head == _UTF8_BOM else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.path}: damaged or truncated archive: {error}") from error
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror or error}") from error


def byte_order_mark(file: SourceFile) -> int:
    """Bytes of the mark that `open_utf8` leaves out."""
    with _open_raw(file) as raw:
        return len(_UTF8_BOM) if raw.read(len(_UTF8_BOM)) == _UTF8_BOM else 0


def _open_raw(file: SourceFile) -> BinaryIO:
    opener = gzip.open if file.path.endswith(".gz") else open
    return cast(BinaryIO, opener(file.path, "rb"))


def _as_utf8(data: bytes, file: SourceFile) -> bytes:
    try:
        return data.decode(file.source.encoding).removeprefix("\ufeff").encode()
    except (UnicodeError, LookupError) as error:  # LookupError: a codec that makes no text
        raise DataError(f"{file.path}: not {file.source.encoding} text: {error}") from error


class _Without:
    """A binary file whose first `skip` bytes are left out."""

    def __init__(self, raw: BinaryIO, skip: int) -> None:
        self._raw, self._skip = raw, skip
        raw.seek(skip)

    def seek(self, offset: int) -> int:
        return self._raw.seek(offset + self._skip) - self._skip

    def read(self, size: int = -1) -> bytes:
        return self._raw.read(size)

    def readline(self) -> bytes:
        return self._raw.readline()
