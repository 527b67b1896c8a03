"""What every fuzz case is held to: an end within seconds, no traceback, little memory.

Counts are printed at the end of the session (see conftest.py); GPT_FUZZ_CASES sets how many cases
each target gets, chosen at random then; without it a few, the same ones every time.
"""

import faulthandler
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

Gpt = Callable[..., tuple[int, str, str]]

CASES = int(os.environ.get("GPT_FUZZ_CASES", "0"))
_FEW = 40
_MOST_SECONDS = 20  # a case that takes longer hangs
_IN_C_SECONDS = 60  # where no signal handler is run: the process ends, with its traceback
_MOST_BYTES = 2 * 2**30  # of address space that a case may ask for, on top of what there was
_MOST_GROWTH_BYTES = 400 * 2**20  # of the largest memory in use, by one case


class HangError(BaseException):
    """A case that did not end; no `except Exception` keeps it."""


@dataclass
class Count:
    """What the cases of a target came to."""

    cases: int = 0
    slowest: float = 0.0
    growth: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)


STDERR = os.dup(2)  # as it is outside of pytest's capture: see conftest.py
COUNTS: dict[str, Count] = {}


def fuzzed(test: Callable[..., None], few: int = _FEW) -> Callable[..., None]:
    """Hypothesis's settings for a target; in an ordinary run of the tests it gets `few` cases."""
    return hypothesis.settings(
        max_examples=CASES or few,
        derandomize=not CASES,
        database=None,
        deadline=None,  # `case` has one of its own, that ends what hangs
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        phases=[Phase.explicit, Phase.generate],  # to make a case smaller takes more than to see it
    )(test)


@contextmanager
def case(target: str) -> Iterator[None]:
    """One case of a target: HangError, MemoryError or AssertionError where it is not well."""
    count = COUNTS.setdefault(target, Count())
    before = _largest_bytes()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _MOST_BYTES, limits[1]))
    handler = signal.signal(signal.SIGALRM, _hangs)
    signal.setitimer(signal.ITIMER_REAL, _MOST_SECONDS)
    faulthandler.dump_traceback_later(_IN_C_SECONDS, exit=True, file=STDERR)
    began = time.perf_counter()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    count.cases += 1
    count.slowest = max(count.slowest, time.perf_counter() - began)
    grown = _largest_bytes() - before
    count.growth += grown
    assert grown < _MOST_GROWTH_BYTES, f"{target}: a case took {grown:,} bytes"


def came_to(target: str, outcome: str) -> None:
    """Count what became of a case, where that is not the same for all."""
    COUNTS[target].outcomes[outcome] += 1


def well(gpt: Gpt, arguments: list[str], codes: set[int]) -> tuple[int, str, str]:
    """Run `gpt`: it must end with one of the exit codes, and say what is wrong in our form."""
    code, out, err = gpt(*arguments)
    said = f"{arguments}: exit code {code}\n{err}"
    assert code in codes, said
    assert "Traceback" not in err, said
    assert "internal" not in err, said
    assert "out of memory" not in err, said  # the limit of `case`: it asked for too much
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert bool(errors) == (code != 0), said
    return code, out, err


def _hangs(number: int, frame: FrameType | None) -> Any:
    raise HangError(f"still there after {_MOST_SECONDS} s")


def _largest_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
