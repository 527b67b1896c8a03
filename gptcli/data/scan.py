"""One pass over the files of a corpus: what they hold, what of it is left out, their identity."""

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptcli import stop
from gptcli.config.data_schema import SourceConfig
from gptcli.data.cleaned import JUDGED_CHARACTERS
from gptcli.data.cleaning import Cleaner, CleaningReport
from gptcli.data.duplicates import Duplicates
from gptcli.data.files import SourceFile
from gptcli.data.layout import layout
from gptcli.data.pretokenised import PIECE_TOKENS, token_bytes
from gptcli.data.readers import content_hash, read_shards
from gptcli.data.row_fields import RowFields
from gptcli.data.shards import PIECE_BYTES, Problems, Shard, Split
from gptcli.errors import ConfigError, DataError

log = logging.getLogger("gptcli")

WHOLE = Split("none")
_FAR = 2**64


@dataclass
class FileScan:
    """One file as found. `documents` is None for a file that is streamed without counting.

    `digest` is that of its first document, `least` the least of all; `dropped` has the numbers of
    documents that the filters leave out; `end` is where a source's `limit` was reached.
    """

    file: SourceFile
    size: int
    sha256: str
    borders: tuple[int, ...] | None
    documents: int | None = 0
    text_bytes: int = 0
    digest: int = 0
    least: int = _FAR
    dropped: frozenset[int] = frozenset()
    end: int = _FAR

    @property
    def pieces(self) -> int | None:
        """Number of pieces of a file that is read by pieces; None for rows."""
        if self.file.kind in ("text", "binary"):
            return -(-self.size // PIECE_BYTES)
        return -(-self.size // PIECE_TOKENS) if self.file.kind == "tokens" else None

    def whole(self, fields: RowFields | None, eot: int | None) -> Shard:
        """The file as one shard."""
        stop_at = self.size if self.pieces is None else self.pieces
        return Shard(self.file, 0, stop_at, WHOLE, high=self.size, fields=fields, eot=eot)


@dataclass(frozen=True)
class Document:
    """A whole text with a name for messages; raw bytes (encoding binary) or token ids instead of
    text where the source holds these. `source` is the path of the source, as configured."""

    name: str
    text: str | bytes
    tokens: np.ndarray[Any, Any] | None = None
    source: str = ""


@dataclass
class SourceFacts:
    """What one training source holds after filters.

    `documents` is None where it is streamed without counting; `train_bytes` is what is left to
    train on (an estimate then); `cleaning` is what the filters did.
    """

    path: str
    documents: int | None
    bytes: int
    train_bytes: int
    cleaning: dict[str, Any]


@dataclass
class Contents:
    """The outcome of reading a corpus once."""

    scans: list[FileScan]
    val_scans: list[FileScan]
    split: Split
    sources: list[SourceFacts]
    problems: Problems
    val_documents: list[Document]
    val_rows: list[tuple[str, dict[str, Any]]]


@dataclass
class _Document:
    """The document that is being read: its first record and as much text as is judged."""

    number: int
    digest: int
    text: str = ""
    characters: int = 0
    bytes: int = 0
    blank: bool = True
    rest: Any = field(default_factory=hashlib.blake2b)  # of what is not in `text`


class SourceScan:
    """Scans the files of one source in order: filters, duplicates and `limit` are the source's."""

    def __init__(self, source: SourceConfig, fields: RowFields | None) -> None:
        if source.filters.active and fields is not None:
            raise ConfigError(f"{source.path}: filters are for text, not for finetuning rows")
        filters = source.filters
        self.report = CleaningReport()
        self._source, self._fields = source, fields
        self._cleaner = Cleaner(filters) if filters.active else None
        unique = filters.exact_duplicates or filters.near_duplicates is not None
        self._duplicates = (
            Duplicates(filters.exact_duplicates, filters.near_duplicates) if unique else None
        )
        self._left = source.limit if source.limit is not None else _FAR

    @property
    def streams(self) -> bool:
        """Whether a remote file is read as it comes: not counted, its duplicates not known."""
        return self._source.limit is None

    def scan(self, file: SourceFile, problems: Problems, eot: int | None) -> FileScan:
        """Read the file once. Raises DataError for what is broken, `stop.Stopped`."""
        if self._fields is not None and file.kind not in ("rows", "table", "builtin"):
            raise DataError(f"{file.path}: finetuning reads rows; use .jsonl, .csv or .parquet")
        found = layout(file, problems)
        scan = FileScan(file, found.size, found.sha256, found.borders)
        if file.size is not None and self.streams:
            if self._duplicates is not None:
                raise ConfigError(
                    f"{self._source.path}: duplicates are found in a corpus that is read in full;"
                    " give it a limit, or use local files"
                )
            scan.documents, scan.text_bytes = None, file.size
            scan.digest = content_hash(f"{file.path} {file.identity}")  # a text file's, unread
            return scan
        if file.kind == "tokens":
            self._count_tokens(scan)
        else:
            self._read(scan, problems, eot)
        return scan

    def _count_tokens(self, scan: FileScan) -> None:
        if self._source.filters.active:
            raise ConfigError(f"{scan.file.path}: filters are for text, not for tokens")
        if scan.size and self._left:
            scan.documents, scan.text_bytes = 1, token_bytes(scan.file)
            scan.digest = scan.least = int(scan.sha256[:16], 16)
            self._left -= 1

    def _read(self, scan: FileScan, problems: Problems, eot: int | None) -> None:
        one = scan.pieces is not None  # the file is one document
        dropped: set[int] = set()
        document: _Document | None = None
        for record in self._records(scan, problems, eot):
            stop.raise_if_requested()
            if document is None or (record["part"] == 0 and not one):
                if document is not None:
                    self._finish(scan, document, dropped)
                document = None
                if not self._left:
                    scan.end = record["number"]
                    break
                document = _Document(record["number"], _digest(record))
            document.bytes += record["bytes"]
            text = record.get("text")
            document.blank = document.blank and isinstance(text, str) and text.isspace()
            if self._cleaner is not None and text is not None:
                document.characters += len(text)
                if len(document.text) < JUDGED_CHARACTERS:
                    document.text += text
                elif self._duplicates is not None:  # so that only equal endings are duplicates
                    document.rest.update(text.encode("utf-8", "surrogatepass"))
        if document is not None:
            self._finish(scan, document, dropped)
        scan.dropped = frozenset(dropped)
        scan.text_bytes = scan.text_bytes if scan.documents else 0

    def _records(
        self, scan: FileScan, problems: Problems, eot: int | None
    ) -> Iterator[dict[str, Any]]:
        """The file's records; says how far it is when that takes long."""
        said, begun, size = time.monotonic(), 0, 0
        shard = scan.whole(self._fields, eot)
        for record in read_shards([shard], problems, self.report):
            size += record["bytes"]
            if time.monotonic() - said > 5:
                said, begun = time.monotonic(), begun + 1
                log.info(f"reading {scan.file.path}: {size / 1e6:,.0f} MB so far")
            yield record

    def _finish(self, scan: FileScan, document: _Document, dropped: set[int]) -> None:
        """Count a document that has been read whole, unless a filter leaves it out."""
        if document.blank:  # blanks only are no document
            return
        if self._is_left_out(document):
            dropped.add(document.number)
            return
        assert scan.documents is not None
        scan.documents += 1
        scan.text_bytes += document.bytes
        scan.digest = document.digest if scan.documents == 1 else scan.digest
        scan.least = min(scan.least, document.digest)
        self._left -= 1

    def _is_left_out(self, document: _Document) -> bool:
        if self._cleaner is None:
            return False
        reason = self._cleaner.judge(document.text, document.characters)
        if reason is None and self._duplicates is not None:
            long = document.characters > len(document.text)
            rest = document.rest.hexdigest() if long else ""
            reason = self._duplicates.seen(document.text + rest)
        if reason is not None:
            self.report.left_out(reason, document.text)
        return reason is not None


def _digest(record: dict[str, Any]) -> int:
    """The hash by which a document is split; a text file's is that of its first piece."""
    if "digest" in record:
        return int(record["digest"])
    first = record["text"]
    return content_hash(first if isinstance(first, str) else first.decode("latin-1"))
