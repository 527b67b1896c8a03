"""Runs every fuzz target of tests/fuzz with many random cases, and prints how many ran.

    python scripts/fuzz.py [--cases 5000] [--target configs ...] [--jobs 1]

Exit code 1 if a case ended in a traceback, hung, or took memory without bound; the case is shown.
So does a target that ran fewer cases than asked for, or that did not end.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGETS = sorted(
    path.stem.removeprefix("test_fuzz_")
    for path in (ROOT / "tests" / "fuzz").glob("test_fuzz_*.py")
)
_START_SECONDS = 300  # the imports and what the target trains first, on a busy machine
_CASE_SECONDS = 2.0  # on average


def fuzz(target: str, cases: int, seconds: float | None = None) -> tuple[bool, str]:
    """Whether all went well, and what is to be said: the counts, or the case that did not."""
    limit = seconds or _START_SECONDS + _CASE_SECONDS * cases
    command = [sys.executable, "-m", "pytest", f"tests/fuzz/test_fuzz_{target}.py"]
    command += ["-q", "-p", "no:logging", "-p", "no:xdist", "--show-capture=no", "--tb=short"]
    environment = {**os.environ, "GPT_FUZZ_CASES": str(cases)}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return False, f"fuzz {target}: still there after {limit:.0f} s, and killed"
    counts = [line for line in done.stdout.splitlines() if line.startswith("fuzz ")]
    if done.returncode != 0 or not counts:
        return False, done.stdout + done.stderr
    ran = sum(map(cases_in, counts))
    if ran < cases:
        counts.append(f"fuzz {target}: only {ran:,} of {cases:,} cases ran")
    return ran >= cases, "\n".join(counts)


def cases_in(line: str) -> int:
    """How many cases a line of counts says that there were."""
    found = re.match(r"fuzz [\w ]+: ([\d,]+) cases", line)
    return int(found[1].replace(",", "")) if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz gpt.")
    parser.add_argument("--cases", type=int, default=5000, help="for each target")
    parser.add_argument("--target", choices=TARGETS, action="append", help="[all]")
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time")
    given = parser.parse_args()
    began, wrong = time.monotonic(), 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for well, text in pool.map(lambda t: fuzz(t, given.cases), given.target or TARGETS):
            print(text, flush=True)
            wrong += not well
    print(f"{time.monotonic() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
