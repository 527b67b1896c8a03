"""Tiny contents, a listener for warnings, and a way to forge manifests."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.model.gpt import GPT, initialise
from gptcli.runs.checkpoint import Contents

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Forked children must not wait for threads that the fork did not copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Warnings that the library logs during the test."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                messages.append(record.getMessage())

    listener = Listener()
    logger = logging.getLogger("gptcli")
    logger.addHandler(listener)
    yield messages
    logger.removeHandler(listener)


@pytest.fixture
def make_contents() -> Callable[..., Contents]:
    """(seed, name, **model keys) -> contents of a tiny model with byte tokens."""

    def make(seed: int = 0, name: str = "tiny", **keys: Any) -> Contents:
        config = Config(name=name, model=ModelConfig(**{**TINY, **keys}))
        tokenizer = Tokenizer.of_bytes()
        model = GPT(config.model, tokenizer.vocab_size)
        initialise(model, torch.Generator().manual_seed(seed))
        with torch.no_grad():  # zero output projections would hide errors in half of the tensors
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        moments = {f"{n}.exp_avg": torch.randn_like(p) for n, p in model.named_parameters()}
        return Contents(
            model=model.state_dict(),
            optimizer=moments,
            state={"seed": seed, "tokens": 2**60 + 1, "loss": 0.1},
            config_yaml=dump_config(config),
            tokenizer=tokenizer,
        )

    return make
