"""Curves out of metrics lines: numbers only, no drawing."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.reports.text import finite

Array = NDArray[np.float64]

TIME_PARTS = (
    "data_wait_seconds",
    "forward_backward_seconds",
    "optimizer_seconds",
    "other_seconds",
)


@dataclass(frozen=True)
class Curve:
    """Points (N,) in order of x; y is NaN where the value was not finite."""

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.x)


def lines_of(metrics: Iterable[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """Lines of one event in order of step; of a step logged twice (a resumed run), the later."""
    found = [line for line in metrics if line.get("event") == event]
    by_step = {line["step"]: line for line in found if _is_step(line.get("step"))}
    return [by_step[step] for step in sorted(by_step)]


def curve(lines: list[dict[str, Any]], key: str) -> Curve:
    """`key` by step."""
    return Curve(_values(lines, "step"), _values(lines, key))


def by_time(by_step: Curve, train: list[dict[str, Any]]) -> Curve:
    """The same values by elapsed training seconds.

    Evaluations are placed by their step on the clock of the train lines, whose `seconds` count
    from the start of the run and go on after a resume.
    """
    clock = curve(train, "seconds")
    known = np.isfinite(clock.y)
    if not known.any():
        return Curve(np.empty(0), np.empty(0))
    steps = np.concatenate([[0.0], clock.x[known]])
    seconds = np.concatenate([[0.0], np.maximum.accumulate(clock.y[known])])
    return Curve(np.interp(by_step.x, steps, seconds), by_step.y)


def by_tokens(by_step: Curve, *lines: list[dict[str, Any]]) -> Curve:
    """The same values by tokens seen, as `lines` (of train and eval) tell them by step."""
    steps, tokens = (_values([*chain(*lines)], key) for key in ("step", "tokens"))
    known = np.flatnonzero(np.isfinite(tokens))
    if not len(known):
        return Curve(np.empty(0), np.empty(0))
    known = known[np.argsort(steps[known], kind="stable")]
    seen = np.maximum.accumulate(tokens[known])
    return Curve(np.interp(by_step.x, steps[known], seen), by_step.y)


def later(whole: Curve, start: float) -> Curve:
    """The points from x = `start` on."""
    return Curve(whole.x[whole.x >= start], whole.y[whole.x >= start])


def smooth(raw: Curve, window: int) -> Curve:
    """Centred moving mean over `window` points that leaves out NaN.

    The window narrows at the start, where losses fall steeply, and is cut off at the end.
    """
    valid = np.isfinite(raw.y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(valid, raw.y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(valid)])
    here = np.arange(len(raw))
    reach = np.minimum(window // 2, here)
    low, high = here - reach, np.minimum(here + reach + 1, len(raw))
    with np.errstate(invalid="ignore"):
        return Curve(raw.x, (sums[high] - sums[low]) / (counts[high] - counts[low]))


def thin(full: Curve, limit: int) -> Curve:
    """At most `limit` points: the lowest and highest of each stretch, so that spikes survive."""
    if len(full) <= limit:
        return full
    edges = np.linspace(0, len(full), limit // 2 + 1).astype(int)
    keep: set[int] = set()
    for start, end in pairwise(edges):
        stretch = full.y[start:end]
        valid = np.flatnonzero(np.isfinite(stretch))
        if len(valid):
            keep |= {
                int(start + valid[stretch[valid].argmin()]),
                int(start + valid[stretch[valid].argmax()]),
            }
        else:
            keep.add(int(start))  # a stretch without a finite value stays a gap
    chosen = sorted(keep)
    return Curve(full.x[chosen], full.y[chosen])


def best(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The eval line with the lowest finite loss, the earliest of equals; None without one."""
    scored = [line for line in lines if finite(line.get("loss")) is not None]
    return min(scored, key=lambda line: float(line["loss"]), default=None)


def time_parts(train: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the whole run by part; every train line holds those since the line before it."""
    sums = {key: float(np.nansum(_values(train, key))) for key in TIME_PARTS}
    return sums if sum(sums.values()) > 0 else {}


def _is_step(value: Any) -> bool:
    return type(value) is int or finite(value) is not None  # quick where there are many


def _values(lines: list[dict[str, Any]], key: str) -> Array:
    found = [line.get(key) for line in lines]
    try:
        values = np.array(found, dtype=np.float64)  # None is NaN; a hundred times as fast
    except (TypeError, ValueError, OverflowError):  # a damaged file
        numbers = map(finite, found)
        values = np.array([np.nan if n is None else n for n in numbers], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values
