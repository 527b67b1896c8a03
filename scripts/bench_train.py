#!/usr/bin/env python3
"""Training measured against nanoGPT and transformers; one Markdown table a case.

    python scripts/bench_train.py --nanogpt CLONE --text FILE                  # all: half an hour
    python scripts/bench_train.py --nanogpt CLONE --case 13m --rounds 7        # minutes
    python scripts/bench_train.py --nanogpt CLONE --case 124m --write README.md

13m, 124m   tokens per second, share of the fp32 GEMM peak, peak memory
memory      peak memory of two AdamW steps at 124M, T 1024, B 4
threads     speed of two threads against one, beside that of the GEMM
shakespeare time to nanoGPT's loss on tinyshakespeare, and loss in its time (--text is that file)

Contenders are processes of their own that take turns of a few steps (A B C A B C ...) while the
others wait; figures are medians over the rounds, with the lowest and the highest. All have the
same number of weights, the same batch, fp32, AdamW and clipping, and read their data: ours runs
the loop of `gpt pretrain` with its automatic choices, nanoGPT its model and optimizer with the
steps of its train.py, without and with the fused AdamW and torch.compile. Starting and compiling
are not timed. `--write FILE` puts each table between <!-- bench CASE --> and <!-- /bench CASE -->.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from bench_shakespeare import ESTIMATE_SECONDS, shakespeare_table
from bench_train_cases import (
    CASES,
    WARMUP_STEPS,
    Case,
    Prepared,
    describe,
    estimate_seconds,
    prepare,
    work_of,
)
from bench_train_tables import (
    GEMM,
    NAMES,
    OURS,
    memory_table,
    speed_table,
    spread,
    threads_table,
    write,
)
from bench_train_worker import Work

SHAKESPEARE = "shakespeare"
CHOSEN = ("threads", "precision", "compile", "micro_batch_size")  # choices that are shown
Key = TypeVar("Key")


class Failed(Exception):  # noqa: N818  a peer that cannot run here is no error
    """A contender ended without an answer; the message names it and ends its log."""


class Contender:
    """A process that waits for orders. Failed when it ends instead of answering."""

    def __init__(self, work: Work, threads: int | None = None) -> None:
        self.name, self.folder = work.contender, Path(work.folder)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
        worker = Path(__file__).with_name("bench_train_worker.py")
        with (self.folder / "worker.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(worker), json.dumps(asdict(work))],
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

    def run(self, steps: int) -> float:
        """Tokens per second (of the GEMM: FLOP/s) of so many steps."""
        self._order(steps)
        return float(self._answer()["rate"])

    def finish(self) -> dict[str, Any]:
        """End the process; {"peak_bytes", "threads"} as they were at its end."""
        self._order(0)
        last = self._answer()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=60)
        self.kill()
        return last

    def kill(self) -> None:
        """End the process whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _order(self, steps: int) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer tells

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = (self.folder / "worker.log").read_text().strip().splitlines()
            ended = f"exit status {self._process.wait()}"
            raise Failed(f"{self.name}: {log[-1]} ({ended})" if log else f"{self.name}: {ended}")
        facts: dict[str, Any] = json.loads(line)
        return facts


@contextmanager
def running(contenders: dict[Key, Contender]) -> Iterator[None]:
    """Ends what is in `contenders` at the end of the block."""
    try:
        yield
    finally:
        for contender in contenders.values():
            contender.kill()


def take_turns(contenders: dict[Key, Contender], steps: int, rounds: int) -> dict[Key, list[float]]:
    """Rates of every contender by round."""
    rates: dict[Key, list[float]] = {key: [] for key in contenders}
    for number in range(rounds):
        for key, contender in contenders.items():
            rates[key].append(contender.run(steps))
        shown = ", ".join(f"{key} {values[-1]:,.4g}" for key, values in rates.items())
        note(f"round {number + 1} of {rounds}: {shown}")
    return rates


def check_weights(contenders: dict[Any, Contender]) -> int:
    """The number of weights, which is that of every model. SystemExit when one has another."""
    counts = {key: c.facts["weights"] for key, c in contenders.items() if c.facts["weights"]}
    if len(set(counts.values())) != 1:
        raise SystemExit(f"the models do not have the same number of weights: {counts}")
    return int(next(iter(counts.values())))


def peers_of(case: Case, given: argparse.Namespace) -> tuple[str, ...]:
    """Who is compared with ours: who was named, else those of the case."""
    return tuple(given.contenders or case.contenders)


def check_memory(case: Case, weights: int, contenders: int) -> None:
    """SystemExit where that many models, all in memory at once, would not fit."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text()) if info.exists() else None
    needed = contenders * case.process_bytes(weights)
    if found and needed > int(found[1]) * 1024:
        raise SystemExit(
            f"{case.name}: {contenders} more processes need about {needed / 2**30:.0f} GiB;"
            f" {int(found[1]) / 2**20:.0f} are free: choose fewer with --contender"
        )


def start_all(
    case: Case, prepared: Prepared, given: argparse.Namespace, contenders: dict[str, Contender]
) -> list[str]:
    """Start and warm up ours, the peers and the GEMM, one after the other, into `contenders`.

    Returns a line for each peer that is not there.
    """
    missing = []
    for name in (OURS, *peers_of(case, given), GEMM):
        if name.startswith("nanogpt") and given.nanogpt is None:
            missing.append(f"Not run: {name} (no --nanogpt CLONE)")
            continue
        try:
            contenders[name] = Contender(work_of(case, name, prepared, given.nanogpt))
            contenders[name].run(WARMUP_STEPS)
        except Failed as failed:
            if name in (OURS, GEMM):
                raise
            missing.append(f"Not run: {failed}")
            if contender := contenders.pop(name, None):
                contender.kill()
        note(f"{name} is ready" if name in contenders else missing[-1])
        if name == OURS:
            weights = int(contenders[name].facts["weights"])
            check_memory(case, weights, len(peers_of(case, given)))
    return missing


def bench_speed(case: Case, prepared: Prepared, given: argparse.Namespace) -> str:
    """Tokens per second of all contenders, by turns."""
    contenders: dict[str, Contender] = {}
    with running(contenders):
        missing = start_all(case, prepared, given, contenders)
        weights = check_weights(contenders)
        rates = take_turns(contenders, case.steps, given.rounds)
        choices = contenders[OURS].facts["choices"]
        peaks = {name: contender.finish()["peak_bytes"] for name, contender in contenders.items()}
    gemm = spread([rate / 1e9 for rate in rates[GEMM]]).show(".0f")
    made = speed_table(rates, peaks, prepared.flops_per_token, case.asked, case.asked_share)
    about = [
        f"{describe(case, prepared)}; {weights:,} weights in each model. Medians of {given.rounds}"
        f" rounds of {case.steps} step(s), with the lowest and the highest."
        f" GEMM peak {gemm} GFLOP/s; {prepared.flops_per_token:,} FLOPs a token.",
        f"Ours chose {', '.join(f'{key} {choices[key]}' for key in CHOSEN)}.",
        machine(),
        *missing,
    ]
    return made + "\n\n" + "\n".join(about)


def bench_memory(case: Case, prepared: Prepared, given: argparse.Namespace) -> str:
    """Peak memory of two steps of each contender, one after the other."""
    peaks: dict[str, int | None] = {}
    about = [f"{describe(case, prepared)}; two AdamW steps, VmHWM of the process. {machine()}"]
    weights = set()
    for name in (OURS, *peers_of(case, given)):
        if name.startswith("nanogpt") and given.nanogpt is None:
            about.append(f"Not run: {name} (no --nanogpt CLONE)")
            continue
        try:
            contender = Contender(work_of(case, name, prepared, given.nanogpt))
            with running({name: contender}):
                contender.run(2)
                weights.add(contender.facts["weights"])
                peaks[name] = contender.finish()["peak_bytes"]
        except Failed as failed:
            if name == OURS:
                raise
            about.append(f"Not run: {failed}")
        note(f"{name}: {peaks.get(name)} bytes")
    about.append(f"Weights in each: {', '.join(f'{count:,}' for count in weights)}")
    return memory_table(peaks, case.asked) + "\n\n" + "\n".join(about)


def bench_threads(case: Case, prepared: Prepared, given: argparse.Namespace) -> str:
    """Ours and the GEMM with one thread and with two, by turns."""
    contenders: dict[tuple[str, int], Contender] = {}
    with running(contenders):
        for key in [(name, threads) for name in (OURS, GEMM) for threads in (1, 2)]:
            contenders[key] = Contender(
                work_of(case, key[0], prepared, given.nanogpt), threads=key[1]
            )
            contenders[key].run(WARMUP_STEPS)
        rates = take_turns(contenders, case.steps, given.rounds)
        for (name, threads), contender in contenders.items():
            used = contender.finish()["threads"]
            if used != threads:
                raise SystemExit(f"{name}: {used} threads instead of {threads}")
    about = f"{describe(case, prepared)}; {given.rounds} rounds. {machine()}"
    return threads_table(rates, case.asked["threads"]) + "\n\n" + about


def machine() -> str:
    """What the figures were measured on, and when."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", info.read_text(), re.M) if info.exists() else []
    try:
        peer = f", transformers {version('transformers')}"
    except PackageNotFoundError:
        peer = ""
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores,"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}{peer}, {date.today()}."
    )


def note(line: str) -> None:
    """Say how it goes, beside the tables."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, metavar="CLONE", help="of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, metavar="FILE", help="tinyshakespeare.txt")
    parser.add_argument("--case", action="append", choices=[*CASES, SHAKESPEARE])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--runs", type=int, default=1, help="shakespeare: of each, by turns (1)")
    parser.add_argument(
        "--contender", dest="contenders", action="append", choices=[n for n in NAMES if n != OURS]
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into FILE")
    given = parser.parse_args()
    wanted = given.case or [*CASES, SHAKESPEARE]
    if SHAKESPEARE in wanted and (given.nanogpt is None or given.text is None):
        parser.error(f"the case {SHAKESPEARE} needs --nanogpt and --text")
    if given.nanogpt and not (given.nanogpt / "model.py").is_file():
        parser.error(f"{given.nanogpt}: no model.py, so no clone of nanoGPT")
    if min(given.rounds, given.runs) < 1:
        parser.error("--rounds and --runs are at least 1")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["GPT_CACHE"] = str(Path(directory) / "cache")
        try:
            run_cases(wanted, given, Path(directory))
        except Failed as failed:
            raise SystemExit(f"bench_train: {failed}") from None


def run_cases(wanted: list[str], given: argparse.Namespace, folder: Path) -> None:
    """Estimate, measure and print the wanted cases."""
    prepared = {n: prepare(CASES[n], given.text, folder / n) for n in wanted if n in CASES}
    seconds = {
        n: estimate_seconds(CASES[n], prepared[n], peers_of(CASES[n], given), given.rounds)
        for n in prepared
    }
    if SHAKESPEARE in wanted:
        seconds[SHAKESPEARE] = ESTIMATE_SECONDS * given.runs
    for name in wanted:
        note(f"{name}: about {seconds[name] / 60:.1f} minutes")
    for name in wanted:
        if name == SHAKESPEARE:
            made = shakespeare_table(given.nanogpt, given.text, given.runs, folder / name)
            block = f"{made}\n\n{machine()}"
        elif name == "memory":
            block = bench_memory(CASES[name], prepared[name], given)
        elif name == "threads":
            block = bench_threads(CASES[name], prepared[name], given)
        else:
            block = bench_speed(CASES[name], prepared[name], given)
        print(f"### {name}\n\n{block}\n", flush=True)
        if given.write:
            write(block, name, given.write)


if __name__ == "__main__":
    main()
