"""Word vectors of word2vec and GloVe text files as the first token embeddings of a new model."""

import gzip
import hashlib
import io
import logging
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from gptcli import stop
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, DataError
from gptcli.model.gpt import GPT

log = logging.getLogger("gptcli")

# Of the token embeddings as `model.gpt.initialise` draws them. GloVe's vectors are some 20 times as
# large (about 0.4 a number): beside the other rows they would drown out the positions, and with
# tied embeddings the first predictions would be wildly certain.
_INITIAL_RMS = 0.02
_LONGEST_LINE = 1 << 20  # bytes; a file without line ends is no file of vectors
_POLL_LINES = 4096

_Vector = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class EmbeddingStart:
    """Which token embeddings start from word vectors, and the file that these come from.

    `words` are the file's lines that hold a vector, `bad_lines` those that do not. Of the
    `matched_tokens`, `lower_cased_tokens` have their word in lower case only.
    """

    path: str
    bytes: int
    sha256: str
    words: int
    bad_lines: int
    matched_tokens: int
    lower_cased_tokens: int


def check_word_vectors(path: Path, n_embd: int) -> None:
    """Whether `path` is a file of word vectors of `n_embd` numbers; only its beginning is read.

    Raises DataError when it is missing or no such file, ConfigError for vectors of another width.
    """
    with _reading(path) as (file, _):
        number, line = 1, _line(file, path, 1)
        header = _header(line)
        if header is not None:
            number, line = 2, _line(file, path, 2)
    width = header[1] if header is not None else len(line.split()) - 1
    problem = _not_a_vector(line, width)
    if problem is not None:
        raise DataError(
            f"{path}:{number}: not a word and its vector ({problem})",
            hint="model.embedding_file takes the text formats of word2vec and GloVe, .gz too, not"
            " the binary one; unpack a .zip first",
        )
    if width != n_embd:
        raise ConfigError(
            f"model.embedding_file: {path} has vectors of {width} numbers, but model.n_embd is"
            f" {n_embd}",
            hint=f"set model.n_embd to {width}, or take a file of vectors of {n_embd}",
        )


@torch.no_grad()
def start_from_word_vectors(model: GPT, tokenizer: Tokenizer, path: Path) -> EmbeddingStart:
    """Replace the embeddings of tokens that are words of the file by their vectors.

    A token matches the word that equals its text without one leading space, else the one that
    equals that in lower case. The rows are scaled together to the root mean square 0.02 of the
    initialisation. The file is read line by line; memory holds matched vectors only. A word's
    first line counts. Raises as `check_word_vectors`, DataError for a matched vector that is not
    finite, or when no token matches, `stop.Stopped` on a stop request.
    """
    check_word_vectors(path, model.config.n_embd)
    found = _Found(*_words_of(tokenizer))
    header = None
    with _reading(path) as (file, raw):
        for number, line in _lines(file, path):
            if number == 1 and (header := _header(line)) is not None:
                continue
            if number % _POLL_LINES == 0:
                stop.raise_if_requested()
            found.take(line, model.config.n_embd, f"{path}:{number}")
        digest, size = raw.digest.hexdigest(), path.stat().st_size
    _check_whole(path, found, None if header is None else header[0])
    ids = sorted(found.vectors)
    vectors = torch.from_numpy(np.stack([found.vectors[i] for i in ids]))
    rms = float(vectors.double().square().mean().sqrt())
    if rms == 0.0:
        raise DataError(f"{path}: the vectors of all matching words are zero")
    rows = (vectors * (_INITIAL_RMS / rms)).to(model.wte.weight)
    model.wte.weight[torch.tensor(ids, device=rows.device)] = rows
    lowered = len(ids) - len(found.exact)
    start = EmbeddingStart(str(path), size, digest, found.words, found.bad_lines, len(ids), lowered)
    _tell(start, tokenizer.vocab_size, rms, found.first_bad)
    return start


def _check_whole(path: Path, found: "_Found", promised: int | None) -> None:
    """DataError for a file that is mostly no vectors or has none to use; a cut one is told."""
    if found.bad_lines > found.words:
        raise DataError(
            f"{path}: {found.bad_lines:,} of {found.bad_lines + found.words:,} lines hold no"
            f" vector; the first is {found.first_bad}",
            hint="take a word2vec or GloVe text file",
        )
    if not found.vectors:
        raise DataError(
            f"{path}: none of its {found.words:,} words is a token of the vocabulary",
            hint="remove model.embedding_file, or take vectors of the corpus's language",
        )
    if promised is not None and promised != found.words + found.bad_lines:
        log.warning(
            f"embedding_file: {path} says that it holds {promised:,} words, but has"
            f" {found.words + found.bad_lines:,} lines; is it cut off?"
        )


def _tell(start: EmbeddingStart, vocab_size: int, rms: float, first_bad: str) -> None:
    log.info(
        f"embedding_file: {start.matched_tokens:,} of {vocab_size:,} tokens start from word vectors"
        f" ({start.lower_cased_tokens:,} of them by their word in lower case; root mean square"
        f" {rms:.3g} scaled to {_INITIAL_RMS})"
    )
    if start.bad_lines:
        log.warning(
            f"embedding_file: {start.bad_lines:,} of {start.words + start.bad_lines:,} lines hold"
            f" no vector and are skipped; the first is {first_bad}"
        )


@dataclass
class _Found:
    """What a walk through the file has found so far. `exact` and `lower`: word -> token ids."""

    wanted: dict[str, list[int]]
    lower: dict[str, list[int]]
    vectors: dict[int, _Vector] = field(default_factory=dict)
    exact: set[int] = field(default_factory=set)
    words: int = 0
    bad_lines: int = 0
    first_bad: str = ""

    def take(self, line: bytes, width: int, where: str) -> None:
        """Keep the line's vector where a token wants it; DataError if it is not finite."""
        problem = None
        # Splitting a line takes 50 times as long, and few words are tokens.
        if line.count(b" ") + line.count(b"\t") < width:
            problem = "too few numbers"
        try:
            first = line.split(None, 1)[0].decode() if problem is None else ""
            if first in self.wanted or first in self.lower:
                problem = _not_a_vector(line, width)
                if problem is None:
                    self._keep(line, width, where)
        except (UnicodeDecodeError, IndexError):
            problem = "not UTF-8 text"
        if problem is None:
            self.words += 1
            return
        self.bad_lines += 1
        self.first_bad = self.first_bad or f"{where} ({problem})"

    def _keep(self, line: bytes, width: int, where: str) -> None:
        name, *numbers = line.rsplit(None, width)
        word = name.decode()
        with np.errstate(over="ignore"):  # beyond fp32 is infinite, and refused below
            vector = np.array([float(n) for n in numbers]).astype(np.float32)
        ids = [i for i in self.wanted.get(word, ()) if i not in self.exact]
        second = [i for i in self.lower.get(word, ()) if i not in self.vectors]
        if (ids or second) and not np.isfinite(vector).all():
            raise DataError(
                f"{where}: the vector of {word[:60]!r} holds a number that is not finite",
                hint="remove the line from the file, or replace its vector",
            )
        self.exact.update(ids)
        self.vectors.update(dict.fromkeys(ids + second, vector))


def _words_of(tokenizer: Tokenizer) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Word -> ids of the tokens with that text, and of those with it in lower case only."""
    exact: dict[str, list[int]] = defaultdict(list)
    lower: dict[str, list[int]] = defaultdict(list)
    for token in range(tokenizer.vocab_size):
        try:
            text = tokenizer.token_bytes(token).decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        text = text.removeprefix(" ")
        if not text.strip():
            continue
        exact[text].append(token)
        if text.lower() != text:
            lower[text.lower()].append(token)
    return dict(exact), dict(lower)


def _not_a_vector(line: bytes, width: int) -> str | None:
    """Why the line is not a word and `width` numbers; None if it is. Words may hold spaces."""
    parts = line.rsplit(None, width) if width > 0 else []
    if len(parts) < 2 or len(parts) != width + 1:
        return f"{max(len(parts) - 1, 0)} numbers" if width > 0 else "no numbers"
    try:
        parts[0].decode()
        [float(part) for part in parts[1:]]
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except ValueError:
        return "not all of them numbers"
    return None


def _header(line: bytes) -> tuple[int, int] | None:
    """Count and width of word2vec's first line, `count width`; None for any other line."""
    parts = line.split()
    whole = len(parts) == 2 and all(part.isdigit() and len(part) < 19 for part in parts)
    return (int(parts[0]), int(parts[1])) if whole else None


class _Hashing(io.RawIOBase):
    """A file that is hashed as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self.digest.update(data)
        return len(data)


@contextmanager
def _reading(path: Path) -> Iterator[tuple[BinaryIO, _Hashing]]:
    """The text of the file as bytes, unpacked if .gz, and what hashes the file as it is."""
    if path.exists() and not path.is_file():
        raise DataError(f"model.embedding_file: {path} is not a file")
    try:
        with path.open("rb", buffering=0) as file:
            hashing = _Hashing(cast(BinaryIO, file))
            text = io.BufferedReader(hashing, 1 << 20)
            with gzip.GzipFile(fileobj=text) if path.suffix == ".gz" else text as opened:
                yield cast(BinaryIO, opened), hashing
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"model.embedding_file: {path} cannot be read: {reason}",
            hint="give the path of a word2vec or GloVe text file",
        ) from error


def _line(file: BinaryIO, path: Path, number: int) -> bytes:
    line = file.readline(_LONGEST_LINE)
    if len(line) == _LONGEST_LINE:
        raise DataError(
            f"{path}:{number}: a line of more than {_LONGEST_LINE} bytes; this is no text file of"
            " word vectors"
        )
    return line


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    number = 1
    while line := _line(file, path, number):
        if line.strip():
            yield number, line
        number += 1
