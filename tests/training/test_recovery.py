"""The loss scale of fp16: grows after many finite steps, falls by an overflow; no other precision
has one."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from gptcli.config.schema import Config
from gptcli.training import recovery
from gptcli.training.choices import Choices
from gptcli.training.readings import Reading
from gptcli.training.recovery import settle
from gptcli.training.stability import Limits
from gptcli.training.state import TrainState


def session(precision: str) -> Any:
    """What `settle` needs of a run."""
    return SimpleNamespace(
        config=Config(),
        choices=Choices("cuda:0", 1, precision, False, 1, "2.0"),
        state=TrainState(loss_scale=4.0),
        metrics=SimpleNamespace(write=lambda record: None),
    )


def reading(step: int, grad_norm: float = 1.0) -> Reading:
    return Reading(step, 1.0, Limits(), 3.0, grad_norm, math.isfinite(grad_norm), None)


def test_the_loss_scale_grows_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a scale that never grows again, or that falls for other reasons than an overflow."""
    monkeypatch.setattr(recovery, "_STEPS_TO_GROW", 3)
    run, scales = session("fp16"), []
    for step, norm in enumerate([1.0, 1.0, 1.0, 1.0, math.inf, 1.0, 1.0, 1.0, math.inf, math.inf]):
        settle(run, reading(step, norm))
        scales.append(run.state.loss_scale)
    assert scales == [4.0, 4.0, 8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 4.0, 2.0]
    assert (run.state.bad_steps, run.state.skipped_steps) == (0, 0)  # no fault of the run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_have_none(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Bug: after 2 million steps in bf16 a resume in fp16 begins with a scale of 2**1000."""
    monkeypatch.setattr(recovery, "_STEPS_TO_GROW", 3)
    run = session(precision)
    for step in range(9):
        settle(run, reading(step))
    settle(run, reading(9, math.inf))
    assert (run.state.loss_scale, run.state.good_steps) == (4.0, 0)
    assert run.state.skipped_steps == 1
