#!/usr/bin/env python3
"""Training measured against nanoGPT and transformers; one Markdown table a case.

    python scripts/bench_train.py --nanogpt CLONE --text FILE                  # all: half an hour
    python scripts/bench_train.py --nanogpt CLONE --case 13m --rounds 7        # minutes
    python scripts/bench_train.py --nanogpt CLONE --case 124m --write docs/measured.md

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
import os
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_contenders import Contender, Failed, machine, note, running, take_turns
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


def started(work: Work, threads: int | None = None) -> Contender:
    """The process of one contender."""
    script, folder = "bench_train_worker.py", Path(work.folder)
    return Contender(work.contender, script, asdict(work), folder, threads)


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
            contenders[name] = started(work_of(case, name, prepared, given.nanogpt))
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
        machine("transformers"),
        *missing,
    ]
    return made + "\n\n" + "\n".join(about)


def bench_memory(case: Case, prepared: Prepared, given: argparse.Namespace) -> str:
    """Peak memory of two steps of each contender, one after the other."""
    peaks: dict[str, int | None] = {}
    here = machine("transformers")
    about = [f"{describe(case, prepared)}; two AdamW steps, VmHWM of the process. {here}"]
    weights = set()
    for name in (OURS, *peers_of(case, given)):
        if name.startswith("nanogpt") and given.nanogpt is None:
            about.append(f"Not run: {name} (no --nanogpt CLONE)")
            continue
        try:
            contender = started(work_of(case, name, prepared, given.nanogpt))
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
            work = work_of(case, key[0], prepared, given.nanogpt)
            contenders[key] = started(work, threads=key[1])
            contenders[key].run(WARMUP_STEPS)
        rates = take_turns(contenders, case.steps, given.rounds)
        for (name, threads), contender in contenders.items():
            used = contender.finish()["threads"]
            if used != threads:
                raise SystemExit(f"{name}: {used} threads instead of {threads}")
    about = f"{describe(case, prepared)}; {given.rounds} rounds. {machine('transformers')}"
    return threads_table(rates, case.asked["threads"]) + "\n\n" + about


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
            block = f"{made}\n\n{machine('transformers')}"
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
