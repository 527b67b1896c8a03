"""The seconds of a whole run, from those of its parts."""

from dataclasses import replace
from typing import Any

import pytest

from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config, SamplesConfig, ScheduleConfig
from gptcli.config.units import parse_seconds
from gptcli.device import resolve_device
from gptcli.model.gpt import GPT
from gptcli.training.duration import Paces, _generated_token_seconds, duration

PACES = Paces(
    source="probe",
    step_seconds=1.0,
    evaluation_seconds=10.0,
    sampling_seconds=3.0,
    saving_seconds=100.0,
    starting_seconds=7.0,
)


def config(**training: Any) -> Config:
    sizes = {"tokens_per_step": 1024, "eval_every": 30, "save_every": 45, **training}
    return Config.model_validate(
        {"training": sizes, "schedule": {"kind": "constant", "warmup_steps": 0}}
    )


@pytest.mark.parametrize("steps", [1, 29, 30, 90, 100, 180])
def test_counts(steps: int) -> None:
    """Bug: the first or last evaluation or checkpoint is not counted, or one counts twice."""
    found = duration(config(max_steps=steps), PACES, None)
    assert found is not None
    evaluated = [n for n in range(steps + 1) if n % 30 == 0 or n == steps]
    saved = [n for n in range(steps + 1) if n in evaluated or n % 45 == 0]
    assert found.training_seconds == steps
    assert found.evaluation_seconds == 10 * len(evaluated)
    assert found.sampling_seconds == 3 * len(evaluated)
    assert found.saving_seconds == 100 * len(saved)
    assert found.total_seconds == 7 + steps + 13 * len(evaluated) + 100 * len(saved)


def test_limits() -> None:
    """Bug: not the first of the limits ends the planned run, or one that is unknown does."""

    def steps(epoch_tokens: int | None = None, **limits: Any) -> int | None:
        found = duration(config(**limits), PACES, epoch_tokens)
        return None if found is None else found.steps

    assert steps(max_tokens=10 * 1024 + 1) == 11
    assert steps(max_tokens=2**20, max_steps=7) == 7
    assert steps(max_epochs=2.0, epoch_tokens=512 * 1024) == 1024
    assert steps(max_epochs=2.0) is None
    assert steps(max_epochs=2.0, max_steps=9) == 9
    assert steps() is None


@pytest.mark.parametrize("limit", ["1000s", "10h"])
@pytest.mark.parametrize("saving", [1.0, 100.0])
def test_max_time(limit: str, saving: float) -> None:
    """Bug: a run limited by time is planned to go on after it, or to end long before it."""
    paces = replace(PACES, saving_seconds=saving)
    found = duration(config(max_time=limit), paces, None)
    assert found is not None
    assert found.total_seconds == pytest.approx(parse_seconds(limit), rel=0.02)


def test_looking_takes_a_tenth_of_a_limited_time() -> None:
    """Bug: where evaluations are slow, few steps are planned, though the run leaves them out."""
    found = duration(config(max_time="10h"), replace(PACES, evaluation_seconds=1000.0), None)
    assert found is not None
    assert found.training_seconds == pytest.approx(0.9 * 36000, rel=0.1)


def test_the_checkpoint_before_the_decay_counts() -> None:
    """Bug: the schedule that saves once more is planned without it."""
    settings = config(max_steps=90)
    decaying = settings.model_copy(update={"schedule": ScheduleConfig(kind="wsd")})
    plain, more = duration(settings, PACES, None), duration(decaying, PACES, None)
    assert plain is not None
    assert more is not None
    assert more.saving_seconds == plain.saving_seconds + PACES.saving_seconds
    short = duration(config(max_time="10h", max_steps=5), PACES, None)
    assert short is not None
    assert short.steps == 5


def test_more_samples_than_go_at_once() -> None:
    """Bug: a plan with a million samples at each evaluation takes them all into memory at once,
    which no run does."""
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32)
    device = resolve_device("cpu")

    def seconds(samples: int) -> float:
        asked = config(max_steps=1).model_copy(update={"samples": SamplesConfig(n=samples)})
        return _generated_token_seconds(GPT(shape, 257), asked, device)

    assert seconds(64 * 10**7) > 10**5 * seconds(64)
