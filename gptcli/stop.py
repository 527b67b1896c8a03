"""The stop flag: signal handlers (installed by `cli/`) only set it; every loop polls it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from gptcli import portable

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
if portable.HANG_UP is not None:
    EXIT_CODES[portable.HANG_UP] = 129
_POLL_SECONDS = 0.2
_CHUNK_BYTES = 2**20

_requested: signal.Signals | None = None
_times = 0
_save_now = False
_postponed = False


class Stopped(Exception):  # noqa: N818  a request of the user, not an error
    """Raised by work that has nothing to save (tokenising, scanning) when a stop was asked for."""

    def __init__(self) -> None:
        super().__init__("stopped before training began")
        self.signal = _requested


def request(signum: int) -> None:
    """Ask every loop to stop after its current step."""
    global _requested, _times
    _requested = signal.Signals(signum)
    _times += 1


def requested() -> signal.Signals | None:
    """The signal that asked to stop, or None."""
    return None if _postponed else _requested


def times_requested() -> int:
    """How often a stop was requested, where this is `postponed` too."""
    return _times


def withdraw(number: signal.Signals) -> None:
    """Forget a request by this signal; that of another stays."""
    global _requested
    if _requested is number:
        _requested = None


@contextmanager
def postponed() -> Iterator[None]:
    """Inside, no request is heard: where several processes work in step, one cannot stop alone."""
    global _postponed
    _postponed = True
    try:
        yield
    finally:
        _postponed = False


def request_save() -> None:
    """Ask the training loop to save after its current step and go on (SIGUSR1)."""
    global _save_now
    _save_now = True


def take_save_request() -> bool:
    """True once after `request_save`."""
    global _save_now
    was, _save_now = _save_now, False
    return was


def raise_if_requested() -> None:
    """Raise `Stopped` when a stop was asked for."""
    if requested() is not None:
        raise Stopped


def read_to_end(descriptor: int, most_bytes: int) -> bytes:
    """What a file or pipe holds, up to one byte more than `most_bytes`. Raises `Stopped` while
    nothing comes: a plain read would begin again after every signal and could not be stopped."""
    data = bytearray()
    while len(data) <= most_bytes:
        ready = portable.readable(descriptor, _POLL_SECONDS)
        raise_if_requested()
        if not ready:
            continue
        chunk = os.read(descriptor, min(_CHUNK_BYTES, most_bytes + 1 - len(data)))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def reset() -> None:
    """Forget requests (a process that runs several jobs, such as the tests, calls this between)."""
    global _requested, _times, _save_now
    _requested, _times, _save_now = None, 0, False
