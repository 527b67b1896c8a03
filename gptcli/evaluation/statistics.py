"""Confidence intervals of corpus scores, by the bootstrap over documents or rows."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Documents drawn at once: 2^21 indices, counts of them and the counts as float64 are 48 MiB.
DRAWS_AT_ONCE = 2**21


def bootstrap_ratio_ci(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of `sum(numerators) / sum(denominators)` over documents.

    Both arguments are (documents,): for bits per byte, the nats / ln 2 and the UTF-8 bytes of each
    document. Documents are drawn with replacement, a numerator always with its denominator (Efron
    and Tibshirani 1993, chapter 13; ratio of sums, so long documents count by their length). The
    same seed gives the same interval, up to rounding however the draws are chunked.

    None where no interval exists: fewer than two documents, a total of zero, or a value that is not
    finite. ValueError when the two differ in length or `level` is not inside (0, 1).
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.asarray(denominators, dtype=np.float64)
    if top.ndim != 1 or top.shape != bottom.shape:
        raise ValueError(
            f"numerators {top.shape} and denominators {bottom.shape} must be equal, 1-D"
        )
    return bootstrap_ratio_cis(
        top[None], bottom[None], resamples=resamples, seed=seed, level=level
    )[0]


def bootstrap_ratio_cis(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.float64],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[tuple[float, float] | None]:
    """The interval of each of K ratios, as `bootstrap_ratio_ci` gives it, from the same draws of
    documents; both arguments are (K, documents)."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level {level} is not between 0 and 1")
    known = np.isfinite(numerators.sum(1)) & np.isfinite(denominators.sum(1))
    known &= denominators.sum(1) != 0
    if numerators.shape[1] < 2:
        known[:] = False
    found: list[tuple[float, float] | None] = [None] * len(known)
    places = np.flatnonzero(known)
    if not len(places):
        return found
    ratios = _resampled_ratios(numerators[places], denominators[places], resamples, seed)
    for place, drawn in zip(places, ratios, strict=True):
        drawn = drawn[np.isfinite(drawn)]  # a draw of empty documents only has no ratio
        if len(drawn):
            low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
            found[place] = float(low), float(high)
    return found


def bootstrap_ci(
    rows: int, score: Callable[[NDArray[np.int64]], float], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval (95 %) of a score that is no ratio of sums.

    `score` gets the numbers (rows,) of the rows drawn, with replacement. None below two rows.
    """
    if rows < 2:
        return None
    rng = np.random.default_rng(seed)
    scores = [score(rng.integers(rows, size=rows)) for _ in range(resamples)]
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


def share_interval(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share by the score method (Wilson 1927), which unlike the bootstrap says
    something where there are no hits at all. ValueError without trials."""
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    z = 1.959964  # the normal distribution's 97.5 % quantile
    centre = (hits + z * z / 2) / (trials + z * z)
    spread = z / (trials + z * z) * math.sqrt(hits * (trials - hits) / trials + z * z / 4)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def _resampled_ratios(
    top: NDArray[np.float64], bottom: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """(K, resamples) ratios of sums, each over as many documents drawn with replacement."""
    rng = np.random.default_rng(seed)
    ratios_count, documents = top.shape
    sums = np.concatenate([top, bottom])  # (2 K, documents)
    rows = max(1, DRAWS_AT_ONCE // documents)
    ratios = np.empty((ratios_count, resamples))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(documents, size=(count, documents))
        drawn += np.arange(count)[:, None] * documents
        # How often each draw has each document: the sums are then one matrix product.
        times = np.bincount(drawn.ravel(), minlength=count * documents).astype(np.float64)
        found = sums @ times.reshape(count, documents).T
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios[:, start : start + count] = found[:ratios_count] / found[ratios_count:]
    return ratios
