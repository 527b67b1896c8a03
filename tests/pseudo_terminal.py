"""`gpt` on a terminal of its own."""

import fcntl
import os
import pty
import signal
import struct
import sys
import termios
import traceback
from collections.abc import Callable
from contextlib import suppress

from gptcli.cli.main import main

_MOST_SECONDS = 60  # then the child ends by itself, whatever a test waits for


class Terminal:
    """`gpt` in a fork of this process, on a terminal of `columns`.

    `before` runs in the child first: patches, variables. TERM is dumb unless it sets another.
    """

    def __init__(
        self, *arguments: str, before: Callable[[], object] | None = None, columns: int = 80
    ) -> None:
        self.output = b""
        self.process, self._screen = pty.fork()
        if self.process == 0:
            code = 70
            try:
                signal.alarm(_MOST_SECONDS)
                fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
                sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
                for name in ("NO_COLOR", "COLUMNS", "LINES"):
                    os.environ.pop(name, None)
                os.environ["TERM"] = "dumb"
                if before is not None:
                    before()
                code = main(list(arguments))
            except BaseException:
                traceback.print_exc()
            finally:
                with suppress(OSError, ValueError):
                    sys.stderr.flush()
                os._exit(code)

    def read(self) -> bool:
        """Some more of what is shown; False at the end."""
        try:
            data = os.read(self._screen, 65536)
        except OSError:  # Linux says so when the other end is closed
            return False
        self.output += data
        return bool(data)

    def until(self, text: str) -> None:
        """Read until `text` is shown."""
        while text not in self.shown:
            assert self.read(), self.shown

    def press(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def wait(self) -> int:
        """The exit code, once all is read."""
        while self.read():
            pass
        os.close(self._screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    @property
    def shown(self) -> str:
        """As the program wrote it; the terminal turns LF into CR LF."""
        return self.output.decode(errors="ignore").replace("\r\n", "\n")
