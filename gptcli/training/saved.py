"""A checkpoint as a run goes on from it: state.json is checked before anything is made of it."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptcli.config.load import dump_config, load_resolved
from gptcli.data.position import Position
from gptcli.data.rows import RowSource
from gptcli.device import DTYPES
from gptcli.errors import CheckpointError, ConfigError
from gptcli.evaluation.perplexity import Scores
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.manifest import CONFIG, MODEL, OPTIMIZER, STATE, read_manifest
from gptcli.runs.tensors import stored_dtypes
from gptcli.training.choices import Choices
from gptcli.training.state import INTERVAL, INTERVAL_TIMES, TrainState

_NO_FIT = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)

_NO_PLACE = "train.position is none of this run"

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R", bound=RowSource)


class _State(BaseModel):
    """What `Session.save` writes; keys that are not known are left alone."""

    model_config = ConfigDict(extra="allow")

    train: TrainState
    choices: Choices
    data_fingerprint: dict[str, Any]
    job: Literal["pretrain", "finetune"]
    scores: Scores | None
    decaying: Annotated[bool, Field(strict=True)]


def read_resumable(directory: Path, *, tensors: bool = True, hashes: bool = True) -> Contents:
    """The contents of a checkpoint, whose config, tensors and state are such as a run saves.

    Without `tensors` there are none in them: they are read when each process knows its share.
    Without `hashes` these are known to agree.
    CheckpointError when it is damaged or not such a state; whether the position is one of the
    data, `fitting` and `standing_at` say. Raises `stop.Stopped`.
    """
    contents = checkpoint.read(directory, with_optimizer=True, tensors=tensors, hashes=hashes)
    try:
        config = load_resolved(directory / CONFIG)
        state = _checked_state(directory, contents.state)
        _check_tensors(directory, state)
    except (CheckpointError, ConfigError) as error:  # not the user's config, so not exit code 2
        older = f"mv {shlex.quote(str(directory))} {shlex.quote(f'{directory}.bad')}"
        hint = f"to go on from the checkpoint before it: {older}"
        raise CheckpointError(error.message, hint=error.hint or hint) from error
    known = state.model_dump()
    return replace(contents, state=contents.state | known, config_yaml=dump_config(config))


def _checked_state(directory: Path, saved: dict[str, Any]) -> _State:
    where = directory / STATE
    state = _checked(_State, saved, where)
    train = state.train
    if train.position is not None:
        epochs = _checked(Position, train.position, where, "train", "position").epochs
        if epochs > train.epochs + 1:
            problem = f"is in epoch {epochs}, but train.epochs is {train.epochs:g}"
            raise CheckpointError(f"{where}: train.position {problem}")
    for problem in _problems(state, read_manifest(directory)["step"]):
        raise CheckpointError(f"{where}: {problem}")
    return state


def _check_tensors(directory: Path, state: _State) -> None:
    """CheckpointError for tensors of another type than runs save, and where none are left of an
    optimizer. Their names and shapes are for the model and the optimizer to check."""
    moments = stored_dtypes(directory / OPTIMIZER)
    for file, dtypes in ((MODEL, stored_dtypes(directory / MODEL)), (OPTIMIZER, moments)):
        for name, dtype in dtypes.items():
            if dtype != "F32":
                raise CheckpointError(
                    f"{directory / file}: {name} holds {dtype}, but runs save F32"
                )
    updates = state.train.step - state.train.skipped_steps
    # With fp16, steps that overflow at the beginning are not applied, and are not skipped ones.
    if not moments and updates > 0 and state.choices.precision != "fp16":
        raise CheckpointError(f"{directory / OPTIMIZER} holds nothing, after {updates} updates")


def _checked(model: type[M], saved: Any, where: Path, *above: str) -> M:
    try:
        return model.model_validate(saved)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (*above, *first["loc"]))
        given = first["input"]
        shown = f" (is {given!r:.40})" if isinstance(given, int | float | str | None) else ""
        problem = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{where}: {place}: {problem.lower()}{shown}") from error


def _problems(state: _State, step: int) -> Iterator[str]:
    """What no run writes, though its type is right."""
    train, choices, most = state.train, state.choices, state.choices.available_threads
    if train.step != step:
        yield f"train.step is {train.step}, but the checkpoint is that of step {step}"
    if train.evaluated_step > step:
        yield f"train.evaluated_step is {train.evaluated_step}, behind step {step}"
    if (train.best_step is None) != (train.best_loss is None) or (train.best_step or 0) > step:
        yield f"train.best_step is {train.best_step}, train.best_loss {train.best_loss}"
    if unknown := sorted(train.interval.keys() - INTERVAL):
        yield f"train.interval.{unknown[0]} is none of its sums"
    for name, value in train.interval.items():
        if value < 0:
            yield f"train.interval.{name} is {value}"
    if train.interval.get("tokens") and not any(map(train.interval.get, INTERVAL_TIMES)):
        yield "train.interval has tokens, but no time that they took"
    if choices.precision not in DTYPES:
        yield f"choices.precision is {choices.precision!r}"
    if choices.threads < 1 or (most is not None and choices.threads > most):
        yield f"choices.threads is {choices.threads}, of {most}"
    if choices.micro_batch_size < 1:
        yield f"choices.micro_batch_size is {choices.micro_batch_size}"


@contextmanager
def fitting(contents: Contents | None, source: Path) -> Iterator[None]:
    """Where the position of the data in `contents`, read from `source`, is taken up: what does not
    fit in it is a CheckpointError. Without contents nothing is taken up, and errors are what they
    are."""
    try:
        yield
    except _NO_FIT as error:
        if contents is None:
            raise
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{source / STATE}: {_NO_PLACE}: {problem}") from error


def standing_at(rows: R, contents: Contents | None, fingerprint: dict[str, Any]) -> R:
    """`rows`, which were restored over the data of `fingerprint`.

    ValueError when these are the data of the checkpoint, and yet the rows do not stand where its
    position says: there is no such place. Of other data, where they are allowed, the nearest place
    will do.
    """
    if contents is None or contents.state["data_fingerprint"] != fingerprint:
        return rows
    position, found = contents.state["train"]["position"] or {}, rows.state()
    for key in position.keys() & found.keys() - {"seen"}:
        if position[key] != found[key]:
            raise ValueError(f"{key} is {position[key]!r:.60}, but can be {found[key]!r:.60}")
    return rows
