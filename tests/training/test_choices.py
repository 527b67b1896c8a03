"""Automatic choices: pure functions of device and config, kept by a resume."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from gptcli.config.schema import Config
from gptcli.device import Device
from gptcli.errors import ResourceError
from gptcli.training.choices import Choices, choose, choose_again

CPU = Device("cpu", None, "a processor", 4, True)
GPU = Device("cuda", 1, "a graphics card", 8, True)
OLD_GPU = replace(GPU, bf16=False)


def config(**training: Any) -> Config:
    sizes = {"tokens_per_step": 4096, "precision": "fp32", **training}
    return Config.model_validate({"training": sizes, "model": {"block_size": 128}})


@pytest.mark.parametrize(
    ("device", "vocab_size", "rows"),
    [(CPU, 257, 32), (CPU, 2048, 32), (CPU, 5000, 8), (CPU, 50_257, 1), (GPU, 50_257, 32)],
)
def test_micro_batch(device: Device, vocab_size: int, rows: int) -> None:
    """Bug: the logits of one micro batch do not fit, or it does not divide the step."""
    assert choose(config(), device, vocab_size).micro_batch_size == rows
    assert choose(config(micro_batch_size=2), device, vocab_size).micro_batch_size == 2


def test_compile() -> None:
    """Bug: a short run on a CPU spends its time compiling."""
    assert not choose(config(), CPU, 257).compile
    assert choose(config(), GPU, 257).compile
    assert choose(config(compile="on"), CPU, 257).compile
    assert not choose(config(compile="off"), GPU, 257).compile


def test_precision() -> None:
    """Bug: bf16 is chosen where it does not exist, or silently replaced."""
    assert choose(config(precision="auto"), GPU, 257).precision == "bf16"
    assert choose(config(precision="auto"), OLD_GPU, 257).precision == "fp32"
    assert choose(config(precision="fp16"), OLD_GPU, 257).precision == "fp16"
    with pytest.raises(ResourceError, match="no bf16"):
        choose(config(precision="bf16"), OLD_GPU, 257)
    assert choose(config(precision="auto"), CPU, 257).precision in ("fp32", "bf16")


def test_resume_keeps_them(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a resume chooses anew, and the rest of the run computes otherwise than its beginning."""
    saved = choose(config(), CPU, 257).to_json()
    assert choose_again(saved, config(), CPU, 257).to_json() == saved
    slow = {**saved, "precision": "bf16", "micro_batch_size": 4}
    again = choose_again(slow, config(precision="auto"), CPU, 257)
    assert (again.precision, again.micro_batch_size) == ("bf16", 4)
    assert not caplog.records


def test_changed_machine_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a resume on other hardware claims to be bit-exact."""
    caplog.set_level(logging.WARNING, logger="gptcli")
    saved = choose(config(), CPU, 257).to_json()
    choose_again(saved, config(), replace(CPU, threads=2), 257)
    assert caplog.messages == ["not bit-exact with the run so far: threads 4 -> 2"]
    caplog.clear()
    moved = choose_again(saved, config(), GPU, 257)
    assert (moved.device, moved.compile) == ("cuda:1", True)
    assert "device cpu -> cuda:1" in caplog.messages[0]
    caplog.clear()
    changed = config(precision="bf16", micro_batch_size=8)
    again = choose_again({**saved, "torch": "1.0"}, changed, CPU, 257)
    assert again == Choices("cpu", 4, "bf16", False, 8, torch.__version__)
    (message,) = caplog.messages
    for reason in ("torch 1.0 ->", "precision fp32 -> bf16", "micro_batch_size 32 -> 8"):
        assert reason in message


def test_smaller_step_on_resume(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: the saved micro batch does not divide the new step."""
    saved = choose(config(), CPU, 257).to_json()
    again = choose_again(saved, config(tokens_per_step=2560), CPU, 257)
    assert again.micro_batch_size == 20
