"""What `scripts/chaos.py` does to a run: signals, limits, full disks, other processes, damage.

Each fault starts `gpt pretrain --auto-resume` in a fork of this process, and says whether it met
one that lived: what came too late is no fault.
"""

import collections
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gptcli.cli.main import main as gpt
from gptcli.runs import checkpoint
from gptcli.runs.holder import lock_holder

_LONGEST_SECONDS = 120  # a process that takes longer hangs
_WHOLE = 3  # so many whole checkpoints there must be before one is damaged
_TRAIN = ["pretrain", "chaos.yaml", "--run-dir", "run", "--auto-resume", "--quiet"]


@dataclass
class Run:
    """A run in the making, and what happened to it."""

    folder: Path
    seconds: float  # that an undisturbed one takes
    random: random.Random
    counts: collections.Counter[str]
    wrong: list[str] = field(default_factory=list)
    acknowledged: set[int] = field(default_factory=set)  # steps that the log says are saved
    damaged: set[int] = field(default_factory=set)  # steps whose checkpoint a fault has damaged
    told: int = 0  # of log.txt: characters that are read
    on_small_disk: bool = False
    jumping: bool = False  # whether the next process has a clock that jumps

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    def moment(self, share: float = 0.4) -> float:
        """Seconds from a process's start to a fault."""
        return self.random.uniform(0.0, self.seconds * share)


Fault = Callable[[Run], bool]  # whether it met what it is for


class Child:
    """`gpt`, which trains unless told otherwise, in a fork."""

    def __init__(self, run: Run, command: list[str] = _TRAIN) -> None:
        self.said = run.folder / f"said-{time.monotonic_ns()}.txt"
        self.said.touch()  # a kill may come before it has begun
        jumping, seed = run.jumping, run.random.random()
        run.jumping = False
        self.pid = os.fork()
        if self.pid == 0:
            _work(run, command, self.said, seed if jumping else None)
        self.code: int | None = None

    def ended(self) -> bool:
        """Whether it has."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def works_in(self, directory: Path) -> bool:
        """Whether it holds the lock of a run."""
        holder = lock_holder(directory)
        return holder is not None and holder.pid == self.pid

    def send(self, number: signal.Signals) -> bool:
        """Send a signal, if it has not ended: whether it had not."""
        if self.ended():
            return False
        os.kill(self.pid, number)
        return True

    def wait(self, seconds: float = _LONGEST_SECONDS, until: Callable[[], bool] = bool) -> bool:
        """Wait for its end, no longer than `seconds`, or until something comes true. Whether that
        came before its end."""
        ends = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < ends:
            if until():
                return True
            time.sleep(0.0005)
        return False

    def finish(self, run: Run, allowed: set[int]) -> None:
        """Wait for its end, which must come with one of the exit codes."""
        self.wait()
        if not self.ended():
            self.send(signal.SIGKILL)
            self.wait()
            run.wrong.append(f"a process was still there after {_LONGEST_SECONDS} s")
        text = self.said.read_text(errors="replace")
        if self.code not in allowed or "Traceback" in text or "internal" in text:
            run.wrong.append(f"exit code {self.code}, not in {sorted(allowed)}: {text.strip()}")
        self.said.unlink()


def _work(run: Run, command: list[str], said: Path, clock: float | None) -> None:
    code = 70
    try:
        log = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        os.chdir(run.folder)
        if clock is not None:
            _jump(random.Random(clock))
        code = gpt(command)
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def _jump(chosen: random.Random) -> None:
    """Wall-clock time that jumps by days at every look at it, in this process."""
    true_time = time.time
    time.time = lambda: true_time() + chosen.uniform(-10, 10) * 86400


def verified(run: Run) -> None:
    """`gpt runs verify` finds what faults have damaged, and nothing else."""
    steps = {int(path.name[5:]) for path in checkpoint.list_checkpoints(run.directory)}
    Child(run, ["runs", "verify", "run"]).finish(run, {4 if steps & run.damaged else 0})
    run.counts["runs verified"] += 1


def undisturbed(run: Run) -> None:
    """No fault: the run trains to its end, or a fault of the disk that is still there ends it."""
    Child(run).finish(run, {0})


def ended_by(number: signal.Signals, code: int) -> Fault:
    """A signal at a random time."""

    def fault(run: Run) -> bool:
        child = Child(run)
        child.wait(run.moment())
        child.send(number)
        child.finish(run, {code, 0})
        return child.code == code

    return fault


def kill_in_save(run: Run) -> bool:
    """SIGKILL while a checkpoint is being written."""
    child, saves = Child(run), run.directory / "checkpoints"
    known = set(_names(saves))
    if child.wait(until=lambda: any(n.startswith(".tmp-") for n in set(_names(saves)) - known)):
        time.sleep(run.random.uniform(0.0, 0.006))
        child.send(signal.SIGKILL)
    child.finish(run, {-signal.SIGKILL, 0})
    if child.code != -signal.SIGKILL:
        return False
    if any(name.startswith((".tmp-", ".del-")) for name in _names(saves)):
        run.counts["kills that left a half-written checkpoint"] += 1
    return True


def pause(run: Run) -> bool:
    """SIGSTOP, and SIGCONT a little later."""
    child = Child(run)
    for _ in range(3):
        child.wait(run.moment(0.3))
        child.send(signal.SIGSTOP)
        time.sleep(run.random.uniform(0.01, 0.3))
        child.send(signal.SIGCONT)
    child.wait(run.moment(0.3))
    child.send(signal.SIGKILL)
    child.finish(run, {-signal.SIGKILL, 0})
    return child.code == -signal.SIGKILL


def save_now(run: Run) -> bool:
    """SIGUSR1, several times."""
    child, met = Child(run), False
    for _ in range(3):
        child.wait(run.moment(0.3))
        if (run.directory / "checkpoints").exists():  # from then on it is the loop's to take
            met |= child.send(signal.SIGUSR1)
    child.send(signal.SIGTERM)
    child.finish(run, {143, 0})
    return met


def file_limit(run: Run) -> bool:
    """RLIMIT_FSIZE: for a while no file can grow beyond a few kilobytes."""
    child = Child(run)
    child.wait(run.moment(0.7))
    limits, met = resource.getrlimit(resource.RLIMIT_FSIZE), not child.ended()
    with suppress(ProcessLookupError):
        resource.prlimit(
            child.pid, resource.RLIMIT_FSIZE, (run.random.choice([0, 5000]), limits[1])
        )
        child.wait(run.moment(0.3))
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, limits)
    child.wait(run.moment(0.3))
    child.send(signal.SIGTERM)
    child.finish(run, {143, 0, 6})
    return met


def disk_full(run: Run) -> bool:
    """The file system is filled by somebody else, for a while."""
    if not run.on_small_disk:
        return False
    child = Child(run)
    child.wait(run.moment(0.7))
    ballast, met = run.folder / "ballast", not child.ended()
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    child.wait(run.moment(0.3))
    ballast.unlink()
    child.wait(run.moment(0.3))
    child.send(signal.SIGTERM)
    child.finish(run, {143, 0, 6})
    return met


def clock(run: Run) -> bool:
    """A clock that jumps by days in the next process, and file times that say nothing."""
    run.jumping = True
    for path in run.directory.rglob("*"):
        moment = run.random.uniform(0, 2e9)
        os.utime(path, (moment, moment))
    return ended_by(signal.SIGKILL, -signal.SIGKILL)(run)


def second_process(run: Run) -> bool:
    """Another process on the same run: it must go away at once, and the first never notice."""
    first = Child(run)
    met = first.wait(until=lambda: first.works_in(run.directory))
    if met:
        second = Child(run)
        second.wait()
        text = second.said.read_text()
        if not (first.ended() or f"in use by process {first.pid}" in text):
            run.wrong.append(f"the second process said: {text}")
        second.finish(run, {6, 143, 0} if first.ended() else {6})
    first.wait(run.moment())
    first.send(signal.SIGTERM)
    first.finish(run, {143, 0})
    return met


def damage(how: Callable[[Path, random.Random], None]) -> Fault:
    """A file of the newest checkpoint is damaged between two processes."""

    def fault(run: Run) -> bool:
        whole = [p for p in checkpoint.list_checkpoints(run.directory) if checkpoint.is_whole(p)]
        if len(whole) < _WHOLE:
            return False
        names = [p for p in sorted(whole[-1].rglob("*")) if p.is_file()]
        how(run.random.choice(names), run.random)
        run.damaged.add(int(whole[-1].name.removeprefix("step-")))
        return True

    return fault


def truncated(path: Path, chosen: random.Random) -> None:
    os.truncate(path, chosen.randrange(path.stat().st_size))


def flipped(path: Path, chosen: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
    path.write_bytes(data)


def removed(path: Path, chosen: random.Random) -> None:
    path.unlink()


FAULTS: dict[str, Fault] = {
    "kill": ended_by(signal.SIGKILL, -signal.SIGKILL),
    "kill_in_save": kill_in_save,
    "term": ended_by(signal.SIGTERM, 143),
    "hup": ended_by(signal.SIGHUP, 129),
    "int": ended_by(signal.SIGINT, 130),
    "pause": pause,
    "save_now": save_now,
    "file_limit": file_limit,
    "disk_full": disk_full,
    "clock": clock,
    "second_process": second_process,
    "truncate": damage(truncated),
    "flip": damage(flipped),
    "remove": damage(removed),
}


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
