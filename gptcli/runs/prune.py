"""What of the runs can be removed to free disk, and removing it."""

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from gptcli.errors import CheckpointError, ResourceError
from gptcli.runs import checkpoint
from gptcli.runs.holder import lock_holder
from gptcli.runs.listing import size_bytes
from gptcli.runs.metrics import last_metrics
from gptcli.runs.run_dir import (
    CHECKPOINTS,
    MOVED_ASIDE,
    RunLock,
    created,
    has_checkpoint,
    read_run_json,
)
from gptcli.runs.space import refuse_link

log = logging.getLogger("gptcli")

_BEING_MADE = timedelta(minutes=1)  # a run that begins has its lock a moment later than run.json


@dataclass(frozen=True)
class Removal:
    """A directory that can go, the run that it is or lies in, and why."""

    path: Path
    run_dir: Path
    bytes: int
    reason: str


def removable(run_dirs: list[Path]) -> list[Removal]:
    """What can go of these runs; nothing of those in use, or whose checkpoints lie elsewhere.

    Runs that --overwrite moved aside; runs that failed or were killed before their first logged
    step and have no checkpoint; checkpoints that are none of the best, the newest whole one, later
    ones and the last before the decay; and what a killed process left.
    """
    found = []
    for run_dir in run_dirs:
        if run_dir.is_symlink() or lock_holder(run_dir) is not None:
            continue
        try:
            refuse_link(run_dir)
        except ResourceError as error:
            log.warning(f"left alone: {error.message}")
            continue
        reason = _reason(run_dir)
        paths = [(run_dir, reason)] if reason is not None else _parts(run_dir)
        found += [Removal(path, run_dir, size_bytes(path), why) for path, why in paths]
    return found


def remove(removal: Removal) -> bool:
    """Remove it; False, with a warning, where it cannot be, and where the run is in use again."""
    path = removal.path
    try:
        with RunLock(removal.run_dir):
            if path != removal.run_dir:  # a half deleted one must not look like a checkpoint
                aside = path.with_name(f".del-{path.name}-{os.getpid()}")
                path.rename(aside)
                path = aside
            shutil.rmtree(path)
    except ResourceError as error:
        log.warning(f"not removed: {error.message}")
        return False
    except OSError as error:
        log.warning(f"not removed: {removal.path}: {error.strerror}")
        return False
    return True


def last_before_decay(run_dir: Path) -> Path | None:
    """The newest checkpoint made before the learning rate's decay, from which a longer run could go
    on; None where no checkpoint says so."""
    for path in reversed(checkpoint.list_checkpoints(run_dir)):
        try:
            if not checkpoint.read_state(path).get("decaying", True):
                return path
        except CheckpointError:
            continue
    return None


def _reason(run_dir: Path) -> str | None:
    """Why all of the run can go."""
    if MOVED_ASIDE.search(run_dir.name):
        return "moved aside by --overwrite"
    about = read_run_json(run_dir)
    ended = {"failed": "failed", "running": "killed"}.get(str(about.get("status")))
    age = datetime.now(timezone.utc) - created(about)
    if not ended or age < _BEING_MADE or has_checkpoint(run_dir):
        return None
    return None if "train" in last_metrics(run_dir) else f"{ended} before its first logged step"


def _parts(run_dir: Path) -> list[tuple[Path, str]]:
    """What of the run's checkpoints can go, each with why."""
    return [
        *((path, "superseded checkpoint") for path in _superseded(run_dir)),
        *(
            (path, "checkpoint set aside when the run went back")
            for path in sorted((run_dir / CHECKPOINTS).glob("replaced-step-*"))
        ),
        *(
            (path, "left by a killed process")
            for path in sorted((run_dir / CHECKPOINTS).glob(".*-step-*"))
            if not checkpoint.is_whole(path)  # a resume puts it back where it was
        ),
    ]


def _superseded(run_dir: Path) -> Iterator[Path]:
    paths = checkpoint.list_checkpoints(run_dir)
    best, kept = checkpoint.read_best(run_dir), {last_before_decay(run_dir)}
    if best is not None:
        kept.add(checkpoint.checkpoint_dir(run_dir, best[0]))
    if not set(paths[:-1]) - kept:
        return  # so that nothing is hashed for nothing
    newest = next(filter(checkpoint.is_sound, reversed(paths)), None)
    if newest is None:
        return
    for path in paths[: paths.index(newest)]:  # later ones are damaged, and left alone
        if path not in kept and not path.is_symlink():
            yield path
