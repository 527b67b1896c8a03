"""`gpt` in a fork of this process: real processes, signals and exit codes, without four seconds of
imports each."""

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gptcli.cli.main import main


class StillRunningError(AssertionError):
    """A process did not end in its time, and was killed; what it has said is in the message."""


class Forked:
    """`gpt` in a fork of this process, which has loaded what a fresh one loads for four seconds.

    `stdout` reads what it prints, unless the path it prints to is given. `before` runs in the child
    first: limits, patches.
    """

    def __init__(
        self,
        arguments: list[str],
        stdout: Path | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(out)
            os.close(err)
            to = out_end if stdout is None else os.open(stdout, os.O_WRONLY)
            self._run(arguments, to, err_end, before)
        os.close(out_end)
        os.close(err_end)
        self.stdout, self._stderr = os.fdopen(out, "rb"), os.fdopen(err, "rb", buffering=0)
        self._said = b""

    @staticmethod
    def _run(
        arguments: list[str], to: int, err_end: int, before: Callable[[], object] | None
    ) -> None:
        code = 70
        try:
            os.dup2(to, 1)
            os.dup2(err_end, 2)
            os.close(to)
            os.close(err_end)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            if before is not None:
                before()
            code = main(arguments)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):  # nobody reads any more; this process must end all the same
                sys.stderr.flush()
            os._exit(code)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.process, number)

    def wait(self, seconds: float = 120) -> tuple[int, str]:
        """Exit code (70 for an exception that gets out, -N for signal N) and stderr.

        StillRunningError where it takes longer.
        """
        ends = time.monotonic() + seconds
        while self._is_heard(ends - time.monotonic()):
            pass
        while True:  # one that has closed its stderr may still run
            found, status = os.waitpid(self.process, os.WNOHANG)
            if found:
                self._stderr.close()
                return os.waitstatus_to_exitcode(status), self._said.decode(errors="replace")
            if time.monotonic() > ends:
                raise StillRunningError(f"not ended in {seconds:.3g} s: {self.kill()[-2000:]}")
            time.sleep(0.001)

    def kill(self) -> str:
        """End the process; what it has said on stderr."""
        with suppress(ProcessLookupError, ChildProcessError):  # it has been waited for
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        while self._is_heard(0.1):  # a process of its own may still have the other end
            pass
        return self._said.decode(errors="replace")

    def _is_heard(self, seconds: float) -> bool:
        """Take what stderr gives within that time; False where that is nothing, or its end."""
        if not select.select([self._stderr], [], [], max(seconds, 0))[0]:
            return False
        more = self._stderr.read(65536)
        self._said += more
        return bool(more)
