"""Where the messages of `gpt chat` come from: a terminal, with line editing, or a pipe."""

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType

from gptcli import portable, stop
from gptcli.cli import signals
from gptcli.cli.terminal import write_error, write_out

_POLL_SECONDS = 0.2
_PASTE_SECONDS = 0.02  # nobody types another line as fast as that
_CHUNK_BYTES = 2**16
_MOST_BYTES = 10_000_000  # of a line, far above any model's block: `yes` without newlines

PROMPT, MORE = "> ", "... "


class PipedLines:
    """The lines of a descriptor, one message each; polls the stop flag while none comes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._data = bytearray()
        self._ended = False

    def message(self) -> str | None:
        """The next line that is not blank, None at the end. Raises `stop.Stopped`."""
        while (line := self.line()) is not None:
            if line.strip():
                return line
        return None

    def line(self) -> str | None:
        """The next line without its end; of one that is too long, the beginning."""
        searched = 0
        while (end := self._data.find(b"\n", searched)) < 0 and not self._ended:
            searched = len(self._data)
            self._read()
            if len(self._data) > 2 * _MOST_BYTES:  # keep enough to know that it is too long
                del self._data[_MOST_BYTES + 1 :]
                searched = len(self._data)
        if end < 0 and not self._data:
            return None
        line = bytes(self._data[:end] if end >= 0 else self._data)
        del self._data[: len(line) + 1]
        if len(line) > _MOST_BYTES:
            write_error(f"warning: a line of more than {_MOST_BYTES:,} bytes is cut")
            line = line[:_MOST_BYTES]
        text = line.decode("utf-8", "replace")
        if text.encode() != line:
            write_error("warning: the line is not valid UTF-8; bad bytes replaced")
        return text.removesuffix("\r")

    def is_waiting(self, seconds: float) -> bool:
        """Whether more comes within so many seconds."""
        return bool(self._data) or portable.readable(self._descriptor, seconds)

    def _read(self) -> None:
        while not portable.readable(self._descriptor, _POLL_SECONDS):
            stop.raise_if_requested()
        stop.raise_if_requested()
        chunk = os.read(self._descriptor, _CHUNK_BYTES)
        self._data += chunk
        self._ended = not chunk


class TypedLines:
    """Messages typed at a terminal, by readline where stdout is the terminal too.

    A line that ends in a backslash goes on in the next one; lines that are pasted together are one
    message.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """`words` are completed by the tab key."""
        self._readline = _readline(words) if sys.stdout.isatty() else None
        self._plain = None if self._readline is not None else PipedLines(sys.stdin.fileno())
        self._going_on = False
        self.was_typing = False  # something, when Ctrl-C came

    def message(self) -> str | None:
        """The next message, None at Ctrl-D. Raises KeyboardInterrupt and `stop.Stopped`."""
        self._going_on = False
        with signals.raised(self._note_typing):
            text = self._line(PROMPT)
            while text is not None and text.endswith("\\"):
                self._going_on = True
                more = self._line(MORE)
                text = None if more is None else f"{text[:-1]}\n{more}"
        return text

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Inside, what is typed is not shown in the middle of an answer, but at the next prompt."""
        try:
            termios = importlib.import_module("termios")
        except ImportError:  # no POSIX system
            yield
            return
        descriptor, before = sys.stdin.fileno(), None
        with suppress(termios.error):  # the terminal may have gone
            before = termios.tcgetattr(descriptor)
            unseen = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
            termios.tcsetattr(descriptor, termios.TCSADRAIN, unseen)
        try:
            yield
        finally:
            with suppress(termios.error):
                if before is not None:
                    termios.tcsetattr(descriptor, termios.TCSADRAIN, before)

    def _note_typing(self) -> None:
        typed = self._readline.get_line_buffer() if self._readline is not None else ""
        self.was_typing = self._going_on or bool(typed.strip())

    def _line(self, prompt: str) -> str | None:
        if self._plain is None:
            try:
                return input(prompt)
            except EOFError:
                return None
        if sys.stdout.isatty():
            write_out(prompt)
        elif sys.stderr is not None:  # stdout is for answers
            with suppress(OSError, ValueError):
                sys.stderr.write(prompt)
                sys.stderr.flush()
        line = self._plain.line()
        while line and not line.endswith("\\") and self._plain.is_waiting(_PASTE_SECONDS):
            more = self._plain.line()
            if more is None:
                break
            line += "\n" + more
        return line


def _readline(words: Sequence[str]) -> ModuleType | None:
    """The module, ready; None on systems without it. What is typed stays in memory."""
    try:
        readline = importlib.import_module("readline")
    except ImportError:
        return None

    def complete(text: str, state: int) -> str | None:
        found = [word for word in words if word.startswith(text)]
        return f"{found[state]} " if text and state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    # Python turns it off, as its own prompt takes single lines.
    readline.parse_and_bind("set enable-bracketed-paste on")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    return readline
