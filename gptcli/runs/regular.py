"""Files of a run are regular files: whatever else has one of their names is not waited for."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from gptcli import portable
from gptcli.errors import ConfigError, ResourceError

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read. OSError also for a pipe, socket, device or directory, which to open or
    read could take for ever, and for a link, which in a run of somebody else's can lead anywhere.
    """
    descriptor = os.open(path, os.O_RDONLY | portable.NO_WAIT | portable.NO_LINK | portable.PLAIN)
    try:
        _check(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def open_to_append(path: Path) -> int:
    """A descriptor that appends to a file, which is made where there is none.

    ResourceError where it cannot be written, is a link or no regular file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags |= portable.NO_LINK | portable.NO_WAIT | portable.PLAIN
    descriptor = -1
    try:
        descriptor = os.open(path, flags, 0o666)
        _check(descriptor)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        raise unusable("write", path, error) from error
    return descriptor


def refuse_special(path: Path) -> None:
    """ConfigError where `path` is a directory, pipe, socket or device.

    A file that is renamed to its place would take it away, and opening a pipe waits for a reader.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # nothing is there yet, or the writing says what is wrong
        return
    if not stat.S_ISREG(mode):
        what = next((name for is_kind, name in _KINDS if is_kind(mode)), "no file")
        raise ConfigError(f"{path} is {what}", hint="name a file: an old one is replaced")


def unusable(do: str, path: Path, error: OSError) -> ResourceError:
    """What to say where one cannot `do` (read, write) a file of a run."""
    reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
    return ResourceError(
        f"cannot {do} {path}: {reason}",
        hint=f"move it away, or give it to who runs this: ls -l {path.parent}",
    )


def _check(descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(0, "not a regular file")
