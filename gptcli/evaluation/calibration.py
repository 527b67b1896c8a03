"""Calibration: whether a model's confidence in its likeliest token is the share that is right."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15  # as Guo et al. 2017 have them


def calibration(
    confidence: NDArray[np.float32], correct: NDArray[np.bool_], bins: int = BINS
) -> dict[str, Any]:
    """Expected calibration error and reliability curve of the likeliest token (Guo et al. 2017,
    "On Calibration of Modern Neural Networks", equation 3).

    Both arguments are (tokens,): the probability of the likeliest token, and whether it was the
    right one. Bins are of equal width, (low, high]; the error is the mean over tokens of the
    distance between a bin's mean confidence and its share of right tokens, in [0, 1]. No interval
    is given: resampling can only add to a mean of distances, so a bootstrap's is off upwards.
    Returns {"expected_calibration_error", "confidence", "accuracy", "bins": [{"low", "high",
    "tokens", "confidence", "accuracy"}]}, empty bins left out. ValueError without tokens.
    """
    if not len(confidence):
        raise ValueError("no token to judge the calibration by")
    edges = np.linspace(0.0, 1.0, bins + 1)
    # Rounding may put a probability a little above 1.
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    sure = np.bincount(place, weights=confidence, minlength=bins)
    right = np.bincount(place, weights=correct, minlength=bins)
    found = [
        {
            "low": float(edges[k]),
            "high": float(edges[k + 1]),
            "tokens": int(counts[k]),
            "confidence": float(sure[k] / counts[k]),
            "accuracy": float(right[k] / counts[k]),
        }
        for k in np.flatnonzero(counts)
    ]
    return {
        "expected_calibration_error": float(np.abs(sure - right).sum() / counts.sum()),
        "confidence": float(sure.sum() / counts.sum()),
        "accuracy": float(right.sum() / counts.sum()),
        "bins": found,
    }
