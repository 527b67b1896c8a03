"""Everything that happens to a rented box happens to a small run, again and again; nothing may get
lost, and each run must end with the bits of an undisturbed one.

    python scripts/chaos.py [--minutes 10] [--faults kill,term,...] [--count N] [--seed N]

Trains the same small config over and over. While it trains and between its restarts, faults are
chosen at random (see chaos_faults.py); `--count` ends after so many of them instead of by time. A
fault counts where it met a living process. After each one every checkpoint that was not damaged on
purpose must be readable, and the newest at least as far as the furthest save that the log ever
acknowledged; at the end `gpt runs verify` must find what was damaged on purpose and nothing else.
Prints counts; exit code 1 if anything was lost.
The processes are forks of this one, which has imported everything and started no thread.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # faster for so small a model; before torch is there

import argparse
import collections
import logging
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chaos_faults import FAULTS, Run, undisturbed, verified

import gptcli.pretrain
import gptcli.reports.plots  # noqa: F401  what a run imports late
from gptcli.errors import CheckpointError
from gptcli.runs import checkpoint
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


def check(run: Run) -> None:
    """Nothing that was acknowledged is lost, ever, and nothing that is there is unreadable, but
    what a fault has damaged: then what was saved before that is owed."""
    log = run.directory / "log.txt"
    text = log.read_text()[run.told :] if log.exists() else ""
    run.told += len(text)
    saved = {int(step) for step in re.findall(r"saved \S*/step-(\d+) in", text)}
    run.counts["saves acknowledged"] += len(saved)
    run.acknowledged |= saved
    run.damaged -= saved  # saved again
    readable = []
    for path in checkpoint.list_checkpoints(run.directory):
        try:
            readable.append(int(checkpoint.verify(path)["step"]))
        except CheckpointError as error:
            if int(path.name.removeprefix("step-")) not in run.damaged:
                run.counts["unreadable checkpoints"] += 1
                run.wrong.append(error.message)
    owed = max(run.acknowledged - run.damaged, default=0)
    if owed > max(readable, default=0):
        run.counts["acknowledged saves lost"] += 1
        run.wrong.append(f"step {owed} was acknowledged; there are {readable}")


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
        verified(run)


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
