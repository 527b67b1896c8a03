"""Trials at the start of a run: bounded, remembered, without a trace in the run."""

import copy
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.config.schema import Config
from gptcli.device import Device
from gptcli.model.gpt import GPT, Block, initialise
from gptcli.training.choices import Choices, choose
from gptcli.training.tuning import race, tune, worth_compiling

CPU = Device("cpu", None, "a processor", 2, True)
GPU = Device("cuda", 0, "a graphics card", 8, True)
BYTES = 10**9  # of training text


def config(**training: Any) -> Config:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "dropout": 0.1}
    training = {
        "tokens_per_step": 256,
        "precision": "fp32",
        "max_steps": 100,
        "compile": "off",
        **training,
    }
    return Config.model_validate({"model": sizes, "training": training})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT_CACHE", str(tmp_path))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "choices"


def tuned(settings: Config) -> Choices:
    model = GPT(settings.model, 64)
    return tune(choose(settings, CPU, 64), settings, CPU, model, BYTES)


def test_leaves_the_run_as_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a run whose choices come from the cache is another run than the one that tried them."""
    monkeypatch.setattr("gptcli.training.tuning._MOST_SECONDS", 1e9)  # on a busy machine too
    monkeypatch.setattr("gptcli.training.tuning._MOST_SHARE", 1e9)
    settings = config()
    model = GPT(settings.model, 64)
    initialise(model, torch.Generator().manual_seed(0))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    choices = tune(choose(settings, CPU, 64), settings, CPU, model, BYTES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert torch.get_num_threads() == choices.threads
    races = choices.races
    assert set(races["threads"]) == {"1", "2"}
    assert set(races["micro_batch_size"]) == {"8", "16"}
    assert 0 < races["forward_backward_seconds"] < races["seconds"]
    assert 16 % choices.micro_batch_size == 0
    json.dumps(choices.to_json(), allow_nan=False)


def test_a_second_run_does_not_try_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: every run pays for the trials; or another shape gets this one's choices."""
    first = tuned(config())
    (file,) = cache.iterdir()
    saved = {**json.loads(file.read_text()), "micro_batch_size": 4, "threads": 1}
    file.write_text(json.dumps(saved))
    again = tuned(config(max_tokens=512))
    assert (again.micro_batch_size, again.threads) == (4, 1)
    assert again.races == first.races
    assert torch.get_num_threads() == 1
    tuned(config(tokens_per_step=512))
    assert len(list(cache.iterdir())) == 2


def test_off_is_off(cache: Path) -> None:
    """Bug: a run that is not to recompute activations recalls that one on auto had to."""
    tuned(config())
    (file,) = cache.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "activation_checkpointing": True}))
    assert tuned(config()).activation_checkpointing
    assert not tuned(config(activation_checkpointing="off")).activation_checkpointing


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{}",
        '{"threads": 99}',
        '{"threads": 0}',
        '{"threads": "2"}',
        '{"micro_batch_size": 3}',
        '{"micro_batch_size": 0}',
        '{"activation_checkpointing": 1}',
        '{"races": []}',
        '{"races": {"forward_backward_seconds": "x"}}',
        '{"races": {"forward_backward_seconds": 1.0, "compile": 7}}',
    ],
)
def test_a_damaged_file_is_ignored(cache: Path, damage: str) -> None:
    """Bug: a half-written or edited file in the cache ends every run, or sets its threads."""
    tuned(config())
    (file,) = cache.iterdir()
    changes = json.loads(damage) if damage else None
    file.write_text(
        json.dumps({**json.loads(file.read_text()), **changes})
        if isinstance(changes, dict) and changes
        else damage
    )
    found = tuned(config())
    assert found.threads in (1, 2)
    assert found.micro_batch_size in (8, 16)
    assert json.loads(file.read_text())["races"] == found.races


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a read-only home ends the run."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT_CACHE", str(tmp_path / "file"))
    assert tuned(config()).micro_batch_size in (8, 16)


def test_a_short_run_pays_little(cache: Path) -> None:
    """Bug: the races take longer than the run."""
    settings = config(max_tokens=512)
    found = tuned(settings)
    assert "threads" not in found.races
    assert "micro_batch_size" not in found.races


def test_a_race_takes_turns_and_ends() -> None:
    """Bug: a race that takes longer than it may, or is decided by the first call."""
    calls: list[str] = []
    cold = {"a"}

    def work(name: str) -> None:
        calls.append(name)
        time.sleep(0.5 if name in cold else 0.001)
        cold.discard(name)

    found = race({n: lambda n=n: work(n) for n in "ab"}, "b", CPU, 0.0)
    assert calls == list("aabbaabb")
    assert found.seconds["a"] < 0.5
    calls.clear()
    race({"a": lambda: work("a")}, "a", CPU, 1e9)
    assert len(calls) == 10


def test_a_race_is_won_by_work_not_by_waiting() -> None:
    """Bug: two fresh runs on a busy machine choose differently: the default waited by chance."""

    def compute(n: int) -> None:
        sum(range(n))

    def wait() -> None:
        compute(500_000)
        time.sleep(0.5)

    found = race({"default": wait, "other": lambda: compute(1_500_000)}, "default", CPU, 0.0)
    assert found.winner == "default"
    assert found.seconds["other"] < found.seconds["default"]
    works = {"default": lambda: compute(3_000_000), "other": lambda: compute(100_000)}
    assert race(works, "default", CPU, 0.0).winner == "other"
    assert race(works, "default", CPU, 0.0, {"default": 300, "other": 1}).winner == "default"


def test_compiling_must_be_earned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a short run on a CPU spends its time compiling; a long one on a GPU does not compile."""
    settings = config()
    monkeypatch.setattr("gptcli.training.tuning.has_compiler", lambda device: True)
    assert not worth_compiling(settings, CPU, 600.0)
    assert worth_compiling(settings, CPU, 3600.0)
    assert not worth_compiling(settings, GPU, 60.0)
    assert worth_compiling(settings, GPU, 600.0)
    masked = Config.model_validate({**settings.model_dump(), "data": {"document_mask": True}})
    assert not worth_compiling(masked, CPU, 3600.0)
    assert worth_compiling(masked, GPU, 3600.0)
    monkeypatch.setattr("gptcli.training.tuning.has_compiler", lambda device: False)
    assert not worth_compiling(settings, GPU, 3600.0)


def tracer(found: list[str], fails: bool) -> object:
    """torch.compile of a block with a compiler that takes no time, or fails."""

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        found.append("compiled")
        if fails:
            raise OSError("no such compiler\n and a long story")
        return graph.forward

    torch.compiler.reset()
    return torch.compile(Block.forward, backend=backend)


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is installed that a compiler needs, here or not."""
    for module in ("choices", "tuning"):
        monkeypatch.setattr(f"gptcli.training.{module}.has_compiler", lambda device: True)


def test_compile_on_is_kept(cache: Path, compilers: None) -> None:
    """Bug: the trials, which compile nothing, turn off what the user turned on."""
    for _ in range(2):  # tried, then recalled
        assert tuned(config(compile="on")).compile


@pytest.mark.parametrize("fails", [False, True])
def test_a_long_run_races_compiled_code_once(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compilers: None,
    fails: bool,
) -> None:
    """Bug: half a minute of compiling at every start; or a broken compiler ends the run."""
    found: list[str] = []
    compiled = tracer(found, fails)
    monkeypatch.setattr("gptcli.training.compiling._compiled", lambda: compiled)
    caplog.set_level(logging.WARNING, logger="gptcli")
    first = tuned(config(compile="auto", max_steps=10**9))
    assert set(first.races["compile"]) == {"winner", "compiling"} | (
        set() if fails else {"eager", "compiled"}
    )
    assert found == ["compiled"]
    again = tuned(config(compile="auto", max_steps=10**9))
    assert again.compile == first.compile
    assert found == ["compiled"]
    assert (not first.compile and len(caplog.messages) == 1) or not fails
    json.dumps(first.to_json(), allow_nan=False)
