"""A corpus: what the sources hold, how it is split into training and validation, its identity."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from gptcli import stop
from gptcli.config.schema import DataConfig, SourceConfig
from gptcli.data.builtin import builtin_rows
from gptcli.data.files import SourceFile, open_utf8, resolve
from gptcli.data.readers import (
    BUILTIN_SHARD_ROWS,
    PIECE_BYTES,
    SHARD_BYTES,
    SHARD_PIECES,
    Problems,
    Shard,
    Split,
    content_hash,
    decode,
    file_tail_start,
    read_shards,
    row_bytes,
    whole_characters,
)
from gptcli.errors import DataError

log = logging.getLogger("gptcli")

FEW_DOCUMENTS = 100  # below this, the end of each document is held out instead of whole documents
_WHOLE = Split("none")


@dataclass(frozen=True)
class Document:
    """A whole text with a name for messages."""

    name: str
    text: str


@dataclass
class Corpus:
    """Training shards, held-out documents (or rows with their places), what identifies the data.

    `fingerprint` maps each file to its size and sha256; `documents` counts those of the training
    sources before the split; `train_bytes` is UTF-8 text to train on.
    """

    train: list[Shard]
    val_documents: list[Document]
    val_rows: list[tuple[str, dict[str, Any]]]
    fingerprint: dict[str, dict[str, Any]]
    documents: int
    train_bytes: int
    split: str
    problems: Problems

    def train_texts(self) -> Iterator[str]:
        """The training pieces in file order, for training a tokenizer."""
        return (record["text"] for record in read_shards(self.train))


@dataclass
class _FileScan:
    """One file as found: bytes of UTF-8, sha256, row numbers and hashes of its documents."""

    file: SourceFile
    size: int
    sha256: str
    digests: list[int] = field(default_factory=list)
    text_bytes: int = 0


def open_corpus(data: DataConfig, fields: tuple[str, ...] | None = None) -> Corpus:
    """Scan the sources once: check every file and row, hash them, choose the validation part.

    With `fields` rows stay whole (finetuning), and each must hold text in them. Raises DataError
    for missing, empty or broken data, `stop.Stopped` when a stop is asked for.
    """
    problems = Problems()
    scans = [_scan(file, fields, problems) for file in resolve(data.train)]
    digests = [digest for scan in scans for digest in scan.digests]
    if not digests:
        names = ", ".join(source.path for source in data.train)
        left_out = sum(problems.null_rows.values()) + sum(problems.skipped_rows.values())
        unused = f" ({left_out} rows were left out)" if left_out else ""
        raise DataError(f"the training data is empty: {names}{unused}")
    fingerprint = {scan.file.path: _identity(scan) for scan in scans}
    if data.val is not None:
        split, val_scans = _WHOLE, [_scan(file, fields, problems) for file in resolve(data.val)]
        fingerprint |= {scan.file.path: _identity(scan) for scan in val_scans}
        shared = {s.sha256 for s in scans} & {s.sha256 for s in val_scans}
        for scan in val_scans:
            if scan.sha256 in shared:
                log.warning(f"{scan.file.path} is validation and training data at once")
    elif len(digests) < FEW_DOCUMENTS and fields is None:
        split, val_scans = Split("tail", fraction=data.val_fraction), scans
    else:
        # At least one document is held out even where the fraction would catch none.
        threshold = max(int(data.val_fraction * 2**64), min(digests) + 1)
        split, val_scans = Split("hash", threshold=threshold), scans
    train = [s for scan in scans for s in _shards(scan, split, fields)]
    held_out = replace(split, part="val")
    documents, rows = _collect([s for scan in val_scans for s in _shards(scan, held_out, fields)])
    _warn(problems)
    held = sum(len(d.text.encode("utf-8", "replace")) for d in documents)
    held += sum(row_bytes(row) for _, row in rows)
    total = sum(scan.text_bytes for scan in scans)
    corpus = Corpus(
        train,
        documents,
        rows,
        fingerprint,
        len(digests),
        total if data.val is not None else total - held,
        "given" if data.val is not None else split.kind,
        problems,
    )
    if corpus.train_bytes <= 0 or not train:
        raise DataError("nothing is left to train on after holding out validation data")
    return corpus


def read_documents(sources: list[SourceConfig]) -> list[Document]:
    """All documents of the sources, whole, for evaluation."""
    problems = Problems()
    scans = [_scan(file, None, problems) for file in resolve(sources)]
    documents, _ = _collect([s for scan in scans for s in _shards(scan, _WHOLE, None)])
    _warn(problems)
    if not documents:
        raise DataError(f"no text in {', '.join(source.path for source in sources)}")
    return documents


def _scan(file: SourceFile, fields: tuple[str, ...] | None, problems: Problems) -> _FileScan:
    if fields is not None and file.kind in ("text", "lines"):
        raise DataError(f"{file.path}: finetuning reads rows; use .jsonl")
    if file.kind == "text":
        return _scan_text(file, problems)
    scan = _FileScan(file, *_row_file_identity(file))
    for record in read_shards([Shard(file, 0, scan.size, _WHOLE, fields=fields)], problems):
        scan.text_bytes += record["bytes"]
        if record["part"] == 0:
            scan.digests.append(record["digest"])
    skipped = problems.skipped_rows.get(file.path, 0)
    if skipped > 0.01 * (skipped + len(scan.digests)):
        raise DataError(
            f"{file.path}: {skipped} of {skipped + len(scan.digests)} rows cannot be used,"
            " more than 1 %"
        )
    return scan


def _scan_text(file: SourceFile, problems: Problems) -> _FileScan:
    digest, size, head, rest = hashlib.sha256(), 0, "", b""
    blank = True
    with open_utf8(file) as f:
        f.seek(0)
        while block := f.read(1 << 20):
            stop.raise_if_requested()
            digest.update(block)
            data = rest + block
            whole = whole_characters(data)
            text = decode(data[:whole], file, size - len(rest), problems)
            size, rest = size + len(block), data[whole:]
            head = head or text[:PIECE_BYTES]
            blank = blank and not text.strip()
    decode(rest, file, size - len(rest), problems)
    scan = _FileScan(file, size, digest.hexdigest())
    if not blank:  # a file of blanks only is no document
        scan.digests.append(content_hash(head))
        scan.text_bytes = size
    return scan


def _row_file_identity(file: SourceFile) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    if file.kind == "builtin":
        rows = builtin_rows(file.path.removeprefix("builtin:"))
        return len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    with open_utf8(file) as f:
        f.seek(0)
        while block := f.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _identity(scan: _FileScan) -> dict[str, Any]:
    return {"bytes": scan.size, "sha256": scan.sha256}


def _shards(scan: _FileScan, split: Split, fields: tuple[str, ...] | None) -> list[Shard]:
    """The file's shards for one part of the split."""
    file = scan.file
    if not scan.digests:
        return []
    if file.kind == "text":
        low, high = 0, scan.size
        if split.kind == "tail":
            cut = file_tail_start(file, scan.size, split.fraction)
            low, high = (0, cut) if split.part == "train" else (cut, scan.size)
        elif split.kind == "hash" and not split.has(scan.digests[0]):
            return []
        pieces = -(-(high - low) // PIECE_BYTES)
        step = SHARD_PIECES if file.seekable else max(pieces, 1)
        return [
            Shard(file, k, min(k + step, pieces), split, low, high) for k in range(0, pieces, step)
        ]
    step = BUILTIN_SHARD_ROWS if file.kind == "builtin" else SHARD_BYTES
    whole = file.kind == "lines" and file.source.document == "paragraph"
    if whole or (file.kind != "builtin" and not file.seekable):
        step = max(scan.size, 1)  # a paragraph's start is known from the file's beginning only
    return [
        Shard(file, k, min(k + step, scan.size), split, fields=fields)
        for k in range(0, scan.size, step)
    ]


def _collect(shards: list[Shard]) -> tuple[list[Document], list[tuple[str, dict[str, Any]]]]:
    """Held-out documents, their pieces joined again, and rows with their places."""
    parts: list[tuple[str, list[str]]] = []
    rows = []
    for record in read_shards(shards):  # problems are counted by the scan
        if "row" in record:
            rows.append((record["document"], record["row"]))
        elif record["part"] == 0:
            parts.append((record["document"], [record["text"]]))
        else:
            parts[-1][1].append(record["text"])
    documents = [Document(name, "".join(texts)) for name, texts in parts]
    return [d for d in documents if d.text.strip()], rows


def _warn(problems: Problems) -> None:
    for counts, what in (
        (problems.invalid_utf8, "invalid UTF-8 sequences were read as U+FFFD"),
        (problems.skipped_rows, "rows that cannot be used were left out"),
        (problems.null_rows, "rows whose text is null were left out"),
    ):
        for path, count in counts.items():
            log.warning(f"{path}: {count} {what}")
