"""Automatic choices: pure functions of device and config, kept by a resume."""

import logging
from dataclasses import replace
from typing import Any

import pytest

from gptcli.config.schema import Config
from gptcli.device import Device
from gptcli.errors import ResourceError
from gptcli.training.choices import (
    choose,
    choose_again,
    largest_divisor,
    with_less_memory,
)
from gptcli.training.footprint import footprint

CPU = Device("cpu", None, "a processor", 4, True)
GPU = Device("cuda", 1, "a graphics card", 8, True)
OLD_GPU = replace(GPU, bf16=False)


def config(**training: Any) -> Config:
    sizes = {"tokens_per_step": 4096, "precision": "fp32", **training}
    return Config.model_validate({"training": sizes, "model": {"block_size": 128}})


@pytest.mark.parametrize(
    ("device", "rows"), [(CPU, 16), (GPU, 32), (replace(GPU, kind="mps", index=None), 32)]
)
def test_micro_batch(device: Device, rows: int) -> None:
    """Bug: a micro batch that does not divide the step, or is none of the size asked for."""
    assert choose(config(), device, 257).micro_batch_size == rows
    assert choose(config(tokens_per_step=128 * 21), CPU, 257).micro_batch_size == 7
    assert choose(config(micro_batch_size=2), device, 257).micro_batch_size == 2
    long = config(micro_batch_size="auto")
    long = long.model_copy(update={"model": long.model.model_copy(update={"block_size": 4096})})
    assert choose(long, CPU, 257).micro_batch_size == 1


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: what the footprint says is not asked, or checkpointing is on though one row fits."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 256}
    training = {"tokens_per_step": 2048, "precision": "fp32"}
    few = {"max_tokens": 256}  # the evaluation's memory is not what decides here
    settings = Config.model_validate({"training": training, "model": shape, "eval": few})
    two = footprint(settings, 64, 2, "fp32", recompute=False, device_kind="cpu").total_bytes
    free = int(two / 0.9) + 2**16
    monkeypatch.setattr("gptcli.device.free_memory_bytes", lambda device: free)
    found = choose(settings, CPU, 64)
    assert (found.micro_batch_size, found.activation_checkpointing) == (2, False)
    monkeypatch.setattr("gptcli.device.free_memory_bytes", lambda device: 2**20)
    one = settings.training.model_copy(update={"micro_batch_size": 1})
    found = choose(settings.model_copy(update={"training": one}), CPU, 64)
    assert (found.micro_batch_size, found.activation_checkpointing) == (1, True)
    monkeypatch.setattr("gptcli.device.free_memory_bytes", lambda device: None)
    found = choose(settings, CPU, 64)
    assert (found.micro_batch_size, found.activation_checkpointing) == (8, False)


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is installed that a compiler needs, here or not."""
    monkeypatch.setattr("gptcli.training.choices.has_compiler", lambda device: True)


def test_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compilers: None
) -> None:
    """Bug: compiling where nothing can compile, without a word."""
    assert not choose(config(), CPU, 257).compile
    assert choose(config(compile="on"), CPU, 257).compile
    assert not choose(config(compile="off"), GPU, 257).compile
    saved = choose(config(), CPU, 257).to_json()
    assert not caplog.records
    monkeypatch.setattr("gptcli.training.choices.has_compiler", lambda device: False)
    assert not choose(config(compile="on"), CPU, 257).compile
    assert "no compiler" in caplog.text
    caplog.clear()
    again = choose_again(saved, config(compile="on"), CPU)  # a resume says it too
    assert again is not None
    assert not again.compile
    assert "no compiler" in caplog.text
    assert "bit-exact" not in caplog.text


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
    assert choose_again(saved, config(), CPU).to_json() == saved
    slow = {**saved, "precision": "bf16", "micro_batch_size": 4}
    again = choose_again(slow, config(precision="auto"), CPU)
    assert (again.precision, again.micro_batch_size) == ("bf16", 4)
    fewer = choose_again({**saved, "threads": 1}, config(), CPU)  # they won the race
    assert fewer.threads == 1
    before_races = {k: saved[k] for k in list(saved)[:6]}  # of a checkpoint of an older version
    assert choose_again(before_races, config(), CPU).threads == 4
    assert not caplog.records


def test_changed_machine_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a resume on other hardware claims to be bit-exact."""
    caplog.set_level(logging.WARNING, logger="gptcli")
    saved = choose(config(), CPU, 257).to_json()
    choose_again(saved, config(), replace(CPU, threads=2))
    assert caplog.messages == ["not bit-exact with the run so far: threads 4 -> 2"]
    caplog.clear()
    assert choose_again(saved, config(), GPU) is None
    assert caplog.messages == ["not bit-exact with the run so far: device cpu -> cuda:1"]
    caplog.clear()
    changed = config(precision="bf16", micro_batch_size=8)
    again = choose_again({**saved, "torch": "1.0"}, changed, CPU)
    expected = replace(choose(changed, CPU, 257), micro_batch_size=8)
    assert again == expected
    (message,) = caplog.messages
    for reason in ("torch 1.0 ->", "precision fp32 -> bf16", "micro_batch_size 16 -> 8"):
        assert reason in message


def test_another_device_of_the_kind(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: the second GPU of a machine gets a micro batch and a precision of its own."""
    old = replace(choose(config(precision="auto"), GPU, 257), micro_batch_size=4, compile=True)
    there = replace(GPU, index=0)
    again = choose_again(old.to_json(), config(precision="auto"), there)
    assert again == replace(old, device="cuda:0")
    assert caplog.messages == ["not bit-exact with the run so far: device cuda:1 -> cuda:0"]
    lesser = choose_again(old.to_json(), config(precision="auto"), OLD_GPU)
    assert lesser == replace(old, precision="fp32")  # it has no bf16


def test_a_halved_micro_batch_stays(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a resume goes back to the size that did not fit, and says that the config changed."""
    settings = config(micro_batch_size=16)
    less = with_less_memory(choose(settings, CPU, 257), settings, 32)
    assert less.micro_batch_size == 8
    caplog.clear()
    saved = less.to_json()
    assert choose_again(saved, settings, CPU) == less
    assert choose_again(saved, config(), CPU) == replace(less, given_micro_batch_size="auto")
    same = choose_again(saved, config(micro_batch_size=8), CPU)
    assert same == replace(less, given_micro_batch_size=8)
    assert not caplog.records
    other = choose_again(saved, config(micro_batch_size=4), CPU)
    assert other == replace(less, micro_batch_size=4, given_micro_batch_size=4)
    assert "micro_batch_size 8 -> 4" in caplog.messages[0]


def test_switches_on_resume(caplog: pytest.LogCaptureFixture, compilers: None) -> None:
    """Bug: what the config says now is passed over, or changes the run without a word."""
    saved = choose(config(), CPU, 257).to_json()
    compiled = choose_again(saved, config(compile="on"), CPU)
    assert compiled is not None
    assert compiled.compile
    assert caplog.messages == ["not bit-exact with the run so far: compile off -> on"]
    caplog.clear()
    assert choose_again(compiled.to_json(), config(), CPU) == compiled  # auto keeps it
    recomputing = choose_again(saved, config(activation_checkpointing="on"), CPU)
    assert recomputing is not None
    assert recomputing.activation_checkpointing
    keeping = choose_again(recomputing.to_json(), config(activation_checkpointing="off"), CPU)
    assert keeping is not None
    assert not keeping.activation_checkpointing
    assert not caplog.records  # it changes no bit


def test_smaller_step_on_resume(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: the saved micro batch does not divide the new step."""
    saved = choose(config(), CPU, 257).to_json()
    again = choose_again(saved, config(tokens_per_step=2560), CPU)
    assert again.micro_batch_size == 10


def test_less_memory(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a micro batch that does not divide the rows, or one that never ends to shrink."""
    settings = config(tokens_per_step=128 * 30)
    choices, seen = choose(settings, CPU, 257), []
    for _ in range(4):
        seen.append((choices.micro_batch_size, choices.activation_checkpointing))
        choices = with_less_memory(choices, settings, 30)
    seen.append((choices.micro_batch_size, choices.activation_checkpointing))
    assert seen == [(15, False), (6, False), (3, False), (1, False), (1, True)]
    with pytest.raises(ResourceError, match="one row of 128 tokens") as caught:
        with_less_memory(choices, settings, 30)
    assert caught.value.exit_code == 6
    assert caught.value.hint
    assert len(caplog.records) == len(seen) - 1
    off = config(activation_checkpointing="off", micro_batch_size=1)
    with pytest.raises(ResourceError):
        with_less_memory(choose(off, CPU, 257), off, 32)
    assert [largest_divisor(30, n) for n in (0, 1, 4, 7, 30, 99)] == [1, 1, 3, 6, 30, 30]
