"""Which of several ways to compute the same is the fastest on this machine."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gptcli import portable
from gptcli.device import MUST_WIN_BY

# Context switches that were not asked for. Where another process wants the same core there are
# 100 or more in a second, one for each time slice.
_MOST_SWITCHES_PER_SECOND = 50
_MOST_SECONDS = 0.5  # though every contestant gets one turn


@dataclass(frozen=True)
class Race:
    """The least seconds of each contestant by its name, and whose they are to be.

    Where others used the processor at the same time it is not `fair`: the winner is the default,
    and the figures are to be forgotten.
    """

    seconds: dict[str, float]
    winner: str
    fair: bool


def race(contestants: Mapping[str, Callable[[], object]], default: str, rounds: int = 3) -> Race:
    """Let the contestants, which compute on the CPU, take turns.

    One beats the default only where it takes 20 % less of both the clock's and the processor's
    time. Calls during which others had the processor do not count; the race ends after `rounds`
    that count of each, or twice as many in all, or half a second. There are no untimed calls before
    the timed ones: what one has read of its weights, the next is to push out of the caches, as the
    other layers of a model would.
    """
    clock, processor = (dict.fromkeys(contestants, math.inf) for _ in range(2))
    counted = dict.fromkeys(contestants, 0)
    ends = time.perf_counter() + _MOST_SECONDS
    for _ in range(2 * rounds):
        for name, work in contestants.items():
            switches, used, began = _switches(), time.process_time(), time.perf_counter()
            work()
            seconds = time.perf_counter() - began
            if _switches() - switches <= 1 + _MOST_SWITCHES_PER_SECOND * seconds:
                counted[name] += 1
                clock[name] = min(clock[name], seconds)
                processor[name] = min(processor[name], time.process_time() - used)
        if min(counted.values()) >= rounds or time.perf_counter() > ends:
            break
    best = min(clock, key=lambda name: clock[name])
    won = all(t[best] * MUST_WIN_BY < t[default] for t in (clock, processor))
    fair = min(counted.values()) > 0
    seconds_of = {name: float(f"{seconds:.4g}") for name, seconds in clock.items()}
    return Race(seconds_of, best if won and fair else default, fair)


def _switches() -> int:
    """How often this process has lost a processor before it wanted to."""
    return portable.preemptions()
