"""Confidence intervals of corpus scores, by the bootstrap over documents or rows."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Document indices drawn at once: 2^21 int64 indices and two float64 gathers stay under 64 MiB.
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
    same seed gives the same interval, however the draws are chunked.

    None where no interval exists: fewer than two documents, a total of zero, or a value that is not
    finite. ValueError when the two differ in length or `level` is not inside (0, 1).
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.asarray(denominators, dtype=np.float64)
    if top.ndim != 1 or top.shape != bottom.shape:
        raise ValueError(
            f"numerators {top.shape} and denominators {bottom.shape} must be equal, 1-D"
        )
    if not 0.0 < level < 1.0:
        raise ValueError(f"level {level} is not between 0 and 1")
    if len(top) < 2 or not np.isfinite([top.sum(), bottom.sum()]).all() or bottom.sum() == 0:
        return None
    ratios = _resampled_ratios(top, bottom, resamples, seed)
    ratios = ratios[np.isfinite(ratios)]  # a draw of empty documents only has no ratio
    if not len(ratios):
        return None
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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


def _resampled_ratios(
    top: NDArray[np.float64], bottom: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """(resamples,) ratios of sums, each over as many documents drawn with replacement."""
    rng = np.random.default_rng(seed)
    documents = len(top)
    rows = max(1, DRAWS_AT_ONCE // documents)
    ratios = np.empty(resamples)
    for start in range(0, resamples, rows):
        end = min(start + rows, resamples)
        drawn = rng.integers(documents, size=(end - start, documents))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios[start:end] = top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)
    return ratios
