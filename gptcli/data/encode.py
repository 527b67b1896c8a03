"""Records encoded ahead of their use, in threads, in order, with an exact position."""

import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from gptcli.data.mixture import Stream
from gptcli.data.rows import Tokens
from gptcli.data.tokenizer import Tokenizer

AHEAD_BYTES = 8 * 1024 * 1024  # of text being encoded or waiting as tokens
# What reading ahead costs besides the text: a record's own memory; opening the next epoch, which
# is worth it for one or two of them only.
_RECORD_BYTES = 1024
_EPOCH_BYTES = AHEAD_BYTES // 2
# Handing a job to a thread costs about 30 microseconds, so that small records share one.
_JOB_BYTES = 128 * 1024


@dataclass
class _Job:
    """Records as the stream gave them (None: an epoch's end), the place behind each, and their
    tokens when a thread has made them."""

    records: list[dict[str, Any] | None] = field(default_factory=list)
    places: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    texts: list[str | bytes] = field(default_factory=list)
    bytes: int = 0
    tokens: "Future[_Encoded] | None" = None
    error: Exception | None = None  # what the stream raised behind the last record


@dataclass(frozen=True)
class _Encoded:
    """Tokens of a job's texts, and what the tokenizer raised at the one behind the last."""

    tokens: list[Tokens]
    error: Exception | None = None


class EncodedStream:
    """The records of `stream` with "tokens" added, encoded by `threads` threads.

    The stream is read ahead by at most 8 MiB of text. Records that hold "tokens" pass as they are.
    What the stream or the tokenizer raises is raised at its place, and again if asked once more.
    """

    def __init__(self, stream: Stream, tokenizer: Tokenizer, threads: int) -> None:
        self._stream, self._tokenizer = stream, tokenizer
        self._pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="encode")
        # At garbage collection too, and without waiting: work that nobody will use is dropped.
        self._finalizer = weakref.finalize(
            self, self._pool.shutdown, wait=False, cancel_futures=True
        )
        self._jobs: deque[_Job] = deque()
        self._ahead_bytes = 0
        self._error: Exception | None = None
        self._encoded = _Encoded([])  # of the first job
        self._position = self._used = 0  # records of the first job, and tokens, handed out
        self._place: tuple[dict[str, Any], float] = (stream.state(), stream.epochs)

    @property
    def epochs(self) -> float:
        """Passes over the records handed out so far, as a fraction by bytes."""
        return self._place[1]

    def state(self) -> dict[str, Any]:
        """The place behind the last record handed out, JSON-able: the stream's state there."""
        return self._place[0]

    def next(self) -> dict[str, Any] | None:
        """The next record, or None once at the end of each epoch."""
        if self._error is not None:
            raise self._error
        try:
            while not self._jobs or self._position == len(self._jobs[0].records):
                self._next_job()
            record = self._jobs[0].records[self._position]
            if record is not None and "tokens" not in record:
                record = {**record, "tokens": self._next_tokens()}
        except Exception as error:
            self._error = error
            self._finalizer()  # the error may be kept for long, and this stream with it
            raise
        self._jobs[0].records[self._position] = None  # its text is not needed any more
        self._place = self._jobs[0].places[self._position]
        self._position += 1
        return record

    def close(self) -> None:
        """End the threads; waits for what they are encoding."""
        self._finalizer.detach()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _next_job(self) -> None:
        """Drop the job that is used up, read ahead, wait for the next one's tokens."""
        if self._jobs:
            job = self._jobs.popleft()
            self._ahead_bytes -= job.bytes
            if job.error is not None:
                raise job.error
        while self._ahead_bytes < AHEAD_BYTES and not (self._jobs and self._jobs[-1].error):
            job = self._read_job()
            if job.texts:
                job.tokens = self._pool.submit(_encode, self._tokenizer, job.texts)
            self._jobs.append(job)
            self._ahead_bytes += job.bytes
        first = self._jobs[0]
        self._encoded = first.tokens.result() if first.tokens else _Encoded([])
        self._position = self._used = 0

    def _next_tokens(self) -> Tokens:
        if self._used == len(self._encoded.tokens) and self._encoded.error is not None:
            raise self._encoded.error
        self._used += 1
        return self._encoded.tokens[self._used - 1]

    def _read_job(self) -> _Job:
        job = _Job()
        try:
            while job.bytes < _JOB_BYTES:
                record = self._stream.next()
                job.records.append(record)
                job.places.append((self._stream.state(), self._stream.epochs))
                if record is not None and "tokens" not in record:
                    job.texts.append(record["text"])
                job.bytes += _RECORD_BYTES + record["bytes"] if record else _EPOCH_BYTES
        except Exception as error:  # raised when the records before it are handed out
            job.error = error
        return job


def _encode(tokenizer: Tokenizer, texts: Sequence[Any]) -> _Encoded:
    tokens: list[Tokens] = []
    try:
        for text in texts:
            tokens.append(tokenizer.encode_numpy(text))
    except Exception as error:  # raised when the records before it are handed out
        return _Encoded(tokens, error)
    return _Encoded(tokens)
