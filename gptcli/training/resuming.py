"""Where a resumed run goes on, and whether it may: looked at, with nothing changed."""

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptcli import world
from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.errors import CheckpointError
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.run_dir import read_run_json
from gptcli.training.optimizers import peak_rate
from gptcli.training.saved import read_resumable
from gptcli.training.schedule import is_decaying, learning_rate
from gptcli.training.state import TrainState, progress

log = logging.getLogger("gptcli")

_SHAPE = ("model.", "tokenizer.")
# What rows become, and what of the model learns: a run ends with what it began with.
_LEARNED = tuple(
    f"finetune.{key}"
    for key in (
        *("task", "fields", "template", "loss_on", "packing", "too_long", "pair_order"),
        *("method", "lora", "head", "freeze_", "class_weights", "max_train_rows_per_label"),
        *("labels", "dpo_beta", "lm_weight"),
    )
)
_LABELS = "finetune.labels"
LIMITS = ("max_steps", "max_tokens", "max_epochs", "max_time")


@dataclass(frozen=True)
class Place:
    """Where a run goes on: the checkpoint's contents and its state; whether nothing is left to do;
    whether the later checkpoints belong to a course that is given up."""

    contents: Contents
    state: TrainState
    done: bool = False
    gives_up_later: bool = False


def place_to_resume(directory: Path, config: Config) -> Place:
    """Where `directory` goes on. Changes nothing there.

    Normally at its newest valid checkpoint. A run that had begun its final decay and now gets a
    larger limit goes on from the last checkpoint before the decay. Raises CheckpointError when none
    is usable or the model would be another one.
    """
    newest = checkpoint.newest_valid(directory, log)
    if newest is None:
        raise CheckpointError(
            f"{directory} has no valid checkpoint to resume from",
            hint=f"what is left of it: gpt runs verify {shlex.quote(str(directory))}",
        )
    contents = read_resumable(newest, tensors=not _in_shares(newest, config))
    saved = Config.model_validate(yaml.safe_load(contents.config_yaml))
    if config.init is not None:  # automatic rates are those for the run's shape
        config = config.settled_for(saved.model)
    _check_config(contents, config, directory)
    state = TrainState.from_json(contents.state["train"])
    before = progress(state, saved.training)
    limited = any(getattr(saved.training, n) != getattr(config.training, n) for n in LIMITS)
    if limited or saved.finetune.patience != config.finetune.patience:
        state.reached = 0.0  # it was a share of other limits
        state.stale_evaluations = 0  # who gives a run more has patience again
    now = progress(state, config.training)
    if now >= 1.0 and read_run_json(directory).get("status") == "finished":
        return Place(contents, state, done=True)
    older, is_stable = None, not is_decaying(now, config.schedule)
    if contents.state["decaying"] and now < before and (before >= 1.0 or is_stable):
        older = _before_decay(directory, state, bool(contents.model))
        state = older.state if older is not None else state
        state.reached = 0.0
    _show_rate(contents, config, state)
    return older or Place(contents, state)


def _in_shares(directory: Path, config: Config) -> bool:
    """Whether each process is to read its share of the tensors only."""
    if world.current().size == 1:
        return False
    choices = checkpoint.read_state(directory).get("choices")
    saved = choices.get("strategy") if isinstance(choices, dict) else None
    return (config.distributed.strategy, saved) in (("fsdp", saved), ("auto", "fsdp"))


def _check_config(contents: Contents, config: Config, directory: Path) -> None:
    """Another model or tokenizer is refused; other changes are shown."""
    old, new = _flat(contents.config_yaml), _flat(dump_config(config, loadable=True))
    if config.init is not None:  # the checkpoint's config has also what came from there
        given = new.keys() | _given_when_begun(directory)
        old = {k: v for k, v in old.items() if k in given or not k.startswith(_SHAPE)}
    if new.get(_LABELS) is None:  # they were read from the rows
        old.pop(_LABELS, None)
    differing = {k: (old.get(k), new.get(k)) for k in old | new if old.get(k) != new.get(k)}
    shown = {k: f"{k}: {a} -> {b}" for k, (a, b) in differing.items()}
    fixed = [
        text
        for key, text in shown.items()
        if key.startswith((*_SHAPE, "data.", "init", "seed", "optimizer.kind", *_LEARNED))
        and key not in ("model.dropout", "data.cache")  # neither changes what is trained on
    ]
    if fixed:
        raise CheckpointError(
            "this run was begun with other settings, which a resume cannot change: "
            + "; ".join(fixed),
            hint="resume with the run's own config.yaml, or start a new run",
        )
    for text in shown.values():
        log.warning(f"changed since the run began: {text}")


def _given_when_begun(directory: Path) -> set[str]:
    """Keys in the run's config.yaml, which with `init` holds what was given beside it."""
    try:
        return set(_flat((directory / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):  # it was lost or edited
        return set()


def _before_decay(directory: Path, state: TrainState, tensors: bool) -> Place | None:
    """The last checkpoint before the decay that had begun at `state`, if there is one."""
    for path in reversed(checkpoint.list_checkpoints(directory)):
        older = _read_or_none(path, tensors)
        if older is not None and not older.state["decaying"]:
            before = TrainState.from_json(older.state["train"])
            log.warning(
                f"the limit has changed and the decay had begun: going on from step"
                f" {before.step}, before the decay, instead of step {state.step}"
            )
            return Place(older, before, gives_up_later=True)
    return None


def _show_rate(contents: Contents, config: Config, state: TrainState) -> None:
    """Warn where changed settings make the learning rate of the next step another one."""
    saved = Config.model_validate(yaml.safe_load(contents.config_yaml))
    old, new = (
        learning_rate(state.step, progress(state, c.training), c.schedule, peak_rate(c))
        for c in (saved, config)
    )
    if old != new:
        log.warning(f"the learning rate at step {state.step} was {old:.3g} and is now {new:.3g}")


def _flat(config_yaml: str) -> dict[str, Any]:
    sections = yaml.safe_load(config_yaml)
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def _read_or_none(path: Path, tensors: bool) -> Contents | None:
    try:
        return read_resumable(path, tensors=tensors)
    except CheckpointError as error:
        log.warning(f"{path.name} is damaged and skipped: {error}")
        return None
