import random

import numpy as np
import pytest

from gptcli.evaluation import statistics
from gptcli.evaluation.statistics import bootstrap_ratio_ci, bootstrap_ratio_cis


def _documents(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(50, 5000, size=n).astype(float)
    return sizes * rng.normal(1.8, 0.3, size=n), sizes


def test_agrees_with_a_loop_over_the_same_draws() -> None:
    """Guards against a vectorisation that pairs a numerator with another document's denominator."""
    bits, sizes = _documents(7)
    rng = np.random.default_rng(3)
    ratios = []
    for _ in range(200):
        top = bottom = 0.0
        for i in rng.integers(7, size=7):
            top += bits[i]
            bottom += sizes[i]
        ratios.append(top / bottom)
    interval = bootstrap_ratio_ci(bits, sizes, resamples=200, seed=3, level=0.9)
    assert interval == pytest.approx((np.quantile(ratios, 0.05), np.quantile(ratios, 0.95)))


def test_agrees_with_an_independent_bootstrap() -> None:
    """Guards against a wrong resampling scheme (size, replacement, mean of ratios)."""
    bits, sizes = _documents(40)
    pairs = list(zip(bits, sizes, strict=True))
    draw = random.Random(1)
    ratios = []
    for _ in range(4000):
        chosen = [pairs[draw.randrange(40)] for _ in range(40)]
        ratios.append(sum(b for b, _ in chosen) / sum(s for _, s in chosen))
    low, high = bootstrap_ratio_ci(bits, sizes, resamples=4000) or (0, 0)
    width = np.quantile(ratios, 0.975) - np.quantile(ratios, 0.025)
    assert abs(low - np.quantile(ratios, 0.025)) < 0.08 * width
    assert abs(high - np.quantile(ratios, 0.975)) < 0.08 * width


def test_chunks_change_memory_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an interval that depends on how the draws are cut for memory."""
    bits, sizes = _documents(33)
    whole = bootstrap_ratio_ci(bits, sizes, resamples=101)
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", 100)
    assert bootstrap_ratio_ci(bits, sizes, resamples=101) == pytest.approx(whole, rel=1e-14)
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", 1)
    assert bootstrap_ratio_ci(bits, sizes, resamples=101) == pytest.approx(whole, rel=1e-14)


def test_several_ratios_are_each_as_alone() -> None:
    """Guards against ratios that share draws but get each other's sums, and against one without an
    interval that takes the others theirs."""
    bits, sizes = _documents(20)
    tops = np.stack([bits, np.full(20, np.inf), sizes, bits * 0])
    bottoms = np.stack([sizes, sizes, sizes + 1, sizes * 0])
    found = bootstrap_ratio_cis(tops, bottoms, resamples=50)
    assert found[0] == pytest.approx(bootstrap_ratio_ci(bits, sizes, resamples=50))
    assert found[2] == pytest.approx(bootstrap_ratio_ci(sizes, sizes + 1, resamples=50))
    assert (found[1], found[3]) == (None, None)


def test_covers_the_true_ratio() -> None:
    """Guards against intervals far too narrow or wide: about 95 of 100 must hold the truth."""
    covered = 0
    for trial in range(100):
        bits, sizes = _documents(60, seed=trial)
        low, high = bootstrap_ratio_ci(bits, sizes, resamples=400, seed=trial) or (0, 0)
        covered += low <= 1.8 <= high
    assert 85 <= covered <= 100


def test_no_interval_without_two_documents_or_a_ratio() -> None:
    """Guards against a zero-width interval, or NaN, being shown as certainty."""
    assert bootstrap_ratio_ci([], []) is None
    assert bootstrap_ratio_ci([10.0], [5.0]) is None
    assert bootstrap_ratio_ci([1.0, 2.0], [0.0, 0.0]) is None
    assert bootstrap_ratio_ci([float("nan"), 2.0], [1.0, 1.0]) is None


def test_empty_documents_do_not_spoil_the_interval() -> None:
    """Guards against 0/0 of a draw of empty documents turning the whole interval into NaN."""
    low, high = bootstrap_ratio_ci([0.0, 6.0], [0.0, 3.0]) or (0, 0)
    assert (low, high) == (2.0, 2.0)


def test_identical_documents_have_no_spread() -> None:
    """Guards against noise where there is nothing to be uncertain about."""
    assert bootstrap_ratio_ci([2.0] * 9, [4.0] * 9) == (0.5, 0.5)


def test_refuses_wrong_arguments() -> None:
    """Guards against broadcasting lists of different lengths into a plausible number."""
    with pytest.raises(ValueError, match="equal"):
        bootstrap_ratio_ci([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="level"):
        bootstrap_ratio_ci([1.0, 2.0], [1.0, 1.0], level=95)
