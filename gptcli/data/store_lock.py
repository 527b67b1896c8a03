"""A lock file beside a directory of the cache, which leaves nothing behind."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from gptcli import portable, stop

log = logging.getLogger("gptcli")

LOCK = ".lock"
_POLL_SECONDS = 0.1


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of `path`; without `wait`, False at once when another process holds it.

    A lock ends with its process. Raises OSError, and `stop.Stopped` on a stop request.
    """
    lock = path.with_name(path.name + LOCK)
    descriptor = _acquire(lock)
    if descriptor is None and wait:
        log.info(f"another process is at work on {path}; waiting for it")
        while descriptor is None:
            stop.raise_if_requested()
            time.sleep(_POLL_SECONDS)
            descriptor = _acquire(lock)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path) -> int | None:
    """The descriptor of the locked file; None when another process holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | portable.PLAIN, 0o600)
        try:
            portable.lock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks: two builds could not be kept apart
            os.close(descriptor)
            lock.unlink(missing_ok=True)
            raise
        # The holder removes the file, so what was locked may be no longer the one that others see.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == lock.stat().st_ino:
                return descriptor
        os.close(descriptor)
