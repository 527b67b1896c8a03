"""How a run begins: afresh in a new directory, or from the newest valid checkpoint of one."""

import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from gptcli import __version__, stop, world
from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.device import Device, memory_bytes
from gptcli.errors import CheckpointError, GptError, ResourceError
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.continuity import rhythm_facts
from gptcli.runs.log_file import log_file
from gptcli.runs.metrics import truncate_after
from gptcli.runs.run_dir import (
    RunLock,
    has_checkpoint,
    new_run_dir,
    newest_unfinished,
    read_run_json,
    resume_line,
    runs_root,
    update_run_json,
    write_atomic,
    write_json_atomic,
)
from gptcli.runs.space import refuse_link
from gptcli.training.resuming import Place, place_to_resume
from gptcli.training.saved import read_resumable
from gptcli.training.state import TrainState

log = logging.getLogger("gptcli")

Resume = Literal["no", "resume", "auto"]


@dataclass(frozen=True)
class Start:
    """Where a run begins: its directory, and the checkpoint it goes on from, if any."""

    job: str
    directory: Path
    contents: Contents | None
    state: TrainState
    done: bool  # the run has finished and its limit is as it was
    began: float  # when this process's work began, of time.monotonic()
    take_over: Callable[[], None] = lambda: None  # to be called once the run is sure to go on

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

    The lock is held inside the block; an error there is noted in run.json. A resume that is refused
    before the block calls `take_over` leaves the run as it was. log.txt gets every record of the
    library's logger meanwhile. Behind the block torch has as many threads as before
    it: those that a race chose are this run's alone.
    """
    began = time.monotonic() if began is None else began
    if not world.current().leads:
        yield _following(job, began)
        return
    directory, resuming = choose_run_dir(config, run_dir, resume, overwrite)
    refuse_link(directory)
    with RunLock(directory), log_file(directory):
        checkpoint.clean_leftovers(directory)
        world.told([str(directory), resuming])
        before: dict[str, bytes] = {}
        if resuming:
            place = place_to_resume(directory, config)
            world.told([place.state.to_json(), place.done, bool(place.contents.model)])
            world.meet()  # all have read what is changed next
            before = {name: (directory / name).read_bytes() for name in _existing(directory)}
            if not place.done:
                note_resume(directory, config, place.state, command)
            take_over = partial(_take_over, directory, place, before)
            state = place.state
            start = Start(job, directory, place.contents, state, place.done, began, take_over)
        else:
            write_new_run(directory, config, command, job)
            start = Start(job, directory, None, TrainState(), False, began)
        threads = torch.get_num_threads()
        try:
            yield start
        except Exception as error:
            reason = world.explained(error)
            if isinstance(reason, GptError | stop.Stopped):
                _note_end(directory, reason, before, start.state)
            if reason is not error:
                raise reason from error
            raise
        finally:
            torch.set_num_threads(threads)


def _following(job: str, began: float) -> Start:
    """Where a process begins that goes along with rank 0, which looks after the directory."""
    place, resuming = world.told()
    directory = Path(place)
    if not resuming:
        return Start(job, directory, None, TrainState(), False, began)
    found, done, whole = world.told()
    state = TrainState.from_json(found)
    # Rank 0 has compared it with its manifest, for all.
    source = checkpoint.checkpoint_dir(directory, state.step)
    contents = read_resumable(source, tensors=whole, hashes=False)
    world.meet()
    return Start(job, directory, contents, state, done, began)


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
            "history": [{**_event("start", 0), **rhythm_facts(config)}],
        },
    )


def write_config(directory: Path, config: Config) -> None:
    """config.yaml of the run, which rank 0 writes: `gpt pretrain` of it repeats the run."""
    if world.current().leads:
        write_atomic(directory / "config.yaml", dump_config(config, loadable=True).encode())


def note_resume(directory: Path, config: Config, state: TrainState, command: str) -> None:
    """The config of a resume in config.yaml, and the resume in run.json."""
    write_config(directory, config)
    entry = {**_event("resume", state.step), **rhythm_facts(config), "command": command}
    history = [*_history(directory), entry]
    update_run_json(directory, status="running", history=history, versions=versions())


def _take_over(directory: Path, place: Place, before: dict[str, bytes]) -> None:
    """Make `place` the end of the run so far: cut the logs and best.json back to it. From now on
    there is no way back to the files as they were `before`."""
    before.clear()
    if place.gives_up_later:
        checkpoint.set_aside_after(directory, place.state.step)
    truncate_after(directory, place.state.step, place.state.evaluated_step)
    _restore_best(directory, place.state)


def _existing(directory: Path) -> list[str]:
    return [name for name in ("config.yaml", "run.json") if (directory / name).is_file()]


def note_end(directory: Path, event: str, state: TrainState) -> None:
    """Add how this process ended (finished, stopped or failed) to the run's history."""
    ended = {"event": event, "at": _now(), "step": state.step}
    ended["elapsed_seconds"] = state.elapsed_seconds
    update_run_json(directory, history=[*_history(directory), ended])


def _history(directory: Path) -> list[dict[str, Any]]:
    """What run.json tells of the run's starts and ends."""
    entries = read_run_json(directory).get("history")
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def _note_end(
    directory: Path, error: Exception, before: dict[str, bytes], state: TrainState
) -> None:
    """Leave the files of a refused resume as they were `before`; else note in run.json how a run
    ended that did not get to its own end."""
    with suppress(ResourceError):  # a full disk: why the run ended is what matters
        for name, content in before.items():
            write_atomic(directory / name, content)
        if not before:
            _note_failure(directory, error, state)


def _note_failure(directory: Path, error: Exception, state: TrainState) -> None:
    status = "stopped" if isinstance(error, stop.Stopped) else "failed"
    update_run_json(directory, status=status, error=str(error))
    if any(entry.get("event") in ("start", "resume") for entry in _history(directory)[-1:]):
        note_end(directory, status, state)


def resume_command(job: str, directory: Path) -> str:
    """The command line that continues the run."""
    return resume_line(job, directory, world.current().size)


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


def _restore_best(directory: Path, state: TrainState) -> None:
    """best.json as the checkpoint knows it: a kill between the two leaves it behind."""
    step, loss = state.best_step, state.best_loss
    if step is None or loss is None or not checkpoint.checkpoint_dir(directory, step).is_dir():
        return
    checkpoint.write_best(directory, step, loss)


def _now() -> str:
    return datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="seconds")
