"""Runs every fuzz target of tests/fuzz with many random cases, and prints how many ran.

    python scripts/fuzz.py [--cases 5000] [--target configs ...] [--jobs 1]

Exit code 1 if a case ended in a traceback, hung, or took memory without bound; the case is shown.
"""

import argparse
import os
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


def fuzz(target: str, cases: int) -> tuple[bool, str]:
    """Whether all went well, and what is to be said: the counts, or the case that did not."""
    command = [sys.executable, "-m", "pytest", f"tests/fuzz/test_fuzz_{target}.py"]
    command += ["-q", "-p", "no:logging", "-p", "no:xdist", "--show-capture=no", "--tb=short"]
    environment = {**os.environ, "GPT_FUZZ_CASES": str(cases)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    counts = [line for line in done.stdout.splitlines() if line.startswith("fuzz ")]
    well = done.returncode == 0 and bool(counts)
    return well, "\n".join(counts) if well else done.stdout + done.stderr


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
