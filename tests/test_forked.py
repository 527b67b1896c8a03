"""The tests' own processes: one that hangs fails its test, and does not outlive it."""

import os
import signal
import time
from contextlib import suppress

import pytest
from forked import Forked, StillRunningError
from ranks import Ranks


def hang() -> None:
    os.write(2, b"almost there\n")
    time.sleep(600)


def gone(process: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return False
    return True


def test_a_process_that_hangs() -> None:
    """Bug: the whole test run waits for a process that never ends."""
    child = Forked(["--version"], before=hang)
    with pytest.raises(StillRunningError, match=r"not ended in 0\.2 s: almost there"):
        child.wait(0.2)
    assert gone(child.process)


def test_a_process_that_hangs_without_stderr() -> None:
    """Bug: who waits for the end of stderr takes it for that of the process."""

    def closed() -> None:
        os.close(2)
        time.sleep(600)

    child = Forked(["--version"], before=closed)
    with pytest.raises(StillRunningError):
        child.wait(0.2)
    assert gone(child.process)


def test_a_process_that_ends() -> None:
    """Bug: a limit costs a word or the exit code, or the time until it is over."""
    long = "x" * 200_000  # more than a pipe holds
    began = time.monotonic()
    code, said = Forked([long]).wait()
    assert (code, long in said) == (2, True)
    killed = Forked(["--version"], before=hang)
    killed.send(signal.SIGTERM)
    assert killed.wait()[0] in (-signal.SIGTERM, 70, 143)
    assert time.monotonic() - began < 10


def test_ranks_of_which_one_hangs() -> None:
    """Bug: the others are left behind, or what they said is lost."""
    ranks = Ranks(["--no-such-flag"], size=3, before={1: hang})
    with pytest.raises(StillRunningError) as caught:
        ranks.wait(1.0)
    first, *rest = str(caught.value).split("rank ")[1:]
    assert first.startswith("0 ended with 2: error: no such option")
    assert rest[0].startswith("1 not ended in ")
    assert "almost there" in rest[0]
    assert rest[1].startswith("2 killed: ")
    assert all(gone(child.process) for child in ranks.processes)
