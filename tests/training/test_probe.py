"""Measuring a training step."""

import copy
from typing import Any

import pytest
import torch

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.device import Device
from gptcli.model.gpt import GPT, initialise
from gptcli.training.probe import Speed, median_seconds, probe_speed, step_seconds

CPU = Device("cpu", None, "a processor", 1, True)


def config(**model: Any) -> Config:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, **model}
    return Config.model_validate({"model": sizes, "training": {"tokens_per_step": 16 * 12}})


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_leaves_everything_as_it_was(kind: str) -> None:
    """Bug: a run that was measured first is another run: weights, random state, mode, gradients."""
    settings = Config.model_validate(
        {**config(dropout=0.5).model_dump(), "optimizer": {"kind": kind}}
    )
    model = GPT(settings.model, 100)
    initialise(model, torch.Generator().manual_seed(0))
    model.eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    speed = probe_speed(model, settings, CPU, "fp32", 4, seconds=0.05)
    assert speed.rows == 4
    assert speed.forward_backward_seconds > 0
    assert speed.optimizer_seconds > 0
    after = model.state_dict()
    # As bytes: a zero must keep its sign.
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_step_is_its_micro_batches_and_one_update() -> None:
    """Bug: the update counts once a micro batch."""
    assert step_seconds(Speed(4, 2.0, 0.5), config()) == 3 * 2.0 + 0.5
    assert step_seconds(Speed(12, 2.0, 0.5), config()) == 2.5


def test_a_stop_request_ends_it() -> None:
    """Bug: Ctrl-C waits for the probe."""
    stop.request(2)
    with pytest.raises(stop.Stopped):
        median_seconds(lambda: None, CPU, 1e9, least=1)
