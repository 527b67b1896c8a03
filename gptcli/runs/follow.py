"""Following the log of a run that another process trains."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from gptcli import stop
from gptcli.runs.holder import POLL_SECONDS, lock_holder
from gptcli.runs.regular import open_regular
from gptcli.runs.run_dir import LOG, read_run_json

RESUME_SECONDS = 30.0  # so long a stopped or killed run is waited for: a resume starts in less
_BLOCK_BYTES = 64 * 1024


def follow(run_dir: Path, last: int = 10, wait_seconds: float = RESUME_SECONDS) -> Iterator[str]:
    """The `last` lines of a run's log.txt, then each new one, until the run ends.

    A run that finished or failed has ended, and one that nobody worked in from the start. One that
    is stopped or killed meanwhile has ended unless it is resumed within `wait_seconds`, or begun
    anew. Raises `stop.Stopped`.
    """
    log = run_dir / LOG
    inode, position, rest = None, 0, b""
    held, gone_at = False, 0.0
    while True:
        stop.raise_if_requested()
        working = lock_holder(run_dir) is not None  # before reading: it may write its last lines
        if (found := _inode(log)) != inode:  # at first, and when a run is begun anew
            position = _start_of_last(log, last) if inode is None else 0
            inode, rest = found, b""
        new = _read_from(log, position)
        position += len(new)
        *lines, rest = (rest + new).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")
        if working:
            held, gone_at = True, 0.0
        elif not held or read_run_json(run_dir).get("status") in ("finished", "failed"):
            return
        else:
            gone_at = gone_at or time.monotonic()
            if time.monotonic() - gone_at >= wait_seconds:
                return
        time.sleep(POLL_SECONDS)


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _read_from(path: Path, position: int) -> bytes:
    try:
        with open_regular(path) as file:
            file.seek(position)
            return file.read()
    except OSError:
        return b""


def _start_of_last(path: Path, lines: int) -> int:
    """Where the last `lines` lines of the file begin, of what its end holds."""
    try:
        size = os.stat(path).st_size
    except OSError:
        return 0
    start = max(0, size - _BLOCK_BYTES)
    end = _read_from(path, start)
    if not lines:
        return start + len(end)
    end = end.removesuffix(b"\n")
    return start + len(end) - len(b"\n".join(end.split(b"\n")[-lines:]))
