"""Processes that the faults happen to while they work."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from forked import Forked

ENDLESS = ("--set=training.max_steps=1000000", "--set=training.save_every=1000000")


def until(happened: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something has happened."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def logged(run_dir: Path) -> int:
    """The last step that a run has logged, -1 before the first."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=-1)


@contextmanager
def started(
    *arguments: str, before: Callable[[], object] | None = None, stdout: Path | None = None
) -> Iterator[Forked]:
    """`gpt` in a process of its own, which does not outlive the block, whatever it does there."""
    child = Forked(list(arguments), stdout, before)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError, ChildProcessError):  # it has been waited for
            os.kill(child.process, signal.SIGKILL)
            os.waitpid(child.process, 0)


@contextmanager
def training(run_dir: Path, *flags: str, steps: int = 2) -> Iterator[Forked]:
    """A process that trains until it is told to stop; `steps` of them are logged."""
    with started("pretrain", "tiny.yaml", f"--run-dir={run_dir}", *ENDLESS, *flags) as child:
        until(lambda: logged(run_dir) >= steps)
        yield child
