"""One step's gradients: the same whatever the micro batch, also when memory or compiler fail."""

import logging
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.config.schema import Config
from gptcli.data.rows import StepBatch
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, resolve_device
from gptcli.errors import ResourceError
from gptcli.evaluation.perplexity import Scores
from gptcli.model.gpt import GPT, Block, initialise
from gptcli.training.choices import Choices, apply
from gptcli.training.objective import language_model_loss
from gptcli.training.optimizers import Optimizer
from gptcli.training.session import Session
from gptcli.training.state import TrainState
from gptcli.training.step import forward_backward

CPU = Device("cpu", None, "a processor", 1, True)


def config(block_size: int, rows: int, dropout: float = 0.0, **training: Any) -> Config:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": block_size, "dropout": dropout}
    training = {"tokens_per_step": rows * block_size, **training}
    return Config.model_validate({"model": sizes, "training": training})


def session(directory: Path, settings: Config, micro_batch_size: int) -> Session:
    """A run of an untrained byte model on the CPU, the same every time."""
    tokenizer = Tokenizer.of_bytes()
    model = GPT(settings.model, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    for block in model.blocks:
        block.attn.proj.weight.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))

    def never() -> Scores:
        raise AssertionError("a step does not evaluate")

    return Session(
        config=settings,
        directory=directory,
        device=CPU,
        choices=Choices("cpu", 1, "fp32", False, micro_batch_size, torch.__version__),
        model=model.train(),
        tokenizer=tokenizer,
        optimizer=Optimizer(model, settings.optimizer),
        state=TrainState(),
        loss_of=language_model_loss(model),
        score_validation=never,
        data_fingerprint={},
    )


def step(run: Session) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of one step on fixed tokens."""
    rows = run.config.training.tokens_per_step // run.config.model.block_size
    shape = (rows, run.config.model.block_size)
    tokens = torch.randint(256, shape, generator=torch.Generator().manual_seed(2))
    batch = StepBatch(tokens, tokens.roll(-1, dims=1), None, tokens.numel(), {}, 0.0)
    loss, norm = forward_backward(run, batch)
    assert isinstance(norm, Tensor)
    assert loss.shape == norm.shape == ()
    return loss, [p.grad.clone() for p in run.model.parameters() if p.grad is not None]


def limit_address_space(more_bytes: int) -> None:
    """Let this process take only so much more memory; its end lifts that."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more_bytes, resource.RLIM_INFINITY))


def step_in_little_memory(
    directory: Path, settings: Config, more_bytes: int
) -> tuple[int, bool, float, list[str], str, list[Any]]:
    """In a process of its own: size and checkpointing that the step ends with, its loss, the lines
    logged, the error, and the gradients."""
    resolve_device("cpu")
    torch.set_num_threads(1)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gptcli").addHandler(handler)
    rows = settings.training.tokens_per_step // settings.model.block_size
    run = session(directory, settings, rows)
    limit_address_space(more_bytes)
    try:
        loss, gradients = step(run)
    except ResourceError as error:
        return 0, False, 0.0, lines, f"{error}; {error.hint}", []
    micro, recompute = run.choices.micro_batch_size, run.choices.activation_checkpointing
    return micro, recompute, float(loss), lines, "", [g.numpy() for g in gradients]


@pytest.fixture(scope="module")
def process():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as p:
        yield p


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_out_of_memory_halves_the_micro_batch(tmp_path: Path, process: ProcessPoolExecutor) -> None:
    """Bug: a run ends, or trains on other gradients, because its micro batch does not fit."""
    settings = config(256, 64, clip_norm=0.0)
    loss, gradients = step(session(tmp_path, settings, 64))
    work = process.submit(step_in_little_memory, tmp_path, settings, 48 * 2**20)
    micro, recompute, found, lines, error, others = work.result()
    assert not error
    assert micro < 64
    assert 64 % micro == 0
    assert not recompute
    assert lines[0].startswith("out of memory: micro_batch_size 64 -> 32")
    assert found == pytest.approx(float(loss), rel=1e-5)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, torch.from_numpy(other), rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_one_row_that_does_not_fit_is_an_error(
    tmp_path: Path, process: ProcessPoolExecutor
) -> None:
    """Bug: a traceback, or halving for ever, where nothing is left to halve."""
    settings = config(8192, 1)
    work = process.submit(step_in_little_memory, tmp_path, settings, 12 * 2**20)
    _, _, _, lines, error, _ = work.result()
    assert lines == ["out of memory with one row: activation_checkpointing off -> on"]
    assert "one row of 8192 tokens" in error
    assert "model.block_size" in error


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit(tmp_path: Path, dropout: float) -> None:
    """Bug: the second computation drops out other values than the first."""
    settings = config(32, 4, dropout)
    found = []
    for recompute in (False, True):
        run = session(tmp_path, settings, 2)
        run.choices = replace(run.choices, activation_checkpointing=recompute)
        apply(run.choices, run.model)
        assert run.model.recompute == recompute
        found.append(step(run))
    (loss, gradients), (again, others) = found
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_a_compiler_that_fails_is_told_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a machine without a working compiler cannot train, or the step is half done twice."""
    settings = config(16, 4, dropout=0.2)
    loss, gradients = step(session(tmp_path, settings, 2))
    broken = torch.compile(Block.forward, backend=lambda graph, inputs: 1 / 0)
    monkeypatch.setattr("gptcli.training.compiling._compiled", lambda: broken)
    run = session(tmp_path, settings, 2)
    run.choices = replace(run.choices, compile=True)
    apply(run.choices, run.model)
    again, others = step(run)
    assert not run.choices.compile
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    (line,) = [m for m in caplog.messages if "torch.compile" in m]
    assert "going on without it" in line
    assert "\n" not in line


@pytest.mark.parametrize("compiled", [False, True])
def test_errors_of_the_model_are_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, compiled: bool
) -> None:
    """Bug: a step that fails for another reason is repeated for ever, or the compiler is blamed."""
    run = session(tmp_path, config(16, 2), 2)
    run.choices = replace(run.choices, compile=compiled)
    run.model.loss = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        step(run)
    assert not caplog.records
