"""Writing to stdout and stderr: no text may steer the terminal or end the run."""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptcli.errors import ResourceError
from gptcli.reports.text import visible

log = logging.getLogger("gptcli")

_line_is_open = False  # whether what stdout shows on a terminal ends within a line


class ClosedPipeError(Exception):
    """The reader of stdout has gone (`| head -1`): nothing is left to do."""


def prepare_streams() -> None:
    """Make the standard streams safe to use for any text.

    A closed stdin, stdout or stderr is tied to the null device, so that no file opened later takes
    its number and receives stray output; characters that the locale lacks become escapes.
    Raises `ResourceError` when stdout is closed: results would vanish.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        raise ResourceError("stdout is closed", "to drop the results, add: > /dev/null")


def write_out(text: str, *, raw: bool = False) -> None:
    """Write `text` to stdout now, made `visible` on a terminal unless `raw`.

    Raises `ClosedPipeError` when nobody reads any more, `ResourceError` when it cannot be written.
    """
    if not raw and sys.stdout.isatty():
        text = visible(text)
    with _told_errors():
        sys.stdout.write(text)
        sys.stdout.flush()
    _note_end(text.encode("utf-8", "replace"))


class GrowingText:
    """A text that `write` gets as it comes. A CR at the end of a piece waits: with an LF after it,
    it ends a line; alone it could overwrite one, and a terminal gets an escape."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._held = write, ""

    def add(self, piece: str) -> None:
        """Write what the text goes on with."""
        text = self._held + piece
        self._held = "\r" if text.endswith("\r") else ""
        self._write(text.removesuffix("\r"))

    def end(self) -> None:
        """Write what was held back."""
        held, self._held = self._held, ""
        self._write(held)


def takes_colours() -> bool:
    """Whether stdout is a terminal that may be drawn on."""
    capable = os.environ.get("TERM", "dumb") != "dumb" and "NO_COLOR" not in os.environ
    return capable and sys.stdout.isatty()


def write_bytes(data: bytes) -> None:
    """Write `data` to stdout as it is, with the errors of `write_out`."""
    with _told_errors():
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    _note_end(data)


def check_page(path: Path | None) -> None:
    """Before the work: ConfigError where `path` is no place for a file, ResourceError where its
    directory is missing."""
    from gptcli.runs.regular import refuse_special

    if path is None:
        return
    refuse_special(path)
    if not path.parent.is_dir():
        raise ResourceError(f"{path}: cannot be written: there is no directory {path.parent}")


def write_page(path: Path, text: str) -> None:
    """Write an HTML page, and log where it is. ResourceError when it cannot be written."""
    check_page(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}") from error
    log.info(f"page: {path}")


@contextmanager
def _told_errors() -> Iterator[None]:
    """What goes wrong at stdout, as the exceptions that `write_out` promises."""
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipeError from error
    except OSError as error:
        raise ResourceError(f"stdout: {error.strerror}") from error


def write_error(text: str) -> None:
    """Write one line to stderr, made `visible`; a stderr that is gone is no reason to fail."""
    if sys.stderr is None:
        return
    try:  # not typer.echo, which sends UTF-8 to a locale that is ASCII
        sys.stderr.write(end_of_open_line() + visible(text) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return


def end_of_open_line() -> str:
    """What a line on stderr begins with: the end of the text that stdout shows before it on the
    same terminal, where that ends within a line."""
    global _line_is_open
    if not (_line_is_open and sys.stderr is not None and sys.stderr.isatty()):
        return ""
    _line_is_open = False
    return "\n"


def _note_end(shown: bytes) -> None:
    global _line_is_open
    if shown:
        _line_is_open = sys.stdout.isatty() and not shown.endswith(b"\n")


def settle_stdout() -> None:
    """Let the interpreter end quietly: what stdout does not take any more goes nowhere."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def styled(text: str, code: str | None, colours: bool) -> str:
    """`text` in the colours that the numbers of an SGR sequence name, where there are any."""
    return f"\x1b[{code}m{text}\x1b[0m" if colours and code else text


def columns(rows: list[list[str]], *, right: frozenset[int] = frozenset()) -> str:
    """A plain table, one line a row, two spaces between columns; `right` are right-aligned."""
    if not rows:
        return ""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)
