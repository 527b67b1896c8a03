"""Which files a source names: local ones, those of a hub corpus, and the builtin corpora."""

import codecs
import glob
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gptcli.config.data_schema import SourceConfig
from gptcli.data.builtin import BUILTIN_ROWS, stdlib_files
from gptcli.data.hub import hub_files
from gptcli.errors import ConfigError, DataError

Kind = Literal["text", "lines", "rows", "table", "tokens", "binary", "builtin", "canary"]
_SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".text": "text",
    ".py": "text",
    ".jsonl": "rows",
    ".json": "rows",
    ".ndjson": "rows",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "table",
    ".arrow": "table",
    ".npy": "tokens",
    ".bin": "tokens",
}
_COMPRESSIONS = (".gz", ".zst", ".xz")
_NEVER_COMPRESSED = (".parquet", ".arrow", ".npy", ".bin")  # they must be read from the middle
_READABLE = ", ".join(_SUFFIXES) + " (all but the last four also with .gz, .zst or .xz)"
_DEFAULTS = SourceConfig(path="")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source (or a builtin corpus, whose path is its name).

    `kind` says how it is read: text (one document), lines (text of many documents), rows (JSON
    lines), table (.csv .tsv .parquet .arrow), tokens, binary, builtin, canary (no file at all: its
    text is in the shard). `number` is the place of its source in the list. Remote files (path
    hf://...) have their `size` in bytes and an `identity`, which changes with the content.
    """

    source: SourceConfig
    path: str
    kind: Kind
    number: int = 0
    size: int | None = None
    identity: str | None = None

    @property
    def compression(self) -> str:
        """`.gz`, `.zst`, `.xz`, or nothing."""
        ending = Path(self.path).suffix.lower()
        return ending if ending in _COMPRESSIONS and self.kind != "binary" else ""

    @cached_property  # asked for each record
    def format(self) -> str:
        """The ending that says what is inside, such as `.csv` of `a.csv.gz`."""
        return _format(self.path)

    @property
    def is_remote(self) -> bool:
        """Whether it is read over the network."""
        return self.path.startswith("hf://")

    @property
    def is_utf8(self) -> bool:
        """Whether its bytes are UTF-8 text, or no text at all, and are read as they are."""
        return self.kind == "binary" or _is_utf8(self.source.encoding)

    @property
    def seekable(self) -> bool:
        """Whether reading may start in the middle: neither compressed nor transcoded."""
        return not self.compression and self.is_utf8

    @cached_property
    def by_bytes(self) -> bool:
        """Whether its rows are numbered by the byte where they start, not counted."""
        delimited = self.kind == "table" and self.format in (".csv", ".tsv")
        return delimited or self.kind in ("lines", "rows")


def is_text_name(name: str) -> bool:
    """Whether a file of that name holds text of its own or rows of text. A .json may be a config:
    it does not count."""
    kinds = ("text", "rows", "table")
    return _known_kind(name) in kinds and _format(name) != ".json"


def resolve(sources: list[SourceConfig], known: dict[str, Any] | None = None) -> list[SourceFile]:
    """The files of all sources, each source's in sorted order.

    `known` is the fingerprint of a run that is resumed; a hub corpus is then read at its commit.
    DataError when a pattern matches nothing or files are missing (all are listed); ConfigError for
    options that do not fit the files (all are listed).
    """
    files: list[SourceFile] = []
    missing: list[str] = []
    problems: list[str] = []
    for number, source in enumerate(sources):
        _check_encoding(source)
        found = _files(source, number, missing, known)
        problems += _misfits(source, found)
        files += found
    if missing:
        raise DataError("\n".join(missing), hint=_look_hint(missing[0]))
    if problems:
        raise ConfigError(problems)
    return files


def _check_encoding(source: SourceConfig) -> None:
    if source.encoding == "binary":
        return
    try:
        "a".encode(source.encoding)  # unlike lookup, refuses codecs that make no text
    except (LookupError, UnicodeError):
        raise DataError(f"{source.path}: no encoding is called {source.encoding!r}") from None


def _files(
    source: SourceConfig, number: int, missing: list[str], known: dict[str, Any] | None
) -> list[SourceFile]:
    if source.path.startswith("builtin:"):
        return _builtin(source, number)
    if source.path.startswith("hub:"):
        return [
            SourceFile(source, f.path, _kind(f.path, source), number, f.size, f.identity)
            for f in hub_files(source, known)
        ]
    before = len(missing)
    names = _local_names(source, missing)
    if len(missing) > before:
        return []
    return [SourceFile(source, name, _kind(name, source), number) for name in names]


def _builtin(source: SourceConfig, number: int) -> list[SourceFile]:
    name = source.path.removeprefix("builtin:")
    if name == "python":
        paths = [str(path) for path in stdlib_files()]
        return [SourceFile(source, path, _kind(path, source), number) for path in paths]
    if name in BUILTIN_ROWS:
        return [SourceFile(source, source.path, "builtin", number)]
    known = ", ".join((*BUILTIN_ROWS, "python"))
    raise DataError(f"no builtin corpus {name!r}; there are: {known}")


def damaged_hint(file: SourceFile, more: str = "") -> str:
    """What to do about a file that broke off: `more`, and a command that shows how much there is
    of one of this machine."""
    lines = [more] if more else []
    if not file.is_remote:
        lines.append(f"how much of it is there: ls -l {shlex.quote(file.path)}")
    return "\n".join([*lines, "download or copy it again, or leave it out of data.train"])


def text_field_hint(file: SourceFile) -> str:
    """What to do where rows have their text in another field."""
    return f"name the text's field: add --set data.train[{file.number}].text_field=FIELD"


def _look_hint(problem: str) -> str | None:
    """A command that shows what is there instead; None for what is not of this machine."""
    path = Path(os.path.expanduser(problem.partition(": ")[0]))
    if "://" in problem or problem.startswith("hub:"):
        return None
    places = [path.absolute(), *path.absolute().parents]
    folder = next(p for p in places if os.path.isdir(p) and not glob.has_magic(str(p)))
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    return f"what is there: ls {shlex.quote(shown)}"


def _local_names(source: SourceConfig, missing: list[str]) -> list[str]:
    text = source.path
    path = Path(os.path.expanduser(text))
    exists = os.path.exists(path)  # os.path: a name too long for the file system is just missing
    if os.path.isdir(path):
        names = _in_directory(path, source)
        if not names:
            missing.append(f"{text}: no file in this directory is one of {_READABLE}")
    elif glob.has_magic(text) and not exists:
        names = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not names:
            missing.append(f"{text}: the pattern matches no files")
    else:
        names = [str(path)]
        if not os.path.isfile(path):
            missing.append(f"{text}: {'not a regular file' if exists else 'no such file'}")
            return []
    missing += [f"{n}: no permission to read it" for n in names if not os.access(n, os.R_OK)]
    return names


def _in_directory(path: Path, source: SourceConfig) -> list[str]:
    # os.path.isfile: what may not be looked at is no file, not an error.
    names = sorted(str(p) for p in path.rglob("*") if os.path.isfile(p))
    if source.encoding == "binary":
        return names
    names = [name for name in names if _known_kind(name)]
    tokens = [name for name in names if _known_kind(name) == "tokens"]
    if tokens and len(tokens) < len(names):
        # Such folders hold a text and its own tokens, or a program beside its data.
        raise DataError(
            f"{source.path}: holds files of tokens ({Path(tokens[0]).name}) and others",
            hint="name those that are meant, for example by a pattern: folder/*.bin",
        )
    return names


def _format(name: str) -> str:
    path = Path(name)
    if path.suffix.lower() in _COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix.lower()


def _known_kind(name: str) -> Kind | None:
    ending = _format(name)
    if ending in _NEVER_COMPRESSED and not name.lower().endswith(ending):
        return None
    return _SUFFIXES.get(ending)


def _kind(name: str, source: SourceConfig) -> Kind:
    if source.encoding == "binary":
        return "binary"
    kind = _known_kind(name)
    if kind is None:
        raise DataError(
            f"{name}: not a kind of file that is read here; use {_READABLE}",
            hint="encoding: binary reads any file as bytes",
        )
    return "lines" if kind == "text" and source.document != "file" else kind


def _is_utf8(encoding: str) -> bool:
    return encoding != "binary" and codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def _misfits(source: SourceConfig, files: list[SourceFile]) -> list[str]:
    """Options that would be ignored: what they are for, and the first file that has no use."""
    if not files:
        return []
    problems = []
    if source.split is not None and not source.path.startswith("hub:"):
        problems.append(f"{source.path}: split is for hub corpora; leave it out")
    if source.document != "file":
        builtin = source.path.startswith("builtin:")
        others = files if builtin else [f for f in files if f.kind != "lines"]
        problems += _misfit(others, "document is for text files")
    if not any(f.kind in ("rows", "table", "builtin") for f in files):
        for name in ("text_field", "on_bad_row"):
            if getattr(source, name) != getattr(_DEFAULTS, name):
                problems += _misfit(files, f"{name} is for rows and tables (.jsonl, .csv, ...)")
    if source.encoding == "binary" or not _is_utf8(source.encoding):
        own = (".parquet", ".arrow")  # formats that say how their text is encoded
        fixed = ("builtin", "tokens")
        others = [f for f in files if f.kind in fixed or (f.kind == "table" and f.format in own)]
        problems += _misfit(others, "encoding is for files of text")
    raw = [f for f in files if f.kind in ("tokens", "binary")]
    if source.on_bad_text != _DEFAULTS.on_bad_text and len(raw) == len(files):
        problems += _misfit(raw, "on_bad_text is for text")
    if source.filters.active:
        problems += _misfit(raw, "filters are for text, not for tokens or raw bytes")
    return problems


def _misfit(files: Iterable[SourceFile], problem: str) -> list[str]:
    return [f"{file.path}: {problem}; leave it out" for file in list(files)[:1]]
