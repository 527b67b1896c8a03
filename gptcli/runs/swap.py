"""A file or directory put in the place of another one, or taken away, with all that is in it."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from gptcli.runs.run_dir import sync_directory


def swap_in(temp: Path, target: Path) -> None:
    """Rename `temp` to `target`; one that is there already goes aside first, back on failure: what
    is not on disk for sure is not there."""
    aside = None
    if os.path.lexists(target):
        aside = target.with_name(f".del-{target.name}-{os.getpid()}")
        remove(aside)
        os.rename(target, aside)
    try:
        os.rename(temp, target)
        sync_directory(target.parent)
    except OSError:
        with suppress(OSError):
            os.rename(target, temp)
        if aside is not None:
            os.rename(aside, target)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file, link or directory; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
