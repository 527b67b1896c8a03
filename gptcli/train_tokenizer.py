"""`gpt tokenizer train`: byte-level BPE learned from whole documents of a corpus."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from gptcli import stop
from gptcli.config.data_schema import SourceConfig
from gptcli.data.bpe import whole_words
from gptcli.data.files import SourceFile, resolve
from gptcli.data.readers import read_shards
from gptcli.data.scan import SourceScan
from gptcli.data.shards import Problems
from gptcli.data.tokenizer import Tokenizer, train_bpe
from gptcli.errors import ConfigError, DataError, ResourceError

log = logging.getLogger("gptcli")

_MEASURED_BYTES = 10_000_000  # of the text, for the bytes a token: encoding more tells no more


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer made and saved, the bytes of text it learned from, how long that took, and its
    bytes a token on (the beginning of) that text."""

    tokenizer: Tokenizer
    directory: Path
    text_bytes: int
    seconds: float
    bytes_per_token: float


def train_tokenizer(
    sources: list[SourceConfig], *, vocab_size: int, pattern: str, max_bytes: int, out: Path
) -> TrainedTokenizer:
    """Learn a tokenizer from the first `max_bytes` of the sources and save it in `out`.

    Raises ConfigError when `out` holds something, DataError when there is no text, ResourceError
    when it cannot be written, `stop.Stopped` when a stop is asked for.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already", "name another directory with --out")
    log.info(f"reading {', '.join(source.path for source in sources)}")
    begun = time.monotonic()
    found = _texts(sources)
    first = next((text for text in found if text), None)
    if first is None:
        raise DataError(f"no text in {', '.join(source.path for source in sources)}")
    size, sample = 0, list[str]()

    def texts() -> Iterator[str]:
        nonlocal size
        for text in chain((first,), found):
            if size < _MEASURED_BYTES:
                sample.append(text)
            size += len(text.encode("utf-8", "replace"))
            yield text

    tokenizer = train_bpe(texts(), vocab_size, pattern, max_bytes)
    seconds = time.monotonic() - begun
    tokens, measured = 0, 0
    for text in sample:
        stop.raise_if_requested()
        tokens += len(tokenizer.encode_numpy(text))
        measured += len(text.encode("utf-8", "replace"))
    try:
        tokenizer.save(out)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written: {error.strerror}") from error
    return TrainedTokenizer(tokenizer, out, size, seconds, measured / max(tokens, 1))


def _texts(sources: list[SourceConfig]) -> Iterator[str]:
    scanners = [SourceScan(source, None) for source in sources]
    for file in resolve(sources):
        yield from _file_texts(file, scanners[file.number])


def _file_texts(file: SourceFile, scanner: SourceScan) -> Iterator[str]:
    problems = Problems()
    if file.kind in ("tokens", "binary"):
        raise DataError(f"{file.path}: not text; a tokenizer is learned from text")
    scan = scanner.scan(file, problems, None)
    if bad := problems.invalid_utf8.get(file.path):
        log.warning(f"{file.path}: {bad} invalid UTF-8 sequences were read as U+FFFD")
    if scan.documents != 0:  # None: a remote file, which is not counted
        yield from whole_words(read_shards([scan.whole(None, None)]))  # counted by the scan
