"""Room on a disk for what is to be saved."""

import os
from pathlib import Path

from gptcli.errors import ResourceError


def check_space(run_dir: Path, bytes_needed: int) -> None:
    """ResourceError unless two checkpoints of `bytes_needed` fit: the old one goes last."""
    free = free_bytes(run_dir)
    if free is not None and free < 2 * bytes_needed:
        needed = megabytes(2 * bytes_needed)
        raise ResourceError(
            f"two checkpoints need {needed}, but only {megabytes(free)} are free in {run_dir}",
            hint="free some space, or put the run elsewhere: --run-dir DIR or GPT_RUNS=DIR",
        )


def free_bytes(path: Path) -> int | None:
    """Free bytes where `path` is or will be; None for file systems that do not tell."""
    while not path.exists() and path != path.parent:
        path = path.parent
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None


def megabytes(count: int | None) -> str:
    """For people."""
    return "an unknown amount" if count is None else f"{count / 1e6:,.1f} MB"
