import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gptcli.cli.main import main

GPT = [sys.executable, "-m", "gptcli"]


@pytest.fixture(autouse=True)
def clean_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run or setting of the outside world reaches a test."""
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "runs"))
    for name in ("NO_COLOR", "GPT_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a shell line in which `gpt` is this project's."""
    root = Path(__file__).parents[2]

    def run(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f'gpt() {{ {" ".join(GPT)} "$@"; }}\n{line}'],
            capture_output=True,
            text=True,
            timeout=50,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root), **environment},
            check=False,
        )

    return run


class Forked:
    """`gpt` in a fork of this process, which has loaded what a fresh one loads for four seconds.

    `stdout` reads what it prints, unless the path it prints to is given.
    """

    def __init__(self, arguments: list[str], stdout: Path | None = None) -> None:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(out)
            os.close(err)
            to = out_end if stdout is None else os.open(stdout, os.O_WRONLY)
            self._run(arguments, to, err_end)
        os.close(out_end)
        os.close(err_end)
        self.stdout, self._stderr = os.fdopen(out, "rb"), os.fdopen(err)

    @staticmethod
    def _run(arguments: list[str], to: int, err_end: int) -> None:
        code = 70
        try:
            os.dup2(to, 1)
            os.dup2(err_end, 2)
            os.close(to)
            os.close(err_end)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            code = main(arguments)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):  # nobody reads any more; this process must end all the same
                sys.stderr.flush()
            os._exit(code)

    def wait(self) -> tuple[int, str]:
        """Exit code (70 for an exception that gets out) and stderr."""
        err = self._stderr.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1]), err


@pytest.fixture
def forked() -> type[Forked]:
    """For tests of streams and signals that must not meet those of this process."""
    return Forked
