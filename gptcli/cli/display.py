"""Draws the library's log records: a live line on a terminal, plain lines everywhere else."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gptcli.cli.terminal import end_of_open_line
from gptcli.reports.text import visible
from gptcli.training.events import EvalEvent, StepEvent

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PREFIX = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}


def terminal_is_capable() -> bool:
    """Whether stderr is a terminal that may be drawn on."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    return "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"


def duration(seconds: float) -> str:
    """Seconds as people read them: `45s`, `2m10s`, `3h05m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Display(logging.Handler):
    """Shows records of the logger `gptcli` on stderr; never fails because stderr does."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = False
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._validation = ""

    @contextmanager
    def attached(self) -> Iterator["Display"]:
        """Listen to the library's logger inside the block."""
        logger = logging.getLogger("gptcli")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        try:
            yield self
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Inside the block, draw steps as one changing line where the terminal can show it."""
        if self.quiet or not terminal_is_capable():
            yield
            return
        self._progress = _progress_line()
        self._task = self._progress.add_task("", total=1.0, status="")
        self._progress.start()
        # Shown again at once: a process that is killed must not leave the terminal without one.
        self._progress.console.show_cursor(True)
        try:
            yield
        finally:
            self._progress.stop()
            self._progress = self._task = None

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        if self.quiet and record.levelno < logging.WARNING:
            return
        event = getattr(record, "event", None)
        text = _PREFIX.get(record.levelno, "") + visible(record.getMessage())
        try:
            if self._progress is None:
                self._print_plain(text)
            elif isinstance(event, StepEvent):
                self._draw(event)
            else:
                if isinstance(event, EvalEvent):
                    self._validation = f"  val {event.bits_per_byte:.3f} bits/byte"
                self._print_above(text)
        except (OSError, ValueError):
            return  # stderr is gone; training matters more than telling about it

    def _print_plain(self, text: str) -> None:
        if sys.stderr is not None:
            sys.stderr.write(end_of_open_line() + text + "\n")
            sys.stderr.flush()

    def _print_above(self, text: str) -> None:
        from rich.text import Text

        assert self._progress is not None
        # A Text is never searched for markup, emoji names or things to colour.
        self._progress.console.print(Text(text), soft_wrap=True, markup=False, emoji=False)
        self._progress.refresh()

    def _draw(self, event: StepEvent) -> None:
        assert self._progress is not None
        assert self._task is not None
        status = status_line(event) + self._validation
        self._progress.update(self._task, completed=event.progress, status=status, refresh=True)


def status_line(event: StepEvent) -> str:
    """`step 100/400  loss 3.412  12345 tok/s  left 2m10s`."""
    of = f"/{event.max_steps}" if event.max_steps else ""
    parts = [
        f"step {event.step}{of}",
        f"loss {event.loss:.3f}",
        f"{event.tokens_per_second:,.0f} tok/s",
    ]
    if event.mfu is not None:
        parts.append(f"mfu {event.mfu:.0%}")
    if event.left_seconds is not None:
        parts.append(f"left {duration(event.left_seconds)}")
    return "  ".join(parts)


def _progress_line() -> "Progress":
    """A transient line of a bar and a status, drawn when told to (no thread beside training)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    status = TextColumn(
        "{task.fields[status]}",
        markup=False,
        table_column=Column(no_wrap=True, overflow="ellipsis"),
    )
    return Progress(
        BarColumn(bar_width=20),
        status,
        console=Console(stderr=True, highlight=False, markup=False, emoji=False),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
