"""The thread that decodes: one model, one batch, and the texts of all clients in it.

A client's request is a `Job`. Its texts enter the batch as places get free, in the order in which
they came, and what they grow by waits in the job until its reader takes it. That is never more than
its texts have tokens, so a slow reader holds up nobody and memory stays bounded.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gptcli.errors import CheckpointError, GptError
from gptcli.generation.engine import MOST_ROWS, Batch, BatchSize, Request
from gptcli.generation.kernel_race import best_threads, packed_for
from gptcli.generation.reader import Reader
from gptcli.generation.row import FinishReason, Generated, Row
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT
from gptcli.runs.load import LoadedModel

log = logging.getLogger("gptcli")

_MANY_STEPS = 1_000_000  # a server takes more steps than any race costs
# Pieces wait for so long, so that a fast model's steps are not held up by their telling: a reader
# sees 50 changes a second as one that flows, and a token by token costs a third of a small model's
# speed.
_TELL_SECONDS = 0.02
_RACED_ROWS = (1, 8, MOST_ROWS)  # for up to so many rows one race of threads decides


Tell = Callable[[Iterable["Job"]], None]


class QueueFullError(Exception):
    """More texts wait than may."""


class ClosedError(Exception):
    """The worker takes no more, or ended before the text began."""


@dataclass(frozen=True)
class News:
    """What a text of a job has grown by; `finish_reason` with its last."""

    number: int
    piece: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def followed_by(self, new: "News") -> "News":
        """Both as one."""
        logprobs = self.logprobs + new.logprobs
        return News(self.number, self.piece + new.piece, logprobs, new.finish_reason)


class Job:
    """The texts that one client asked for, n of each of its requests.

    The worker's thread writes and one reader takes, when `on_change` is called. `live` jobs tell of
    every piece, others only of their end.
    """

    def __init__(
        self, requests: Sequence[Request], live: bool, on_change: Callable[[], None]
    ) -> None:
        self.requests, self.live, self.on_change = requests, live, on_change
        self.count = sum(request.n for request in requests)
        self.results: list[Generated | None] = [None] * self.count
        self.error: Exception | None = None
        self.unfinished = self.count
        self.cancelled = False
        self.begun = False  # whether its reader was told of anything
        self._news: deque[News] = deque()
        self._reported = [0] * self.count  # entries of logprobs

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self.error is not None or not self.unfinished

    def take(self) -> list[News]:
        """What came since the last time, all of one text in one."""
        merged: dict[int, News] = {}
        for _ in range(len(self._news)):
            new = self._news.popleft()
            old = merged.get(new.number)
            merged[new.number] = new if old is None else old.followed_by(new)
        return list(merged.values())

    def grow(self, number: int, row: Row, piece: str) -> None:
        """A text goes on with `piece`."""
        logprobs = row.logprobs_from(self._reported[number])
        self._reported[number] += len(logprobs)
        self._news.append(News(number, piece, logprobs))

    def finish(self, number: int, row: Row) -> None:
        """A text is over."""
        result = row.result("")
        self.results[number] = result
        if self.live:
            rest = (result.logprobs or [])[self._reported[number] :]
            self._news.append(News(number, "", rest, result.finish_reason))
        self.unfinished -= 1  # the last of all: whoever reads that it is done has everything


@dataclass
class _Text:
    job: Job
    number: int
    row: Row


class Worker:
    """Decodes the jobs of all clients together, in a thread of its own, until it is closed."""

    def __init__(self, loaded: LoadedModel, max_queue: int, max_tokens: int, tell: Tell) -> None:
        """`max_queue` texts may wait for a place beside those that grow, of up to `max_tokens`
        each. After every step `tell` gets the jobs that have news, to call their `on_change` from
        the thread of their readers."""
        self._model, self._tokenizer, self._path = loaded.model, loaded.tokenizer, loaded.path
        self._size = _size(loaded.model, max_tokens)
        self._decoder = packed_for(loaded.model, 1, _MANY_STEPS)
        self._threads = _Threads(self._decoder, self._size.rows)
        self._tell = tell
        self.capacity = self._size.rows + max_queue
        self._condition = threading.Condition()
        self._waiting: deque[_Text] = deque()
        self._growing: list[_Text] = []
        self._unfinished = 0  # texts, growing and waiting
        self._changed: dict[Job, None] = {}  # an ordered set
        self._told = 0.0  # when
        self._ending = False
        self._cancelled = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    @property
    def growing(self) -> int:
        """Texts in the batch."""
        return len(self._growing)

    @property
    def waiting(self) -> int:
        """Texts that wait for a place."""
        return max(0, self._unfinished - len(self._growing))

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let the texts of a job wait for their places. QueueFullError, ClosedError."""
        texts: list[_Text] = []
        for request in job.requests:
            for sample in range(request.n):
                texts.append(self._text(job, len(texts), request, sample))
        with self._condition:
            if self._ending:
                raise ClosedError
            if self._unfinished + job.count > self.capacity:
                raise QueueFullError
            self._unfinished += job.count
            self._waiting.extend(texts)
            self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the job any more: its places get free."""
        with self._condition:
            if not job.done:
                job.cancelled = self._cancelled = True
                self._condition.notify()

    def close(self) -> None:
        """End all texts as they are, those that wait with ClosedError, and the thread."""
        with self._condition:
            self._ending = True
            self._condition.notify()

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def _text(self, job: Job, number: int, request: Request, sample: int) -> _Text:
        def grow(_: int, piece: str) -> None:
            job.grow(number, row, piece)
            self._changed[job] = None

        told = grow if job.live else None
        row = Row(sample, self._tokenizer, request.tokens, request.sampling, told)
        return _Text(job, number, row)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                batch = self._new_batch()
                while self._wait_for_work():
                    self._drop_cancelled(batch)
                    self._threads.use_for(len(self._growing) + len(self._waiting))
                    if not self._step(batch):
                        batch = self._new_batch()
        except BaseException as error:
            self.error = error
            log.error("decoding ended: %s: %s", type(error).__name__, error)
        finally:
            self._end()

    def _new_batch(self) -> Batch:
        size = self._size
        reader = Reader(self._model, self._decoder, size.rows, size.capacity, size.most_new, {})
        return Batch(self._model, self._tokenizer, reader, self._next, size, self._broken)

    def _broken(self, row: Row) -> None:
        """The model gives what is not finite for a text: its job fails, and no other."""
        job = next(text.job for text in self._growing if text.row is row)
        log.error("%s: a text lost: the checkpoint produces non-finite logits", self._path)
        job.error = CheckpointError("the checkpoint produces non-finite logits")
        job.cancelled = self._cancelled = True  # with its other texts
        self._changed[job] = None

    def _next(self) -> Row | None:
        """The batch has a place: the next text that waits."""
        with self._condition:
            if not self._waiting:
                return None
            text = self._waiting.popleft()
            self._growing.append(text)
            return text.row

    def _wait_for_work(self) -> bool:
        with self._condition:
            while not (self._waiting or self._growing or self._ending):
                self._cancelled = False
                self._condition.wait()
            return not self._ending

    def _drop_cancelled(self, batch: Batch) -> None:
        if not self._cancelled:
            return
        with self._condition:
            self._cancelled = False
            dropped = [text for text in self._waiting if text.job.cancelled]
            self._waiting = deque(text for text in self._waiting if not text.job.cancelled)
            self._unfinished -= len(dropped)
        for text in self._growing:
            if text.job.cancelled:
                batch.cancel(text.row)
        self._settle()

    def _step(self, batch: Batch) -> bool:
        """One step; False when it failed and with it every text that grows: the batch is lost."""
        try:
            batch.step()
        except (GptError, RuntimeError, MemoryError, ValueError) as error:
            log.error("%s: %d texts lost: %s", self._path, len(self._growing), error)
            for text in self._growing:
                text.job.error = error
                text.job.cancelled = True  # with those of its texts that wait
                self._changed[text.job] = None
            with self._condition:
                self._unfinished -= len(self._growing)
                self._growing, self._cancelled = [], True
            self._tell_changes()
            return False
        self._settle()
        return True

    def _settle(self) -> None:
        """Hand over the texts that are finished, and tell what is new."""
        over = [text for text in self._growing if text.row.finish_reason is not None]
        if over:
            with self._condition:
                self._growing = [t for t in self._growing if t.row.finish_reason is None]
                self._unfinished -= len(over)
            for text in over:
                if text.job.error is not None:
                    continue  # all that there is to tell
                text.job.finish(text.number, text.row)
                if text.job.live or text.job.done:
                    self._changed[text.job] = None
        self._tell_changes()

    def _tell_changes(self) -> None:
        """Tell of first pieces and of ends at once, of other pieces some times a second."""
        if not self._changed:
            return
        now, changed = time.monotonic(), self._changed
        if now - self._told < _TELL_SECONDS:
            changed = {job: None for job in changed if job.done or not job.begun}
            self._changed = {job: None for job in self._changed if job not in changed}
        else:
            self._told, self._changed = now, {}
        if changed:
            for job in changed:
                job.begun = True
            self._tell(changed)

    def _end(self) -> None:
        with self._condition:
            self._ending = True
            waiting, self._waiting = self._waiting, deque()
        failure = ClosedError() if self.error is None else RuntimeError("decoding ended")
        for text in self._growing:
            if self.error is None:
                text.row.finish("interrupted")
            else:
                text.job.error = failure
                self._changed[text.job] = None
        for text in waiting:
            text.job.error = failure
            self._changed[text.job] = None
        if self.error is None:
            self._settle()
        self._unfinished = 0
        self._growing = []
        self._tell_changes()


class _Threads:
    """How many threads torch computes with, by the number of rows: of one row, fewer may win."""

    def __init__(self, decoder: GPT, rows: int) -> None:
        counts = sorted({min(most, rows) for most in _RACED_ROWS})
        self._best = [(most, best_threads(decoder, most, _MANY_STEPS)) for most in counts]
        self._now = 0

    def use_for(self, rows: int) -> None:
        """Set the number for the next step."""
        count = next((best for most, best in self._best if rows <= most), self._best[-1][1])
        if count != self._now:
            torch.set_num_threads(count)  # of this thread
            self._now = count


def _size(model: GPT, max_tokens: int) -> BatchSize:
    """As many places as the memory for keys and values has, each with room for a whole window."""
    longest = Request("", [0] * model.config.block_size, Sampling(max_new_tokens=max_tokens))
    return BatchSize.of(model, [longest] * MOST_ROWS)
