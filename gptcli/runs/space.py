"""Where checkpoints are to be saved: room on the disk, and no other run's place."""

import os
import shlex
import shutil
from pathlib import Path

from gptcli.errors import ResourceError
from gptcli.runs.run_dir import CHECKPOINTS


def check_space(run_dir: Path, bytes_needed: int) -> None:
    """ResourceError unless two checkpoints of `bytes_needed` fit: the old one goes last."""
    free = free_bytes(run_dir)
    if free is not None and free < 2 * bytes_needed:
        needed = megabytes(2 * bytes_needed)
        raise ResourceError(
            f"two checkpoints need {needed}, but only {megabytes(free)} are free in {run_dir}",
            hint="free some space, or put the run elsewhere: --run-dir DIR or GPT_RUNS=DIR",
        )


def refuse_link(run_dir: Path) -> None:
    """ResourceError where the checkpoints lie elsewhere, by a symbolic link: they may be another
    run's, which would delete and replace them as its own."""
    saved = run_dir / CHECKPOINTS
    if saved.is_symlink():
        raise ResourceError(
            f"{saved} is a symbolic link to {os.path.realpath(saved)}: a run keeps its checkpoints"
            " itself, so that no other one deletes them",
            hint=f"remove the link: rm {shlex.quote(str(saved))}; a whole run may lie elsewhere",
        )


def free_bytes(path: Path) -> int | None:
    """Free bytes where `path` is or will be; None for file systems that do not tell."""
    while not path.exists() and path != path.parent:
        path = path.parent
    disk = shutil.disk_usage(path)
    return disk.free if disk.total else None


def megabytes(count: int | None) -> str:
    """For people."""
    return "an unknown amount" if count is None else f"{count / 1e6:,.1f} MB"
