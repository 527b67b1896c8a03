"""Everything that happens to a rented box happens to a small run, again and again; nothing may get
lost, and each run must end with the bits of an undisturbed one.

    python scripts/chaos.py [--minutes 10] [--faults kill,term,...] [--count N] [--seed N]

Trains the same small config over and over. While it trains and between its restarts, faults are
chosen at random (see FAULTS); `--count` ends after so many of them instead of by time. After each
one: every checkpoint that was not damaged on purpose must be readable, and the newest at least as
far as the last save that the log acknowledged. Prints counts; exit code 1 if anything was lost.
The processes are forks of this one, which has imported everything and started no thread.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # faster for so small a model; before torch is there

import argparse
import collections
import logging
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch._dynamo  # noqa: F401  a second, which every optimizer would take

import gptcli.pretrain
import gptcli.reports.plots  # noqa: F401  what a run imports late
from gptcli.cli.main import main as gpt
from gptcli.errors import CheckpointError
from gptcli.runs import checkpoint
from gptcli.runs.holder import lock_holder
from gptcli.runs.outcome import differences, outcome

CONFIG = """\
name: chaos
tokenizer: {kind: bytes}
data: {train: text.txt}
model: {n_layer: 2, n_head: 2, n_embd: 32, block_size: 64, dropout: 0.1}
training: {max_steps: 240, tokens_per_step: 256, log_every: 5, eval_every: 60, save_every: 7,
           keep_last: 3, micro_batch_size: 2, precision: fp32, compile: off, device: cpu}
schedule: {warmup_steps: 10}
samples: {n: 1, max_new_tokens: 8}
"""
_FAULTS_A_RUN = 8
_DISK_BYTES = 24 * 2**20
_LONGEST_SECONDS = 120  # a process that takes longer hangs
_WHOLE = 3  # so many whole checkpoints there must be before one is damaged


@dataclass
class Run:
    """A run in the making, and what happened to it."""

    folder: Path
    seconds: float  # that an undisturbed one takes
    random: random.Random
    counts: collections.Counter[str]
    wrong: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
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


Fault = Callable[[Run], bool]  # whether it could happen


class Child:
    """`gpt pretrain --auto-resume` in a fork."""

    def __init__(self, run: Run) -> None:
        self.said = run.folder / f"said-{time.monotonic_ns()}.txt"
        jumping, seed = run.jumping, run.random.random()
        run.jumping = False
        self.pid = os.fork()
        if self.pid == 0:
            _train(run, self.said, seed if jumping else None)
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

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it has not ended."""
        if not self.ended():
            os.kill(self.pid, number)

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


def _train(run: Run, said: Path, clock: float | None) -> None:
    code = 70
    try:
        log = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        os.chdir(run.folder)
        if clock is not None:
            _jump(random.Random(clock))
        flags = ["--run-dir", "run", "--auto-resume", "--quiet"]
        code = gpt(["pretrain", "chaos.yaml", *flags])
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def _jump(chosen: random.Random) -> None:
    """Wall-clock time that jumps by days at every look at it, in this process."""
    true_time = time.time
    time.time = lambda: true_time() + chosen.uniform(-10, 10) * 86400


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
        return True

    return fault


def kill_in_save(run: Run) -> bool:
    """SIGKILL while a checkpoint is being written."""
    child, saves = Child(run), run.directory / "checkpoints"
    known = set(_names(saves))
    if child.wait(until=lambda: any(n.startswith(".tmp-") for n in set(_names(saves)) - known)):
        time.sleep(run.random.uniform(0.0, 0.006))
        child.send(signal.SIGKILL)
    child.finish(run, {-signal.SIGKILL, 0})
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
    return True


def save_now(run: Run) -> bool:
    """SIGUSR1, several times."""
    child = Child(run)
    for _ in range(3):
        child.wait(run.moment(0.3))
        if (run.directory / "checkpoints").exists():  # from then on it is the loop's to take
            child.send(signal.SIGUSR1)
    child.send(signal.SIGTERM)
    child.finish(run, {143, 0})
    return True


def file_limit(run: Run) -> bool:
    """RLIMIT_FSIZE: for a while no file can grow beyond a few kilobytes."""
    child = Child(run)
    child.wait(run.moment(0.7))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with suppress(ProcessLookupError):
        resource.prlimit(
            child.pid, resource.RLIMIT_FSIZE, (run.random.choice([0, 5000]), limits[1])
        )
        child.wait(run.moment(0.3))
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, limits)
    child.wait(run.moment(0.3))
    child.send(signal.SIGTERM)
    child.finish(run, {143, 0, 6})
    return True


def disk_full(run: Run) -> bool:
    """The file system is filled by somebody else, for a while."""
    if not run.on_small_disk:
        return False
    child = Child(run)
    child.wait(run.moment(0.7))
    ballast = run.folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    child.wait(run.moment(0.3))
    ballast.unlink()
    child.wait(run.moment(0.3))
    child.send(signal.SIGTERM)
    child.finish(run, {143, 0, 6})
    return True


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
    if first.wait(until=lambda: first.works_in(run.directory)):
        second = Child(run)
        second.wait()
        text = second.said.read_text()
        if not (first.ended() or f"in use by process {first.pid}" in text):
            run.wrong.append(f"the second process said: {text}")
        second.finish(run, {6, 143, 0} if first.ended() else {6})
    first.wait(run.moment())
    first.send(signal.SIGTERM)
    first.finish(run, {143, 0})
    return True


def damage(how: Callable[[Path, random.Random], None]) -> Fault:
    """A file of the newest checkpoint is damaged between two processes."""

    def fault(run: Run) -> bool:
        whole = [p for p in checkpoint.list_checkpoints(run.directory) if checkpoint.is_whole(p)]
        if len(whole) < _WHOLE:
            return False
        names = [p for p in sorted(whole[-1].rglob("*")) if p.is_file()]
        how(run.random.choice(names), run.random)
        run.damaged.add(whole[-1].name)
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


def check(run: Run) -> None:
    """Nothing that was acknowledged is lost, and nothing that is there is unreadable."""
    log = run.directory / "log.txt"
    text = log.read_text()[run.told :] if log.exists() else ""
    run.told += len(text)
    saved = re.findall(r"saved \S*/(step-\d+) in", text)
    run.counts["saves acknowledged"] += len(saved)
    run.damaged.difference_update(saved)  # saved again
    readable = []
    for path in checkpoint.list_checkpoints(run.directory):
        try:
            readable.append(int(checkpoint.verify(path)["step"]))
        except CheckpointError as error:
            if path.name not in run.damaged:
                run.counts["unreadable checkpoints"] += 1
                run.wrong.append(error.message)
    last = max((int(name.removeprefix("step-")) for name in saved), default=0)
    if last > max(readable, default=0):
        run.counts["acknowledged saves lost"] += 1
        run.wrong.append(f"step {last} was acknowledged; there are {readable}")


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of some megabytes at `folder`; whether there can be one here."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def prepared(folder: Path) -> Path:
    """A folder with the config and a text of its own making."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chaos.yaml").write_text(CONFIG)
    lines = (f"On day {i} the {i * i % 97}th cat sat on mat {i % 13}.\n" for i in range(3000))
    (folder / "text.txt").write_text("".join(lines))
    return folder


def disturbed(run: Run, names: list[str], left: Callable[[], bool]) -> None:
    """Train to the end through faults."""
    for _ in range(_FAULTS_A_RUN):
        name = run.random.choice(names)
        if FAULTS[name](run):
            run.counts[name] += 1
        check(run)
        if run.wrong or not left():
            break
    if not run.wrong:
        undisturbed(run)
        check(run)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of: " + ", ".join(FAULTS))
    parser.add_argument("--count", type=int, help="end after so many faults, not by time")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = given.faults.split(",")
    if unknown := set(names) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    logging.getLogger("gptcli").setLevel(logging.CRITICAL)  # the processes have logs of their own
    chosen, counts = random.Random(given.seed), collections.Counter[str]()
    began = time.monotonic()

    def left() -> bool:
        if given.count is not None:
            return sum(counts[name] for name in FAULTS) < given.count
        return time.monotonic() - began < given.minutes * 60

    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        os.environ["GPT_CACHE"] = str(root / "cache")
        reference = Run(prepared(root / "reference"), 0.0, chosen, collections.Counter())
        undisturbed(reference)
        undisturbed_from = time.monotonic()
        if reference.wrong:
            print("\n".join(reference.wrong))
            return 1
        seconds, expected = undisturbed_from - began, outcome(reference.directory)
        small = root / "small"
        small.mkdir()
        mounted = stack.enter_context(small_disk(small))
        if not mounted:
            print("no small disk: mounting one takes root; disk_full is left out")
        while left():
            on_small = mounted and counts["runs"] % 2 == 1
            folder = (small if on_small else root) / f"run-{counts['runs']}"
            run = Run(prepared(folder), seconds, chosen, counts, on_small_disk=on_small)
            disturbed(run, names, left)
            counts["runs"] += 1
            if not run.wrong:
                run.wrong += differences(expected, outcome(run.directory))
                counts["runs that ended with the same bits"] += not run.wrong
            if run.wrong:
                kept = Path(tempfile.mkdtemp(prefix="chaos-failed-"))
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                print(f"run {counts['runs']}, kept in {kept}:", *run.wrong, sep="\n  ")
                break
            shutil.rmtree(folder)
    wanted = ("unreadable checkpoints", "acknowledged saves lost")
    for name in (*FAULTS, *sorted(counts.keys() - FAULTS.keys() - set(wanted)), *wanted):
        if name in counts or name in wanted:
            print(f"{counts[name]:>7}  {name}")
    print(f"{time.monotonic() - began:7.0f}  seconds; an undisturbed run takes {seconds:.1f}")
    return int(counts["runs"] != counts["runs that ended with the same bits"])


if __name__ == "__main__":
    raise SystemExit(main())
