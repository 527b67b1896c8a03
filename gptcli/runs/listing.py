"""What a run directory says at a glance; nothing is read but run.json and the end of its log."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcli.runs.holder import Holder, lock_holder
from gptcli.runs.metrics import last_metrics
from gptcli.runs.run_dir import CHECKPOINTS, created, is_run_dir, read_run_json


@dataclass(frozen=True)
class RunSummary:
    """A run as it stands; None where its files do not tell.

    `status` is that of run.json, but killed where that says running and no process is. `loss` is
    the training loss of the last log line, in nats per token, `bits_per_byte` the validation's last
    and `task` the score of a finetuning task by its name. `left_seconds` is what the run itself
    expected when it last told; `bytes` is the size of all its files.
    """

    path: Path
    about: dict[str, Any]  # run.json
    status: str
    holder: Holder | None
    step: int | None
    progress: float | None  # in [0, 1]
    loss: float | None
    bits_per_byte: float | None
    task: tuple[str, float] | None
    tokens: int | None
    tokens_per_second: float | None
    seconds: float | None  # of training steps
    left_seconds: float | None
    bytes: int


def list_runs(root: Path) -> list[RunSummary]:
    """The runs under `root`, the oldest first."""
    paths = [path for path in root.iterdir() if is_run_dir(path)] if root.is_dir() else []
    return sorted((summarise(path) for path in paths), key=lambda r: (created(r.about), r.path))


def summarise(run_dir: Path) -> RunSummary:
    """The summary of one run."""
    about, last = read_run_json(run_dir), last_metrics(run_dir)
    train, evaluation = last.get("train", {}), last.get("eval", {})
    training, scores = _mapping(about, "training"), _mapping(about, "scores")
    status = str(about.get("status") or "unknown")
    holder = lock_holder(run_dir)
    if status == "running" and holder is None:
        status = "killed"
    ended = status not in ("running", "killed")  # else run.json is as old as the run's last start
    first, second = (training, train) if ended else (train, training)
    bits = _number(evaluation.get("bits_per_byte"))
    if bits is None or (ended and _number(scores.get("bits_per_byte")) is not None):
        bits = _number(scores.get("bits_per_byte"))
    return RunSummary(
        path=run_dir,
        about=about,
        status=status,
        holder=holder,
        step=_whole(first.get("step", first.get("steps")), second.get("steps", second.get("step"))),
        progress=1.0 if status == "finished" else _number(train.get("progress")),
        loss=_number(train.get("loss")),
        bits_per_byte=bits,
        task=_task(about, evaluation),
        tokens=_whole(first.get("tokens"), second.get("tokens")),
        tokens_per_second=_number(train.get("tokens_per_second")),
        seconds=_number(train.get("seconds")),
        left_seconds=_number(train.get("left_seconds")),
        bytes=size_bytes(run_dir),
    )


def checkpoint_names(run_dir: Path) -> list[str]:
    """The published checkpoints of a run, the oldest first, without a look into them."""
    found = (run_dir / CHECKPOINTS).glob("step-*/manifest.json")
    return sorted(path.parent.name for path in found)


def size_bytes(path: str | Path) -> int:
    """The size of all files below a directory; links are not followed. What is removed meanwhile
    does not count."""
    try:
        with os.scandir(path) as entries:
            return sum(
                size_bytes(entry.path)
                if entry.is_dir(follow_symlinks=False)
                else entry.stat(follow_symlinks=False).st_size
                for entry in entries
            )
    except OSError:
        return 0


def _task(about: dict[str, Any], evaluation: dict[str, Any]) -> tuple[str, float] | None:
    """The score of the last evaluation, else the first of the final ones."""
    last = _mapping(evaluation, "task")
    value = _number(last.get("value"))
    if value is not None:
        return str(last.get("name")), value
    for name, entry in _mapping(about, "tasks").items():
        value = _number(entry.get("after")) if isinstance(entry, dict) else None
        if value is not None:
            return str(name), value
    return None


def _whole(*values: Any) -> int | None:
    """The first that is a whole number."""
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _mapping(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}
