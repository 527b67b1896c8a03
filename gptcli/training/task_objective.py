"""What a finetuning minimises: the loss of its task, with what a frozen model made of the rows."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

from gptcli import world
from gptcli.config.schema import Config
from gptcli.data.examples import HeadExample, PreferencePair
from gptcli.data.task_data import TaskData
from gptcli.device import Device
from gptcli.errors import ConfigError
from gptcli.model.gpt import GPT
from gptcli.training.features import frozen_features
from gptcli.training.objective import LossOf, head_loss, language_model_loss, preference_loss
from gptcli.training.reference import reference_log_probabilities
from gptcli.training.start import Start

T = TypeVar("T")


def task_objective(
    config: Config,
    task: TaskData,
    start: Start,
    device: Device,
    reference: dict[int, tuple[float, float]],
    model: GPT,
    precision: str,
) -> LossOf:
    """What a step of the task minimises. Of preferences `reference` is filled, by `model` as it is
    before the training or from what the run kept."""
    with world.first():  # it keeps what the frozen model makes of the rows, the others read it
        return _of_task(config, task, start, device, reference, model, precision)


def _of_task(
    config: Config,
    task: TaskData,
    start: Start,
    device: Device,
    reference: dict[int, tuple[float, float]],
    model: GPT,
    precision: str,
) -> LossOf:
    settings = config.finetune
    resumed = start.contents is not None or not world.current().leads
    if settings.has_head:
        features_of = None
        if settings.method == "head":
            features_of = frozen_features(
                model,
                None if task.corpus.remote else lambda: _of_kind(HeadExample, task.examples()),
                device,
                start.directory,
                resumed=resumed,
                precision=precision,
            )
        return head_loss(
            model,
            settings.lm_weight,
            task.class_weights,
            choice=settings.task == "multiple_choice",
            features_of=features_of,
        )
    if settings.task == "preference":
        if task.corpus.remote:
            raise ConfigError(
                "what the model thinks of all pairs is computed before training, so they cannot be"
                " streamed",
                hint="download the rows and name the file in data.train",
            )
        found = reference_log_probabilities(
            model,
            lambda: _of_kind(PreferencePair, chain(task.examples(), task.held_out)),
            device,
            start.directory,
            resumed=resumed,
            precision=precision,
        )
        reference.update(found)
        return preference_loss(model, settings.dpo_beta, reference)
    return language_model_loss(model)


def _of_kind(kind: type[T], rows: Iterable[Any]) -> Iterator[T]:
    return (row for row in rows if isinstance(row, kind))
