"""What POSIX has and Windows lacks, with what stands in for it there.

The rest of the code calls nothing that one of them lacks, as `mypy --platform win32` shows. On
Windows itself it has not been run.
"""

import os
import signal
import sys

if sys.platform == "win32":
    import msvcrt

    PLAIN = os.O_NOINHERIT | os.O_BINARY
    NO_WAIT = NO_LINK = 0
    HANG_UP: signal.Signals | None = None
    SAVE: signal.Signals | None = None
    KILL, KILLED = signal.SIGTERM, 1  # any signal ends a process there and then
    _LOCKED = 2**30  # the byte that is locked, behind all that a lock's file says
else:
    import fcntl
    import resource
    import select

    PLAIN = os.O_CLOEXEC
    NO_WAIT, NO_LINK = os.O_NONBLOCK, os.O_NOFOLLOW
    HANG_UP = signal.SIGHUP
    SAVE = signal.SIGUSR1
    KILL, KILLED = signal.SIGKILL, -signal.SIGKILL  # and what subprocess calls the exit code then


def lock(descriptor: int, *, shared: bool = False) -> None:
    """Lock a file until it is closed. BlockingIOError where another process has it, OSError where
    there are no locks. Windows has none that are shared."""
    if sys.platform == "win32":
        os.lseek(descriptor, _LOCKED, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def unlock(descriptor: int) -> None:
    """Give a lock back before the file is closed, for processes that have it open too."""
    if sys.platform == "win32":
        os.lseek(descriptor, _LOCKED, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def sync_names(path: str | os.PathLike[str]) -> None:
    """fsync a directory, so that the names in it survive a power cut. Windows cannot be asked to.
    OSError."""
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def readable(descriptor: int, seconds: float) -> bool:
    """Whether something comes, or the end, within so many seconds. On Windows, which cannot be
    asked, it is said to, and who reads waits."""
    if sys.platform == "win32":
        return True
    else:
        return bool(select.select([descriptor], [], [], seconds)[0])


def is_alive(process: int) -> bool:
    """Whether there is such a process here. On Windows to ask would end it: it is said to be."""
    if sys.platform != "win32":
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except OSError:  # another user's
            return True
    return True


def preemptions() -> int:
    """How often this process has lost a processor before it wanted to."""
    if sys.platform == "win32":
        return 0
    else:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def peak_bytes() -> int:
    """The most memory that was resident, 0 where it cannot be told."""
    if sys.platform == "win32":
        return 0
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def page_bytes() -> int:
    """The size of a page of memory."""
    if sys.platform == "win32":
        return 4096
    return os.sysconf("SC_PAGE_SIZE")


def physical_bytes() -> int | None:
    """The machine's memory, None where it cannot be told."""
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def address_space_limit() -> int | None:
    """Bytes that this process may map, None for no limit."""
    if sys.platform == "win32":
        return None
    else:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        return None if limit == resource.RLIM_INFINITY else limit
