"""How a run begins: afresh in a new directory, or from the newest valid checkpoint of one."""

import logging
import os
import platform
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from gptcli import __version__, stop
from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.device import Device, memory_bytes
from gptcli.errors import CheckpointError, GptError, ResourceError
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.log_file import log_file
from gptcli.runs.metrics import truncate_after
from gptcli.runs.run_dir import (
    RunLock,
    has_checkpoint,
    new_run_dir,
    newest_unfinished,
    read_run_json,
    runs_root,
    update_run_json,
    write_atomic,
    write_json_atomic,
)
from gptcli.training.optimizers import peak_rate
from gptcli.training.saved import read_resumable
from gptcli.training.schedule import is_decaying, learning_rate
from gptcli.training.state import TrainState, progress

log = logging.getLogger("gptcli")

Resume = Literal["no", "resume", "auto"]
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
class Start:
    """Where a run begins: its directory, and the checkpoint it goes on from, if any."""

    job: str
    directory: Path
    contents: Contents | None
    state: TrainState
    done: bool  # the run has finished and its limit is as it was
    began: float  # when this process's work began, of time.monotonic()

    @property
    def source(self) -> Path:
        """The checkpoint that the run goes on from."""
        return checkpoint.checkpoint_dir(self.directory, self.state.step)

    @property
    def saved_config(self) -> dict[str, Any]:
        """The config that the checkpoint holds."""
        assert self.contents is not None
        saved: dict[str, Any] = yaml.safe_load(self.contents.config_yaml)
        return saved

    @property
    def saved_fingerprint(self) -> dict[str, Any] | None:
        """The data fingerprint that the checkpoint holds; None for a fresh run."""
        return self.contents.state["data_fingerprint"] if self.contents is not None else None


@contextmanager
def starting(
    job: str,
    config: Config,
    *,
    run_dir: Path | None,
    resume: Resume,
    overwrite: bool,
    command: str,
    began: float | None = None,
) -> Iterator[Start]:
    """Choose and lock the run directory, and find the place to go on from.

    `began` (of time.monotonic(), default: now) is when the work that max_time limits began.

    The lock is held inside the block; an error there is noted in run.json. log.txt gets every
    record of the library's logger meanwhile. Behind the block torch has as many threads as before
    it: those that a race chose are this run's alone.
    """
    began = time.monotonic() if began is None else began
    directory, resuming = choose_run_dir(config, run_dir, resume, overwrite)
    with RunLock(directory), log_file(directory):
        checkpoint.clean_leftovers(directory)
        if resuming:
            contents, state, done = resumable(directory, config)
            if not done:
                prepare_resume(directory, config, state, command)
            start = Start(job, directory, contents, state, done, began)
        else:
            write_new_run(directory, config, command, job)
            start = Start(job, directory, None, TrainState(), False, began)
        threads = torch.get_num_threads()
        try:
            yield start
        except (GptError, stop.Stopped) as error:
            with suppress(ResourceError):  # a full disk: why the run ended is what matters
                _note_failure(directory, error, start.state)
            raise
        finally:
            torch.set_num_threads(threads)


def choose_run_dir(
    config: Config, run_dir: Path | None, resume: Resume, overwrite: bool
) -> tuple[Path, bool]:
    """The run's directory, and whether it is to be resumed.

    Raises CheckpointError when `resume` finds nothing, ConfigError when the directory holds a run
    that the flags do not mention.
    """
    if resume != "no":
        found = run_to_resume(config.name, run_dir, resume)
        if found is not None:
            return found, True
        log.info("nothing to resume: starting afresh")
        overwrite = overwrite or (run_dir is not None and run_dir.exists())
    return new_run_dir(config.name, run_dir, overwrite=overwrite), False


def run_to_resume(name: str, run_dir: Path | None, resume: Resume) -> Path | None:
    """The run with a checkpoint to go on with: `run_dir`, else the newest unfinished one of config
    `name`. Where there is none: None for `auto`, CheckpointError for `resume`."""
    found = run_dir if run_dir is not None else newest_unfinished(runs_root(), name)
    if found is not None and has_checkpoint(found):
        return found
    if resume == "auto":
        return None
    raise CheckpointError(
        f"nothing to resume: {run_dir} has no checkpoint"
        if run_dir
        else f"nothing to resume: no unfinished run of {name!r} under {runs_root()}/",
        hint="start one without --resume, or use --auto-resume",
    )


def write_new_run(directory: Path, config: Config, command: str, job: str) -> None:
    """config.yaml and run.json of a run that begins."""
    write_config(directory, config)
    write_json_atomic(
        directory / "run.json",
        {
            "status": "running",
            "job": job,
            "command": command,
            "name": config.name,
            "created": _now(),
            "versions": versions(),
            "seeds": {"seed": config.seed},
            "history": [_event("start", 0)],
        },
    )


def write_config(directory: Path, config: Config) -> None:
    """config.yaml of the run: `gpt pretrain` of it repeats the run."""
    write_atomic(directory / "config.yaml", dump_config(config, loadable=True).encode())


def resumable(directory: Path, config: Config) -> tuple[Contents, TrainState, bool]:
    """The checkpoint from which `directory` goes on, its state, and whether nothing is left to do.

    Normally the newest valid one. A run that had begun its final decay and now gets a larger
    limit goes on from the last checkpoint before the decay. Raises CheckpointError when none is
    usable or the model would be another one.
    """
    newest = checkpoint.newest_valid(directory, log)
    if newest is None:
        raise CheckpointError(f"{directory} has no valid checkpoint to resume from")
    contents = read_resumable(newest)
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
        return contents, state, True
    is_stable = not is_decaying(now, config.schedule)
    if contents.state["decaying"] and now < before and (before >= 1.0 or is_stable):
        contents, state = _before_decay(directory, contents, state)
        state.reached = 0.0
    _show_rate(contents, config, state)
    return contents, state, False


def prepare_resume(directory: Path, config: Config, state: TrainState, command: str) -> None:
    """Cut the logs and best.json back to the checkpoint's step and note the resume."""
    truncate_after(directory, state.step, state.evaluated_step)
    _restore_best(directory, state)
    write_config(directory, config)
    about = read_run_json(directory)
    history = [*about.get("history", []), {**_event("resume", state.step), "command": command}]
    update_run_json(directory, status="running", history=history, versions=versions())


def note_end(directory: Path, event: str, state: TrainState) -> None:
    """Add how this process ended (finished, stopped or failed) to the run's history."""
    ended = {"event": event, "at": _now(), "step": state.step}
    ended["elapsed_seconds"] = state.elapsed_seconds
    update_run_json(directory, history=[*read_run_json(directory).get("history", []), ended])


def _note_failure(directory: Path, error: Exception, state: TrainState) -> None:
    """In run.json: how a run ended that did not get to its own end."""
    status = "stopped" if isinstance(error, stop.Stopped) else "failed"
    update_run_json(directory, status=status, error=str(error))
    history = read_run_json(directory).get("history") or [{}]
    if history[-1].get("event") in ("start", "resume"):
        note_end(directory, status, state)


def resume_command(job: str, directory: Path) -> str:
    """The command line that continues the run."""
    quoted = shlex.quote(str(directory))
    config = shlex.quote(str(directory / "config.yaml"))
    return f"gpt {job} {config} --run-dir {quoted} --resume"


def versions() -> dict[str, str]:
    """Versions of what computes the result."""
    names = ("torch", "datasets", "tiktoken", "tokenizers", "safetensors", "numpy")
    found = {name: version(name) for name in names}
    return {"gptcli": __version__, "python": platform.python_version(), **found}


def machine(device: Device) -> dict[str, Any]:
    """Facts about this machine for run.json."""
    return {
        "hostname": socket.gethostname(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "device": device.kind,
        "device_name": device.name,
    }


def check_fingerprint(
    saved: dict[str, Any] | None, now: dict[str, Any], allow_change: bool
) -> None:
    """Refuse to resume over other data than the run has seen, unless that is allowed.

    A fresh run, whose `saved` is None, has seen none.
    """
    if saved is None:
        return
    changed = [
        f"{name} ({'gone' if name not in now else 'new' if name not in saved else 'changed'})"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if not changed:
        return
    message = f"the data differ from what this run has seen: {', '.join(changed[:5])}"
    if not allow_change:
        raise CheckpointError(message, hint="restore the files, or add --allow-data-change")
    log.warning(f"{message}; going on as told, the order of documents is not the same")


def _event(name: str, step: int) -> dict[str, Any]:
    """An entry of the run's history: when, at which step, and with what."""
    found = {"gptcli": __version__, "torch": version("torch"), "cores": os.cpu_count()}
    return {"event": name, "at": _now(), "step": step, **found}


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


def _before_decay(
    directory: Path, contents: Contents, state: TrainState
) -> tuple[Contents, TrainState]:
    """The last checkpoint before the decay, which becomes the newest; the given one if none is."""
    for path in reversed(checkpoint.list_checkpoints(directory)):
        older = _read_or_none(path)
        if older is not None and not older.state["decaying"]:
            before = TrainState.from_json(older.state["train"])
            log.warning(
                f"the limit has changed and the decay had begun: going on from step"
                f" {before.step}, before the decay, instead of step {state.step}"
            )
            checkpoint.set_aside_after(directory, before.step)
            return older, before
    return contents, state


def _show_rate(contents: Contents, config: Config, state: TrainState) -> None:
    """Warn where changed settings make the learning rate of the next step another one."""
    saved = Config.model_validate(yaml.safe_load(contents.config_yaml))
    old, new = (
        learning_rate(state.step, progress(state, c.training), c.schedule, peak_rate(c))
        for c in (saved, config)
    )
    if old != new:
        log.warning(f"the learning rate at step {state.step} was {old:.3g} and is now {new:.3g}")


def _restore_best(directory: Path, state: TrainState) -> None:
    """best.json as the checkpoint knows it: a kill between the two leaves it behind."""
    step, loss = state.best_step, state.best_loss
    if step is None or loss is None or not checkpoint.checkpoint_dir(directory, step).is_dir():
        return
    checkpoint.write_best(directory, step, loss)


def _flat(config_yaml: str) -> dict[str, Any]:
    sections = yaml.safe_load(config_yaml)
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def _read_or_none(path: Path) -> Contents | None:
    try:
        return read_resumable(path)
    except CheckpointError as error:
        log.warning(f"{path.name} is damaged and skipped: {error}")
        return None


def _now() -> str:
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="seconds")
