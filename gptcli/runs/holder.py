"""Who works in a run directory, and asking that process to end."""

import os
import re
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from gptcli import portable, stop
from gptcli.errors import CheckpointError, ResourceError
from gptcli.runs.run_dir import LOCK, NO_LOCKS

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Holder:
    """The process that holds a run's lock; None where the lock does not say."""

    pid: int | None
    host: str | None

    def __str__(self) -> str:
        return "another process" if self.pid is None else f"process {self.pid} on {self.host}"


def lock_holder(run_dir: Path) -> Holder | None:
    """The process that works in `run_dir`, None where there is none.

    A process that was killed holds no lock, whatever run.json says. On file systems without locks
    a process of this machine that lives counts, and any of another machine.
    """
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDONLY | portable.PLAIN | portable.NO_LINK)
    except OSError:
        return None
    try:
        match = re.match(
            r"(\d{1,9}) ([\w.-]+)\n", os.read(descriptor, 300).decode("ascii", "replace")
        )
        holder = Holder(int(match[1]), match[2]) if match else Holder(None, None)
        # Looked at first: the lock that is tried below could be in the way of a process that takes
        # it just then, but not while another holds it.
        if holder.host == socket.gethostname() and not portable.is_alive(holder.pid or 0):
            return None
        portable.lock(descriptor, shared=True)
    except BlockingIOError:
        return holder
    except OSError as error:
        return holder if error.errno in NO_LOCKS else None
    finally:
        os.close(descriptor)
    return None


def stop_run(run_dir: Path, *, save: bool) -> Holder:
    """End the process that works in `run_dir` and wait for that; with `save` it saves first.

    Raises CheckpointError when nobody works there, ResourceError when that process is not to be
    reached from here, `stop.Stopped` (then the run ends all the same).
    """
    holder = lock_holder(run_dir)
    if holder is None:
        raise CheckpointError(f"{run_dir} is not running", hint="see: gpt runs list")
    if holder.pid is None or holder.host != socket.gethostname():
        raise ResourceError(
            f"{run_dir} is in use by {holder}, which cannot be asked from here",
            hint=f"on {holder.host}: gpt runs stop {run_dir}" if holder.host else None,
        )
    try:
        os.kill(holder.pid, signal.SIGTERM if save else portable.KILL)
    except ProcessLookupError:  # it ended just now
        return holder
    except OSError as error:
        raise ResourceError(f"cannot stop {holder}: {error.strerror}") from error
    while lock_holder(run_dir) == holder:
        stop.raise_if_requested()
        time.sleep(POLL_SECONDS)
    return holder
