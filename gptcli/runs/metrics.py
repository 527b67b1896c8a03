"""metrics.jsonl and samples.jsonl: one JSON object a line, appended as the run goes."""

import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from gptcli.errors import ResourceError
from gptcli.runs.run_dir import json_bytes, write_atomic

log = logging.getLogger("gptcli")

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
_BLOCK_BYTES = 16 * 1024
_MOST_WAITING = 10_000


class MetricsLog:
    """Appends records to `run_dir / filename`; every record is in the file when `write` returns.

    Records that cannot be written (disk full) wait in memory until they can, the last _MOST_WAITING
    of them, with one warning for the whole run: training is worth more than its log.
    """

    def __init__(self, run_dir: Path, filename: str = METRICS) -> None:
        self.path = run_dir / filename
        self._warned = False
        self._waiting = deque[bytes](maxlen=_MOST_WAITING)
        try:
            # A descriptor, not a buffered file: a line goes out in one call, so no kill splits it.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise ResourceError(f"cannot write {self.path}: {error.strerror}") from error
        if _is_cut(self.path):
            self._waiting.append(b"\n")  # ends the broken line, which the reader skips

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; non-finite numbers become null."""
        self._waiting.append(json_bytes(record) + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as the disk takes it."""
        try:
            while self._waiting:
                _append(self._descriptor, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            self.flush()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            what = "its lines wait until there is room, the run goes on"
            log.warning("%s: %s; %s", self.path, error.strerror, what)


class NoLog(MetricsLog):
    """The log of a process that leaves writing to another."""

    def __init__(self, run_dir: Path, filename: str = METRICS) -> None:
        self.path = run_dir / filename
        self._waiting = deque(maxlen=0)
        self._descriptor = -1


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl in file order; lines that a crash cut short are left out."""
    return _read(run_dir / METRICS)


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """Records of samples.jsonl, as `read_metrics`."""
    return _read(run_dir / SAMPLES)


def broken_lines(run_dir: Path, filename: str) -> int:
    """How many lines of metrics.jsonl or samples.jsonl are no records."""
    path = run_dir / filename
    return len(_lines(path)) - len(_read(path))


def last_metrics(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The last whole record of metrics.jsonl for each of the events train and eval, where there is
    one. Reads no more of the end of the file than holds both."""
    found: dict[str, dict[str, Any]] = {}
    missing = {"train", "eval"}
    for line in _lines_backwards(run_dir / METRICS):
        if not any(f'"{event}"'.encode() in line for event in missing):
            continue
        record = _parse(line)
        event = record.get("event") if record is not None else None
        if record is not None and event in missing:
            found[event] = record
            missing.remove(event)
            if not missing:
                break
    return found


def truncate_after(run_dir: Path, step: int, evaluated_step: int | None = None) -> None:
    """Drop the records with a step above `step` and broken lines from both files.

    What evaluations wrote (their scores, all samples) is kept up to `evaluated_step` only, where
    that is given: one that the checkpoint of `step` does not know is done again. What is dropped is
    appended to metrics.jsonl.bak and samples.jsonl.bak. ResourceError when the disk takes no files.
    """
    for filename in (METRICS, SAMPLES):
        path = run_dir / filename
        kept, dropped = _split(path, step, step if evaluated_step is None else evaluated_step)
        if not dropped and not _is_cut(path):
            continue
        if dropped:
            backup = path.with_name(f"{filename}.bak")
            old = backup.read_bytes() if backup.exists() else b""
            write_atomic(backup, old + b"".join(line + b"\n" for line in dropped))
        write_atomic(path, b"".join(line + b"\n" for line in kept))


def _split(path: Path, step: int, evaluated_step: int) -> tuple[list[bytes], list[bytes]]:
    kept: list[bytes] = []
    dropped: list[bytes] = []
    for line in _lines(path):
        record = _parse(line)
        at = record.get("step", 0) if record is not None else None
        evaluated = path.name == SAMPLES or (record is not None and record.get("event") == "eval")
        keep = isinstance(at, int) and at <= (evaluated_step if evaluated else step)
        (kept if keep else dropped).append(line)
    return kept, dropped


def _read(path: Path) -> list[dict[str, Any]]:
    lines = _lines(path)
    try:  # as one array, which takes half the time
        records = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        records = map(_parse, lines)
    return [record for record in records if isinstance(record, dict)]


def _lines(path: Path) -> list[bytes]:
    """Lines without their ends, blank ones left out; none when there is no file."""
    if not path.exists():
        return []
    return [line for line in path.read_bytes().split(b"\n") if line.strip()]


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """Lines without their ends, the last one first; none when the file cannot be read."""
    try:
        with open(path, "rb") as file:
            end, cut = file.seek(0, os.SEEK_END), b""
            while end:
                start = max(0, end - _BLOCK_BYTES)
                file.seek(start)
                cut, *lines = (file.read(end - start) + cut).split(b"\n")
                yield from reversed(lines)
                end = start
            yield cut
    except OSError:
        return


def _append(descriptor: int, line: bytes) -> None:
    """Append a line, or nothing. OSError."""
    before = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        if written < len(line):  # the disk took a part; the next call tells why
            os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, before)
        raise


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _is_cut(path: Path) -> bool:
    """Whether the last line lacks its end."""
    try:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # no file, or an empty one
        return False
