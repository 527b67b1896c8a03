import numpy as np

from gptcli.reports.curves import (
    Curve,
    best,
    by_time,
    by_tokens,
    curve,
    later,
    lines_of,
    smooth,
    thin,
    time_parts,
)


def _line(step: int, **values: object) -> dict[str, object]:
    return {"event": "train", "step": step, **values}


def test_a_step_logged_twice_counts_once() -> None:
    """Guards against a curve that runs back after a resume."""
    lines = lines_of([_line(1, loss=5.0), _line(2, loss=4.0), _line(2, loss=3.0)], "train")
    assert [line["loss"] for line in lines] == [5.0, 3.0]


def test_thinning_keeps_spikes_and_gaps() -> None:
    """Guards against losing the one diverged step by taking every n-th point."""
    y = np.ones(100_000)
    y[54_321] = 99.0
    y[20_000:30_000] = np.nan
    thinned = thin(Curve(np.arange(100_000.0), y), 2000)
    assert len(thinned) <= 2000
    assert np.nanmax(thinned.y) == 99.0
    assert np.isnan(thinned.y).sum() >= 99  # one for each stretch without a value
    assert (np.diff(thinned.x) > 0).all()


def test_short_curves_stay_whole() -> None:
    """Guards against thinning what is drawn completely anyway."""
    points = Curve(np.arange(2000.0), np.arange(2000.0))
    assert thin(points, 2000) is points


def test_smoothing_against_a_loop() -> None:
    """Guards the running sums: off by one, or NaN that spreads to the rest of the curve."""
    y = np.random.default_rng(0).normal(size=50)
    y[7] = np.nan
    smoothed = smooth(Curve(np.arange(50.0), y), 9).y
    for i in range(50):
        reach = min(4, i)
        assert np.isclose(smoothed[i], np.nanmean(y[i - reach : i + reach + 1]))


def test_evaluations_are_placed_on_the_training_clock() -> None:
    """Guards against drawing evaluations by their own duration."""
    train = [_line(10, seconds=5.0), _line(20, seconds=15.0)]
    evals = Curve(np.array([0.0, 10.0, 15.0, 20.0]), np.ones(4))
    assert by_time(evals, train).x.tolist() == [0.0, 5.0, 10.0, 15.0]
    assert len(by_time(evals, [_line(10)])) == 0


def test_values_by_tokens_and_of_the_later_part() -> None:
    """Guards against a token count that an evaluation or a damaged line puts out of order."""
    train = [_line(10, tokens=100), _line(30, tokens=None), _line(20, tokens=200)]
    evals = [
        {"event": "eval", "step": 0, "tokens": 0},
        {"event": "eval", "step": 20, "tokens": 200},
    ]
    values = Curve(np.array([0.0, 5.0, 20.0]), np.arange(3.0))
    shown = by_tokens(values, train, evals)
    assert shown.x.tolist() == [0.0, 50.0, 200.0]
    assert later(shown, 50).y.tolist() == [1.0, 2.0]
    assert len(by_tokens(values, [_line(10)])) == 0


def test_values_that_are_no_numbers_are_gaps() -> None:
    """Guards the quick way from lines to arrays: one damaged value makes no crash."""
    found = curve(
        [_line(1, loss="x"), _line(2, loss=None), _line(3, loss=1e400), _line(4, loss=2)], "loss"
    )
    assert np.isnan(found.y).tolist() == [True, True, True, False]


def test_best_ignores_what_is_not_finite() -> None:
    """Guards against NaN as the best score (K10: every comparison with it is false)."""
    lines = [{"step": 1, "loss": None}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 2.0}]
    assert best(lines) == {"step": 3, "loss": 2.0}
    assert best(lines[:2]) is None


def test_parts_of_the_time_add_up() -> None:
    """Guards against one missing value turning the whole split into NaN."""
    lines = [_line(1, data_wait_seconds=1.0, other_seconds=2.0), _line(2, data_wait_seconds=None)]
    parts = time_parts(lines)
    assert parts["data_wait_seconds"] == 1.0
    assert sum(parts.values()) == 3.0
    assert time_parts([_line(1)]) == {}


def test_missing_values_are_gaps() -> None:
    """Guards against a null loss drawn as zero."""
    points = curve([_line(1, loss=None), _line(2, loss=3.0), _line(3)], "loss")
    assert np.isnan(points.y).tolist() == [True, False, True]
