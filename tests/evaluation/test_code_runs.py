"""Generated programs run confined: what they may do, and what ends them."""

import os
import sys
import time
from pathlib import Path

import pytest

from gptcli.evaluation.code_runs import code_runs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no process limits")


GOOD = """
import asyncio, dataclasses, json, os, re, tempfile
asyncio.run(asyncio.sleep(0))
open('a.txt', 'w').write('x')
assert open('a.txt').read() == 'x'
os.mkdir('d')
os.rename('d', 'e')
os.rmdir('e')
import dbm, sqlite3
sqlite3.connect(':memory:').execute('create table t (x)')
dbm.open('own', 'c').close()
if __name__ == '__main__':
    raise SystemExit(0)
"""

# Each line must raise the error before it.
REFUSED = """
import ctypes, os, socket, subprocess
def attempt(error, action):
    try:
        action()
    except error:
        return
    raise AssertionError('allowed: ' + action.__code__.co_names[0])
attempt(EOFError, lambda: input())
attempt(MemoryError, lambda: bytearray(10**10))
attempt(OSError, lambda: open('big', 'wb', 0).write(bytes(10**8)) == 10**8 or os.stat('none'))
attempt(ImportError, lambda: __import__('numpy'))
attempt(PermissionError, lambda: subprocess.run(['true']))
attempt(PermissionError, lambda: os.fork())
attempt(PermissionError, lambda: os.system('true'))
attempt(PermissionError, lambda: os.kill(os.getppid(), 9))
attempt(PermissionError, lambda: socket.create_connection(('127.0.0.1', 9)))
attempt(PermissionError, lambda: ctypes.CDLL(None))
attempt(ImportError, lambda: __import__('dbm.gnu'))
attempt(AttributeError, lambda: os.mknod('pipe'))
"""

CHANGES = """
import os, pathlib, shutil, sqlite3
kept = {kept!r}
for number, change in enumerate((
    lambda: open(kept, 'w'),
    lambda: os.open(kept, os.O_WRONLY | os.O_TRUNC),
    lambda: os.remove(kept),
    lambda: pathlib.Path(kept).unlink(),
    lambda: os.rename(kept, 'here'),
    lambda: shutil.rmtree(os.path.dirname(kept)),
    lambda: os.symlink(kept, 'link'),
    lambda: open('../' * 9 + kept, 'a'),
    lambda: sqlite3.connect(kept + '.new'),
    lambda: sqlite3.connect('file:' + kept, uri=True),
)):
    try:
        change()
    except PermissionError:
        continue
    raise AssertionError(f'change {{number}} was allowed')
"""


def test_good_programs() -> None:
    """Bug: ordinary programs are refused, or a fence and the words around it are run."""
    assert code_runs(GOOD) is None
    assert code_runs("Here it is:\n```python\nprint(2)\n```\nIt prints 2 (") is None


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("", "no program"),
        ("```\n\n```", "no program"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("if __name__ == '__main__': 1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os; os.abort()", "killed, as by the limits of time and memory"),
    ],
)
def test_bad_programs(program: str, error: str) -> None:
    """Bug: what fails counts as running."""
    assert code_runs(program) == error


def test_what_is_refused() -> None:
    """Bug: a program reaches for the machine: memory, processes, the network."""
    assert code_runs(REFUSED) is None


def test_files_outside_stay_as_they_are(tmp_path: Path) -> None:
    """Bug: a program deletes or overwrites the user's files, by a link to them too."""
    kept = tmp_path / "kept"
    kept.write_text("mine")
    assert code_runs(CHANGES.format(kept=str(kept))) is None
    assert kept.read_text() == "mine"


def test_endless_programs_are_ended() -> None:
    """Bug: a program that sleeps holds up the evaluation or outlives it."""
    began = time.monotonic()
    assert code_runs("import time; time.sleep(100)", seconds=0.7) == "still running after 0.7 s"
    assert time.monotonic() - began < 50


def test_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a program reads keys and tokens from the user's environment."""
    monkeypatch.setenv("MY_TOKEN", "secret")
    assert code_runs("import os\nassert 'MY_TOKEN' not in os.environ") is None
    assert "MY_TOKEN" in os.environ
