"""Run as a program by code_runs.py: `python -I -S sandbox.py PROGRAM MEMORY_BYTES CPU_SECONDS`.

Confines itself as far as the system allows, then runs PROGRAM as `__main__`. By ordinary means it
neither starts processes, nor uses a network, nor changes a file outside its folder, nor grows
beyond its memory, time and file sizes; it may read what its user may read. This guards against what
a model writes by accident. It is no prison for a program that somebody made to break out (sqlite3,
for one, can attach files that Python does not see, and root may have any number of threads): that
takes a container or a virtual machine.
"""

import ctypes
import os
import resource
import runpy
import signal
import sys
from typing import Any

assert sys.platform != "win32"  # which task_scores.py refuses

MOST_FILE_BYTES = 16 * 2**20
_NEW_USER, _NEW_PROCESSES, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
_DIE_WITH_PARENT = 1  # prctl(2), PR_SET_PDEATHSIG

# Audit events (PEP 578) that a program has no need of to show whether it runs. Those of files are
# allowed inside its own folder.
_REFUSED = (
    "subprocess.",
    "ctypes.",
    "pty.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "socket.connect",
    "socket.bind",
    "socket.send",
    "socket.get",
)
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
    "os.utime",
    "os.setxattr",
    "os.removexattr",
    "os.chflags",
    "shutil.",
)
# What makes files or shared memory and tells nobody: modules, which then are not there, and calls.
_UNSEEN_MODULES = ("_dbm", "_gdbm", "_posixshmem", "_multiprocessing")
_UNSEEN_CALLS = ("mknod", "mkfifo")


def main() -> None:
    """Confine this process, then be the program."""
    program, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _own_namespaces()
    _limit(memory, seconds)
    sys.argv = [program]
    for name in _UNSEEN_CALLS:
        for module in (os, sys.modules["posix"]):
            vars(module).pop(name, None)
    sys.addaudithook(_guard(os.path.realpath(os.curdir)))
    runpy.run_path(program, run_name="__main__")


def _own_namespaces() -> None:
    """Linux, where allowed: no network, and when this process ends, so do all that it started."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        own = _NEW_USER | _NEW_PROCESSES | _NEW_NETWORK | _NEW_IPC
        if libc.unshare(own) != 0 and libc.unshare(own & ~_NEW_USER) != 0:
            return
    except (OSError, AttributeError):  # another system
        return
    child = os.fork()  # the first process of the new namespace
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        raise SystemExit(code if code >= 0 else 128 - code)
    libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _limit(memory: int, seconds: int) -> None:
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: MOST_FILE_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for name, most in limits.items():
        hard = resource.getrlimit(name)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(name, (most, most))
        except (OSError, ValueError):  # macOS has no limit of the address space
            continue


def _guard(folder: str) -> Any:
    """An audit hook that refuses what a program should not do."""

    def inside(path: Any) -> bool:
        if isinstance(path, int):  # a file that is open
            return True
        whole = os.path.realpath(os.fsdecode(path))
        return whole == folder or whole.startswith(folder + os.sep)

    def writes(mode: Any, flags: Any) -> bool:
        by_flags = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(by_flags) or (isinstance(mode, str) and set(mode) & set("wax+") != set())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        refused = event.startswith(_REFUSED)
        if event == "open":
            refused = writes(*arguments[1:3]) and not inside(arguments[0])
        elif event == "import" and arguments[0] in _UNSEEN_MODULES:
            raise ImportError(f"not allowed here: {arguments[0]}")
        elif event == "sqlite3.connect":
            name = os.fsdecode(arguments[0])
            refused = name.startswith("file:") or (name != ":memory:" and not inside(name))
        elif event.startswith(_CHANGES):
            paths = [a for a in arguments if isinstance(a, str | bytes | os.PathLike)]
            refused = not all(map(inside, paths))
        if refused:
            raise PermissionError(f"not allowed here: {event}")

    return hook


if __name__ == "__main__":
    main()
