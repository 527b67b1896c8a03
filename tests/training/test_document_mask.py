"""The training step with documents that do not see each other."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptcli.config.schema import Config
from gptcli.data.rows import StepBatch
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.evaluation.perplexity import Scores
from gptcli.model.gpt import GPT, initialise
from gptcli.model.loss import IGNORED
from gptcli.training.choices import Choices
from gptcli.training.loop import forward_backward
from gptcli.training.objective import language_model_loss
from gptcli.training.optimizers import Optimizer
from gptcli.training.session import Session
from gptcli.training.state import TrainState

T = 8
CONFIG = Config.model_validate(
    {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": T},
        "training": {"clip_norm": 0.0},
    }
)


def session(directory: Path, micro_batch_size: int) -> Session:
    """A run of an untrained byte model on the CPU, the same for every micro batch size."""
    tokenizer = Tokenizer.of_bytes()
    model = GPT(CONFIG.model, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    model.blocks[0].attn.proj.weight.data.normal_(0.0, 0.3, generator=torch.manual_seed(1))

    def never() -> Scores:
        raise AssertionError("a step does not evaluate")

    return Session(
        config=CONFIG,
        directory=directory,
        device=Device("cpu", None, "a processor", 1, True),
        choices=Choices("cpu", 1, "fp32", False, micro_batch_size, torch.__version__),
        model=model,
        tokenizer=tokenizer,
        optimizer=Optimizer(model, CONFIG.optimizer),
        state=TrainState(),
        loss_of=language_model_loss(model),
        score_validation=never,
        data_fingerprint={},
    )


def batch(segments: Tensor | None) -> StepBatch:
    tokens = torch.randint(0, 256, (6, T), generator=torch.Generator().manual_seed(2))
    targets = tokens.roll(-1, dims=1)
    targets[::2, -2:] = IGNORED
    return StepBatch(tokens, targets, segments, tokens.numel(), {}, 0.0)


def some_segments() -> Tensor:
    """Documents that begin at other places in each row (6, T)."""
    starts = torch.rand(6, T, generator=torch.Generator().manual_seed(3)) < 0.3
    return starts.cumsum(dim=1)


def step(directory: Path, given: StepBatch, micro_batch_size: int) -> tuple[float, list[Tensor]]:
    """The loss and the gradients of one step."""
    run = session(directory, micro_batch_size)
    loss, _ = forward_backward(run, given)
    return loss, [p.grad for p in run.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("micro_batch_size", [6, 4, 1])
def test_a_step_is_the_mean_over_documents_alone(tmp_path: Path, micro_batch_size: int) -> None:
    """Guards: segments that do not reach the model, or go to the rows of another micro batch."""
    segments = some_segments()
    given = batch(segments)
    alone = session(tmp_path, 6)
    count = int((given.targets != IGNORED).sum())
    expected = torch.zeros(())
    for tokens, targets, ids in zip(given.tokens, given.targets, segments, strict=True):
        for document in ids.unique():
            here = ids == document
            expected = expected + alone.model.loss(tokens[None, here], targets[None, here]) / count
    expected.backward()
    loss, gradients = step(tmp_path, given, micro_batch_size)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for got, parameter in zip(gradients, alone.model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)


def test_without_segments_documents_see_each_other(tmp_path: Path) -> None:
    """Guards: a document mask that is always on, or never."""
    plain, _ = step(tmp_path, batch(None), 4)
    masked, _ = step(tmp_path, batch(some_segments()), 4)
    given, model = batch(None), session(tmp_path, 6).model
    count = int((given.targets != IGNORED).sum())
    expected = float(model.loss(given.tokens, given.targets).detach()) / count
    assert plain == pytest.approx(expected, rel=1e-6)
    assert abs(masked - plain) > 1e-4
