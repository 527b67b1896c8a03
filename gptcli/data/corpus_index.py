"""What a scan found, kept so that an unchanged corpus is not read again.

An entry is named after everything that decides the outcome: the sources' settings and each file's
path, size, inode and times. The files' content hashes are in it, as the scan computed them.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptcli.config.data_schema import DataConfig
from gptcli.data import extras
from gptcli.data.builtin import builtin_file
from gptcli.data.cache_folder import cache_root
from gptcli.data.files import SourceFile
from gptcli.data.scan import Contents, Document, FileScan, SourceFacts
from gptcli.data.shards import Problems, Split
from gptcli.data.store import UNUSED_SECONDS

log = logging.getLogger("gptcli")

_FORMAT = 2  # raised when what is read from the same files changes


def entry(data: DataConfig, files: list[SourceFile], also: list[Any]) -> Path | None:
    """The file that keeps the scan of these files; None where nothing is kept (cache off).

    `also` is whatever else decides the outcome.
    """
    if data.cache == "off":
        return None
    settings = data.model_dump(include={"train", "val", "val_fraction"})
    states = file_states(files)
    if None in states:  # the scan says what is wrong with it
        return None
    filtered = any(source.filters.active for source in [*data.train, *(data.val or [])])
    libraries = extras.versions() if filtered else {}
    key = json.dumps([_FORMAT, settings, states, also, libraries], sort_keys=True)
    return cache_root() / "corpora" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def load(
    path: Path | None, files: list[SourceFile], val_files: list[SourceFile]
) -> Contents | None:
    """What `save` kept; None when there is nothing, or it is damaged."""
    if path is None:
        return None
    try:
        if not path.is_file():
            return None
        os.utime(path)  # when it was last used
        saved = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
        problems = Problems(**saved["problems"])
        return Contents(
            scans=_scans(saved["scans"], files),
            val_scans=_scans(saved["val_scans"], val_files),
            split=Split(**saved["split"]),
            sources=[SourceFacts(**facts) for facts in saved["sources"]],
            problems=problems,
            val_documents=[
                Document(name, text, source=source) for name, text, source in saved["val_documents"]
            ],
            val_rows=[(name, row) for name, row in saved["val_rows"]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning(f"{path}: damaged, reading the corpus again: {error}")
        return None


def save(path: Path | None, contents: Contents) -> None:
    """Keep the contents at `path`, by one rename. A cache that cannot be written is no error."""
    if path is None or not all(isinstance(d.text, str) for d in contents.val_documents):
        return
    if any(document.tokens is not None for document in contents.val_documents):
        return
    value = {
        "scans": [_kept(scan) for scan in contents.scans],
        "val_scans": [_kept(scan) for scan in contents.val_scans],
        "split": asdict(contents.split),
        "sources": [asdict(source) for source in contents.sources],
        "problems": asdict(contents.problems),
        "val_documents": [[d.name, d.text, d.source] for d in contents.val_documents],
        "val_rows": contents.val_rows,
    }
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value), encoding="ascii")
        os.replace(temporary, path)
        _remove_unused(path.parent)
    except (OSError, TypeError, ValueError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        log.info(f"not kept in {path.parent}: {error}")


def _remove_unused(folder: Path) -> None:
    """Remove entries that nobody has used for 60 days, and what killed processes left."""
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime > UNUSED_SECONDS:
                entry.unlink()


def file_states(files: list[SourceFile]) -> list[list[Any] | None]:
    """What of each file changes when its content does; None where it cannot be known."""
    return [_file_state(file) for file in files]


def _file_state(file: SourceFile) -> list[Any] | None:
    if file.identity is not None:
        return [file.path, file.number, file.size, file.identity]
    try:
        stat = os.stat(builtin_file() if file.kind == "builtin" else file.path)
    except OSError:
        return None
    # A change of the content changes ctime, which no program can set back.
    times = [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    return [os.path.abspath(file.path), file.number, stat.st_size, *times]


def _kept(scan: FileScan) -> dict[str, Any]:
    return {
        "size": scan.size,
        "sha256": scan.sha256,
        "borders": scan.borders,
        "documents": scan.documents,
        "text_bytes": scan.text_bytes,
        "digest": scan.digest,
        "least": scan.least,
        "dropped": sorted(scan.dropped),
        "end": scan.end,
    }


def _scans(saved: list[dict[str, Any]], files: list[SourceFile]) -> list[FileScan]:
    scans = []
    for file, values in zip(files, saved, strict=True):
        borders, dropped = values.pop("borders"), values.pop("dropped")
        scans.append(
            FileScan(
                file=file,
                borders=tuple(borders) if borders is not None else None,
                dropped=frozenset(dropped),
                **values,
            )
        )
    return scans
