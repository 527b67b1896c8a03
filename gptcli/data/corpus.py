"""A corpus: what the sources hold, how it is split into training and validation, its identity."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gptcli.config.data_schema import CanariesConfig, DataConfig, SourceConfig
from gptcli.data import corpus_index, extras
from gptcli.data.canaries import Canary, canary_hash, canary_shards, make_canaries
from gptcli.data.cleaning import CleaningReport
from gptcli.data.files import SourceFile, resolve
from gptcli.data.pretokenised import PIECE_TOKENS
from gptcli.data.readers import file_tail_start, read_shards
from gptcli.data.row_fields import RowFields
from gptcli.data.scan import WHOLE, Contents, Document, FileScan, SourceFacts, SourceScan
from gptcli.data.shards import (
    PIECE_BYTES,
    SHARD_BYTES,
    SHARD_PIECES,
    Problems,
    Shard,
    Split,
)
from gptcli.errors import ConfigError, DataError

log = logging.getLogger("gptcli")

FEW_DOCUMENTS = 100  # below this, the end of each document is held out instead of whole documents
BUILTIN_SHARD_ROWS = 256
VAL_TOKENS = 1_000_000  # held out of an endless stream where nothing else is said
MOST_HELD_BYTES = 64 * 1024 * 1024  # of a large corpus, unless eval.max_tokens says otherwise
_MOST_WARNINGS = 3  # of a kind, by file
_BYTES_PER_TOKEN = 4  # of English with common vocabularies
_MOST_BYTES_PER_TOKEN = 64  # no tokenizer of ordinary text makes fewer tokens


@dataclass
class Corpus:
    """Training shards, held-out documents (or rows with their places), what identifies the data.

    `fingerprint` maps each file to its size and sha256. `weights` are those of the sources, or
    None where all are read as one. `key` identifies the records in their file order.
    """

    train: list[Shard]
    val_documents: list[Document]
    val_rows: list[tuple[str, dict[str, Any]]]
    fingerprint: dict[str, dict[str, Any]]
    split: str
    problems: Problems
    sources: list[SourceFacts]
    weights: list[float] | None
    key: str
    files: list[SourceFile]
    states: list[list[Any] | None]
    remote: bool = False
    canaries: list[Canary] = field(default_factory=list)  # planted in `train`

    @property
    def documents(self) -> int | None:
        """Documents of the training sources before the split; None if not all are counted."""
        counts = [source.documents for source in self.sources]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of text to train on (an estimate for an endless stream)."""
        return sum(source.train_bytes for source in self.sources)

    def check_unchanged(self) -> None:
        """DataError when a file is no longer what the fingerprint says."""
        for file, before, now in zip(
            self.files, self.states, corpus_index.file_states(self.files), strict=True
        ):
            if now != before:
                raise DataError(f"{file.path} was changed while it was read", hint="start again")

    def train_records(self) -> Iterator[dict[str, Any]]:
        """The training records in file order."""
        return read_shards(self.train)


def open_corpus(
    data: DataConfig,
    fields: RowFields | None = None,
    *,
    eot: int | None = None,
    known: dict[str, Any] | None = None,
    val_tokens: int | None = None,
) -> Corpus:
    """What `data` names: every file and row checked and hashed, the validation part chosen.

    With `fields` rows stay whole (finetuning), and each must have these. `eot` tells where
    documents begin in tokenised files; `known` is the fingerprint of the run that goes on, whose
    revision of a hub corpus is used again; `val_tokens` bounds what an endless stream holds out.
    A corpus that has not changed since it was last opened is not read again (`data.cache`).
    Raises DataError for missing, empty or broken data, `stop.Stopped` when a stop is asked for.
    """
    if data.canaries is not None and fields is not None:
        raise ConfigError("data.canaries are planted in text, not among rows of a task")
    files = resolve(data.train, known)
    val_files = resolve(data.val, known) if data.val is not None else []
    states = corpus_index.file_states(files + val_files)
    kinds = fields.kinds if fields is not None else None
    entry = corpus_index.entry(data, files + val_files, [kinds, eot, val_tokens])
    contents = corpus_index.load(entry, files, val_files)
    if contents is None:
        contents = _read(data, files, val_files, fields, eot, val_tokens)
        if corpus_index.file_states(files + val_files) == states:
            corpus_index.save(entry, contents)
    _warn(contents.problems)
    _warn_of_shared_files(contents.scans, contents.val_scans)
    split, scans = contents.split, contents.scans
    train = [s for scan in scans for s in _shards(scan, split, fields, eot)]
    if not train or sum(source.train_bytes for source in contents.sources) <= 0:
        raise DataError("nothing is left to train on after holding out validation data")
    weights = [source.weight for source in data.train if source.weight is not None]
    fingerprint = {
        scan.file.path: {"bytes": scan.size, "sha256": scan.sha256}
        for scan in scans + contents.val_scans
    }
    corpus = Corpus(
        train=train,
        val_documents=contents.val_documents,
        val_rows=contents.val_rows,
        fingerprint=fingerprint,
        split="given" if data.val is not None else split.kind,
        problems=contents.problems,
        sources=contents.sources,
        weights=weights or None,
        key=_key(data, scans, split),
        files=files + val_files,
        states=states,
        remote=any(scan.documents is None for scan in scans),
    )
    if data.canaries is not None:
        _plant(corpus, data.canaries)
    corpus.check_unchanged()
    return corpus


def read_documents(sources: list[SourceConfig], max_tokens: int | None = None) -> list[Document]:
    """All documents of the sources, whole, for evaluation; about as many as hold `max_tokens`."""
    problems = Problems()
    scans, _ = _scan(sources, resolve(sources), None, None, problems)
    shards = [s for scan in scans for s in _shards(scan, WHOLE, None, None)]
    endless = any(scan.documents is None for scan in scans)
    limit = (max_tokens or VAL_TOKENS) * _BYTES_PER_TOKEN if endless else None
    if max_tokens is not None and not endless:
        limit = max_tokens * _MOST_BYTES_PER_TOKEN
    documents = _collect(shards, sources, limit)[0]
    _warn(problems)
    if not documents:
        raise DataError(f"no text in {', '.join(source.path for source in sources)}")
    return documents


def read_rows(sources: list[SourceConfig], fields: RowFields) -> list[tuple[str, dict[str, Any]]]:
    """All rows of the sources with their places, for evaluation. Each must have the `fields`."""
    problems = Problems()
    scans, _ = _scan(sources, resolve(sources), fields, None, problems)
    if any(scan.documents is None for scan in scans):
        raise DataError("an endless stream cannot be scored whole; name a file of rows")
    shards = [s for scan in scans for s in _shards(scan, WHOLE, fields, None)]
    rows = _collect(shards, sources, None)[1]
    _warn(problems)
    if not rows:
        raise DataError(f"no rows in {', '.join(source.path for source in sources)}")
    return rows


def _plant(corpus: Corpus, config: CanariesConfig) -> None:
    """Put canaries behind the training shards, and into what identifies the data."""
    corpus.canaries = make_canaries(config)
    shards, digest = canary_shards(corpus.canaries), canary_hash(corpus.canaries)
    size = sum(len(shard.text.encode()) for shard in shards)
    corpus.train += shards
    corpus.sources[0].train_bytes += size
    corpus.fingerprint["canaries"] = {"bytes": size, "sha256": digest}
    corpus.key = hashlib.sha256(f"{corpus.key} {digest}".encode()).hexdigest()


def _read(
    data: DataConfig,
    files: list[SourceFile],
    val_files: list[SourceFile],
    fields: RowFields | None,
    eot: int | None,
    val_tokens: int | None,
) -> Contents:
    """Read the corpus once, choose the validation part and collect it."""
    problems = Problems()
    scans, reports = _scan(data.train, files, fields, eot, problems)
    endless = any(scan.documents is None for scan in scans)
    counted = sum(scan.documents or 0 for scan in scans)
    if not counted and not endless:
        raise DataError(_emptiness(data, problems, reports))
    val_scans: list[FileScan] = []
    if data.val is not None:
        val_scans, _ = _scan(data.val, val_files, fields, eot, problems)
        if not any(scan.documents is None or scan.documents for scan in val_scans):
            names = ", ".join(source.path for source in data.val)
            hint = "to hold out training data instead: --set data.val=null"
            raise DataError(f"the validation data has 0 documents: {names}", hint)
        split = WHOLE
    elif counted < FEW_DOCUMENTS and fields is None and not endless:
        split = Split("tail", fraction=data.val_fraction)
    else:
        # At least one document is held out even where the fraction would catch none.
        least = 0 if endless else min(scan.least for scan in scans) + 1
        split = Split("hash", threshold=max(int(data.val_fraction * 2**64), least))
    held_out = replace(split, part="val")
    held = [s for scan in val_scans or scans for s in _shards(scan, held_out, fields, eot)]
    most = _most_held_bytes(data, val_scans or scans, val_tokens)
    held_from = data.val if data.val is not None else data.train
    documents, rows, sizes, all_read = _collect(held, held_from, most)
    facts = []
    for number, source in enumerate(data.train):
        own = [scan for scan in scans if scan.file.number == number]
        counts = [scan.documents for scan in own]
        total = sum(scan.text_bytes for scan in own)
        exact = all_read and None not in counts
        held_bytes = sizes.get(number, 0) if exact else int(total * data.val_fraction)
        facts.append(
            SourceFacts(
                path=source.path,
                documents=None if None in counts else sum(c for c in counts if c is not None),
                bytes=total,
                train_bytes=total - (held_bytes if data.val is None else 0),
                cleaning=_cleaning(source, reports[number]),
            )
        )
    return Contents(scans, val_scans, split, facts, problems, documents, rows)


def _cleaning(source: SourceConfig, report: CleaningReport) -> dict[str, Any]:
    """What each filter of the source did, those that found nothing too."""
    active = source.filters.model_dump(exclude_defaults=True)
    return {name: {"documents": 0} for name in active} | report.to_json()


def _scan(
    sources: list[SourceConfig],
    files: list[SourceFile],
    fields: RowFields | None,
    eot: int | None,
    problems: Problems,
) -> tuple[list[FileScan], list[CleaningReport]]:
    """Scans of all files, and by source what its filters did."""
    scanners = [SourceScan(source, fields) for source in sources]
    scans = []
    for file in files:
        scan = scanners[file.number].scan(file, problems, eot)
        skipped, count = problems.skipped_rows.get(file.path, 0), scan.documents or 0
        if skipped > 0.01 * (skipped + count):
            raise DataError(
                f"{file.path}: {skipped} of {skipped + count} rows cannot be used, more than 1 %"
            )
        scans.append(scan)
    return scans, [scanner.report for scanner in scanners]


def _shards(scan: FileScan, split: Split, fields: RowFields | None, eot: int | None) -> list[Shard]:
    """The file's shards for one part of the split."""
    file = scan.file
    if not scan.documents and scan.documents is not None:
        return []
    judged = scan.documents is not None
    if scan.pieces is not None:  # the file is one document, read by pieces
        low, high = 0, scan.size
        if split.kind == "tail":
            if file.kind == "tokens":
                cut = int(scan.size * (1.0 - split.fraction))
            else:
                cut = file_tail_start(file, scan.size, split.fraction)
            low, high = (0, cut) if split.part == "train" else (cut, scan.size)
        elif split.kind == "hash" and not split.has(scan.digest):
            return []
        pieces = -(-(high - low) // (PIECE_TOKENS if file.kind == "tokens" else PIECE_BYTES))
        # A file that is still to be judged is read from its beginning.
        whole = not file.seekable or (not judged and file.source.filters.active)
        step = max(pieces, 1) if whole else SHARD_PIECES
        return [
            Shard(file, k, min(k + step, pieces), split, low, high, eot=eot, judged=judged)
            for k in range(0, pieces, step)
        ]
    size = min(scan.size, scan.end)
    return [
        Shard(file, low, high, split, fields=fields, dropped=scan.dropped, judged=judged)
        for low, high in _ranges(scan, size)
    ]


def _ranges(scan: FileScan, size: int) -> list[tuple[int, int]]:
    """Where the shards of a file of rows begin and end: about a MiB, or as its layout allows."""
    if scan.file.kind == "builtin":
        starts = list(range(0, size, BUILTIN_SHARD_ROWS))
    elif scan.borders is None:
        starts = list(range(0, size, SHARD_BYTES if scan.file.seekable else max(size, 1)))
    else:
        starts = [border for border in scan.borders if border < size]
    return list(zip(starts, [*starts[1:], size], strict=True))


def _most_held_bytes(data: DataConfig, scans: list[FileScan], val_tokens: int | None) -> int | None:
    """How much validation text is collected at most; None: all of it."""
    if any(scan.documents is None for scan in scans):
        return (val_tokens or VAL_TOKENS) * _BYTES_PER_TOKEN
    if val_tokens is not None:
        return val_tokens * _MOST_BYTES_PER_TOKEN
    held = sum(scan.text_bytes for scan in scans) * data.val_fraction
    if data.val is None and held > MOST_HELD_BYTES:
        log.info(
            f"about {held / 1e6:,.0f} MB are held out; the first {MOST_HELD_BYTES / 1e6:,.0f} MB"
            " of them are scored (eval.max_tokens chooses)"
        )
        return MOST_HELD_BYTES
    return None


def _collect(
    shards: list[Shard], sources: list[SourceConfig], max_bytes: int | None
) -> tuple[list[Document], list[tuple[str, dict[str, Any]]], dict[int, int], bool]:
    """Held-out documents, their pieces joined again, rows with their places, bytes by source, and
    whether that is all: reading ends with the piece that reaches `max_bytes`."""
    parts: list[tuple[str, list[Any], str, str]] = []
    rows: list[tuple[str, dict[str, Any]]] = []
    sizes: dict[int, int] = {}
    left, previous, all_read = max_bytes, None, True
    for record in read_shards(shards):  # problems are counted by the scan
        sizes[record["source"]] = sizes.get(record["source"], 0) + record["bytes"]
        name = record["document"]
        if left is not None and left <= 0:
            all_read = False
            break
        if "row" in record:
            rows.append((name, record["row"]))
        else:
            kind = "tokens" if "tokens" in record else "text"
            if record["part"] == 0 or name != previous:
                parts.append((name, [record[kind]], kind, sources[record["source"]].path))
            else:
                parts[-1][1].append(record[kind])
        previous = name
        if left is not None:
            left -= record["bytes"]
    documents = [_document(*part) for part in parts]
    whole = [d for d in documents if d.tokens is not None or d.text.strip()]
    return whole, rows, sizes, all_read


def _document(name: str, pieces: list[Any], kind: str, source: str) -> Document:
    if kind == "tokens":
        return Document(name, "", np.concatenate(pieces), source)
    return Document(name, pieces[0][:0].join(pieces), source=source)


def _key(data: DataConfig, scans: list[FileScan], split: Split) -> str:
    """Identifies the training records: equal keys mean equal records in equal order."""
    fingerprint = [[scan.file.path, scan.size, scan.sha256] for scan in scans]
    sources = [source.model_dump(exclude={"weight"}) for source in data.train]
    libraries = extras.versions() if any(s.filters.active for s in data.train) else {}
    text = json.dumps([sources, fingerprint, vars(split), libraries], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _emptiness(data: DataConfig, problems: Problems, reports: list[CleaningReport]) -> str:
    names = ", ".join(source.path for source in data.train)
    left = (problems.null_rows, problems.blank_rows, problems.skipped_rows)
    left_out = sum(sum(counts.values()) for counts in left)
    unused = f" ({left_out} rows were left out)" if left_out else ""
    filtered = sum(c.documents for report in reports for c in report.filters.values())
    if filtered:
        return f"0 documents are left after filtering {filtered} of {names}{unused}"
    return f"the training data is empty: {names}{unused}"


def _warn_of_shared_files(scans: list[FileScan], val_scans: list[FileScan]) -> None:
    shared = {s.sha256 for s in scans} & {s.sha256 for s in val_scans}
    for scan in val_scans:
        if scan.sha256 in shared:
            log.warning(f"{scan.file.path} is validation and training data at once")


def _warn(problems: Problems) -> None:
    for counts, what in (
        (problems.invalid_utf8, "invalid UTF-8 sequences were read as U+FFFD"),
        (problems.skipped_rows, "rows that cannot be used were left out"),
        (problems.null_rows, "rows whose text is null were left out"),
        (problems.blank_rows, "rows whose text is blank were left out"),
    ):
        for path, count in list(counts.items())[:_MOST_WARNINGS]:
            log.warning(f"{path}: {count} {what}")
        if more := list(counts.values())[_MOST_WARNINGS:]:
            log.warning(f"{len(more)} more files: {sum(more)} {what}")
