"""Learning-rate schedules against tables, and progress through a run's limits."""

import pytest

from gptcli.config.schema import ScheduleConfig, TrainingConfig
from gptcli.training.schedule import is_decaying, learning_rate, learning_rate_ratio
from gptcli.training.state import TrainState, expected_steps, progress


def table(steps: int, **keys: object) -> list[float]:
    """Ratios of the updates of a run of `steps`, and of the state behind the last one."""
    schedule = ScheduleConfig.model_validate({"warmup_steps": 0, **keys})
    return [learning_rate_ratio(step, step / steps, schedule) for step in range(steps + 1)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"kind": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"kind": "linear"}, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
        ({"kind": "linear", "min_lr_ratio": 0.5}, [1 - k / 16 for k in range(9)]),
        (
            {"kind": "cosine"},
            [1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060, 0],
        ),
        ({"kind": "wsd", "decay_ratio": 0.5}, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        ({"kind": "wsd", "decay_ratio": 0.25}, [1, 1, 1, 1, 1, 1, 1, 0.5, 0]),
        ({"kind": "wsd", "decay_ratio": 0.0}, [1] * 9),
        ({"kind": "wsd", "decay_ratio": 1.0, "min_lr_ratio": 0.2}, [1 - 0.1 * k for k in range(9)]),
        (
            {"kind": "linear", "warmup_steps": 4},  # the warmup is a lid on the decay
            [0.25, 0.5, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0],
        ),
        ({"kind": "wsd", "warmup_steps": 2}, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        ({"kind": "constant", "warmup_steps": 3}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_tables(keys: dict[str, object], expected: list[float]) -> None:
    """Bug: the first update has rate 0, the decay begins or ends too late, or misses its floor."""
    assert table(8, **keys) == pytest.approx(expected, abs=1e-6)


def test_peak_and_limits() -> None:
    """Bug: a rate above the peak, or one that goes wrong where time overshoots the end."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=0, min_lr_ratio=0.1)
    assert learning_rate(0, 0.0, schedule, 0.02) == 0.02
    assert learning_rate(9, 1.0, schedule, 0.02) == pytest.approx(0.002)
    assert learning_rate(9, 1.7, schedule, 0.02) == pytest.approx(0.002)


def test_is_decaying() -> None:
    """Bug: the checkpoint that a longer run goes on from already belongs to the decay."""
    wsd = ScheduleConfig(kind="wsd", decay_ratio=0.25)
    assert [is_decaying(k / 8, wsd) for k in range(9)] == [False] * 7 + [True] * 2
    for kind in ("linear", "cosine", "constant"):
        assert not is_decaying(0.99, ScheduleConfig(kind=kind))  # type: ignore[arg-type]


def test_progress() -> None:
    """Bug: the nearest limit does not win, or progress leaves [0, 1]."""
    state = TrainState(step=30, tokens=3000, epochs=0.5, elapsed_seconds=60.0)
    assert progress(state, TrainingConfig(max_steps=100)) == 0.3
    assert progress(state, TrainingConfig(max_tokens=4000)) == 0.75
    assert progress(state, TrainingConfig(max_epochs=2.0)) == 0.25
    assert progress(state, TrainingConfig(max_time="5m")) == 60 / 299  # one second for the report
    every = TrainingConfig(max_steps=100, max_tokens=4000, max_epochs=2.0, max_time="5m")
    assert progress(state, every) == 0.75
    assert progress(state, TrainingConfig(max_tokens=10)) == 1.0
    assert progress(TrainState(), every) == 0.0


def test_expected_steps() -> None:
    """Bug: the display promises 100 steps to a run that time ends after 40."""
    state = TrainState(step=30, tokens=3000, elapsed_seconds=60.0)
    assert expected_steps(state, TrainingConfig(max_steps=100)) == 100
    assert expected_steps(state, TrainingConfig(max_steps=100, max_tokens=4000)) == 40
    assert expected_steps(TrainState(), TrainingConfig(max_tokens=4000)) is None
    assert expected_steps(TrainState(), TrainingConfig(max_steps=7)) == 7
