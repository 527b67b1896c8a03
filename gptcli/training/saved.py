"""A checkpoint as a run goes on from it: state.json is checked before anything is made of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gptcli.config.load import dump_config, load_resolved
from gptcli.device import DTYPES
from gptcli.errors import CheckpointError, ConfigError
from gptcli.evaluation.perplexity import Scores
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.manifest import CONFIG, STATE, read_manifest
from gptcli.training.choices import Choices
from gptcli.training.state import TrainState

_NO_FIT = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


class _State(BaseModel):
    """What `Session.save` writes; keys that are not known are left alone."""

    model_config = ConfigDict(extra="allow")

    train: TrainState
    choices: Choices
    data_fingerprint: dict[str, Any]
    job: Literal["pretrain", "finetune"]
    scores: Scores | None
    decaying: bool


def read_resumable(directory: Path, *, tensors: bool = True) -> Contents:
    """The contents of a checkpoint, whose config and state are such as a resume reads. Without
    `tensors` there are none: they are read when each process knows its share.

    The position of the data is an exception: whoever takes it up does so in `fitting`.
    CheckpointError when it is damaged or not such a state. Raises `stop.Stopped`.
    """
    contents = checkpoint.read(directory, with_optimizer=True, tensors=tensors)
    where = directory / STATE
    try:
        config = load_resolved(directory / CONFIG)
    except ConfigError as error:  # not the user's config, so not exit code 2
        raise CheckpointError(error.message, error.hint) from error
    try:
        state = _State.model_validate(contents.state)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{where}: {place}: {first['msg'].lower()}") from error
    for problem in _problems(state, read_manifest(directory)["step"]):
        raise CheckpointError(f"{where}: {problem}")
    known = state.model_dump()
    return replace(contents, state=contents.state | known, config_yaml=dump_config(config))


def _problems(state: _State, step: int) -> Iterator[str]:
    """What no run writes, though its type is right."""
    choices, most = state.choices, state.choices.available_threads
    if state.train.step != step:
        yield f"train.step is {state.train.step}, but the checkpoint is that of step {step}"
    if choices.precision not in DTYPES:
        yield f"choices.precision is {choices.precision!r}"
    if choices.threads < 1 or (most is not None and choices.threads > most):
        yield f"choices.threads is {choices.threads}, of {most}"
    if choices.micro_batch_size < 1:
        yield f"choices.micro_batch_size is {choices.micro_batch_size}"


@contextmanager
def fitting(contents: Contents | None) -> Iterator[None]:
    """Where the position of the data in `contents` is taken up: what does not fit in it is a
    CheckpointError. Without contents nothing is taken up, and errors are what they are."""
    try:
        yield
    except _NO_FIT as error:
        if contents is None:
            raise
        raise CheckpointError(
            f"the data position in the checkpoint's {STATE} is none of this run:"
            f" {type(error).__name__}: {error}"
        ) from error
