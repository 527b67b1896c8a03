"""Processes that take turns, for scripts/bench_train.py and scripts/bench_generate.py.

A contender is a worker script in a process of its own: it keeps the settings of one contender, its
memory and its allocator away from the others. Orders go to it as lines, each a whole number, 0 to
end; each answer is a line of JSON, the first of them facts about the contender.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

Key = TypeVar("Key")


class Failed(Exception):  # noqa: N818  a peer that cannot run here is no error
    """A contender ended without an answer; the message names it and ends its log."""


class Contender:
    """A process that waits for orders. Failed when it ends instead of answering."""

    def __init__(
        self,
        name: str,
        worker: str,
        work: dict[str, Any],
        folder: Path,
        threads: int | None = None,
    ) -> None:
        """`worker` is the script beside this one that gets `work`; its log goes into `folder`."""
        self.name, self._log = name, folder / "worker.log"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name(worker)), json.dumps(work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        try:
            self.facts = self._answer()
        except BaseException:
            self.kill()
            raise

    def ask(self, order: int) -> dict[str, Any]:
        """The answer to an order."""
        self._order(order)
        return self._answer()

    def run(self, order: int) -> float:
        """The answer's rate, of whatever the worker counts, a second."""
        return float(self.ask(order)["rate"])

    def finish(self) -> dict[str, Any]:
        """End the process; its last answer."""
        last = self.ask(0)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=60)
        self.kill()
        return last

    def kill(self) -> None:
        """End the process whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _order(self, order: int) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{order}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer tells

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = self._log.read_text().strip().splitlines()
            ended = f"exit status {self._process.wait()}"
            raise Failed(f"{self.name}: {log[-1]} ({ended})" if log else f"{self.name}: {ended}")
        facts: dict[str, Any] = json.loads(line)
        return facts


class Parent:
    """The other end of the pipes, in a worker."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer

    def answer(self, **facts: Any) -> None:
        """Send one line."""
        print(json.dumps(facts), file=self._answers, flush=True)

    def order(self) -> int:
        """The next order, 0 at the end."""
        return int(sys.stdin.readline() or 0)


@contextmanager
def running(contenders: dict[Key, Contender]) -> Iterator[None]:
    """Ends what is in `contenders` at the end of the block."""
    try:
        yield
    finally:
        for contender in contenders.values():
            contender.kill()


def take_turns(contenders: dict[Key, Contender], order: int, rounds: int) -> dict[Key, list[float]]:
    """Rates of every contender by round."""
    rates: dict[Key, list[float]] = {key: [] for key in contenders}
    for number in range(rounds):
        for key, contender in contenders.items():
            rates[key].append(contender.run(order))
        shown = ", ".join(f"{key} {values[-1]:,.4g}" for key, values in rates.items())
        note(f"round {number + 1} of {rounds}: {shown}")
    return rates


def machine(*peers: str) -> str:
    """What the figures were measured on, with the versions of these packages, and when."""
    import torch  # not at the top: contenders without it import this module

    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", info.read_text(), re.M) if info.exists() else []
    shown = []
    for peer in peers:
        with suppress(PackageNotFoundError):
            shown.append(f", {peer} {version(peer)}")
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores,"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}{''.join(shown)},"
        f" {date.today()}."
    )


def note(line: str) -> None:
    """Say how it goes, beside the tables."""
    print(line, file=sys.stderr, flush=True)
