"""Signal handlers: they set the flags of `gptcli.stop`, which every loop polls, and little else."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from gptcli import portable, stop

Handler = Callable[[int, FrameType | None], None]

_AGAIN_SECONDS = 0.1
_NOTICE = b"\nstopping, and saving what there is to save; Ctrl-C again quits at once\n"


@contextmanager
def installed() -> Iterator[None]:
    """Handle SIGINT, SIGTERM, SIGHUP and SIGUSR1 inside the block; afterwards as before.

    A signal that the parent asked to ignore (`nohup`, a background job) stays ignored. Outside
    the main thread Python allows no handlers, and none are set.
    """
    handlers = {signal.SIGINT: _interrupt, signal.SIGTERM: _request}
    if portable.HANG_UP is not None:
        handlers[portable.HANG_UP] = _request
    if portable.SAVE is not None:
        handlers[portable.SAVE] = _save
    with _handled(handlers):
        yield


@contextmanager
def raised(on_interrupt: Callable[[], None]) -> Iterator[None]:
    """Inside, while a line is typed, signals end the waiting: Ctrl-C by KeyboardInterrupt, after
    `on_interrupt`; SIGTERM and SIGHUP by `stop.Stopped`."""

    done = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not done.is_set():
            on_interrupt()
            raise KeyboardInterrupt

    def end(number: int, frame: FrameType | None) -> None:
        stop.request(number)
        if not done.is_set():
            raise stop.Stopped

    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: end}
    if portable.HANG_UP is not None:
        handlers[portable.HANG_UP] = end
    with _handled(handlers), _repeated(frozenset(handlers), done):
        stop.raise_if_requested()  # one that came before
        yield


@contextmanager
def _repeated(numbers: frozenset[signal.Signals], done: threading.Event) -> Iterator[None]:
    """Inside, such a signal comes again until the block is left; then `done` is set.

    One that comes just before readline waits for a key only leaves Python a note, which is read
    when the next key comes; and what is raised while readline completes a word is dropped.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    main = threading.get_ident()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def repeat() -> None:
        while came := os.read(reading, 1):
            if came[0] in numbers and not done.wait(_AGAIN_SECONDS):
                signal.pthread_kill(main, came[0])  # which is written to the pipe too

    repeater = threading.Thread(target=repeat, daemon=True)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    repeater.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        os.close(writing)
        repeater.join()
        os.close(reading)


@contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C requests a stop without a word, however often, and takes back no other."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if stop.requested() is None:
            stop.request(number)

    with _handled({signal.SIGINT: interrupt}):
        yield


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """As `installed`, for these."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _request(number: int, frame: FrameType | None) -> None:
    stop.request(number)


def _save(number: int, frame: FrameType | None) -> None:
    stop.request_save()


def _interrupt(number: int, frame: FrameType | None) -> None:
    if stop.requested() is signal.SIGINT:
        os._exit(stop.EXIT_CODES[signal.SIGINT])  # asked twice: publish nothing, run no cleanup
    stop.request(number)
    # os.write, because a handler may interrupt a write to sys.stderr, which is not reentrant.
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), _NOTICE)
