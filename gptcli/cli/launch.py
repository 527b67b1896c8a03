"""`--devices`: this command line once for each device, by torchrun's agent."""

import logging
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from gptcli import stop
from gptcli.device import allowed_cpus
from gptcli.errors import ConfigError, ResourceError
from gptcli.world import AFTERWORD_SECONDS, LAUNCHER

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

log = logging.getLogger("gptcli")

_PORT = 29400
_JOBS = 3000  # ports from _PORT on, and below those that systems give to any program
_GATHER_SECONDS = 600  # between the first machine of a job and the last
_LEAST_SHUTDOWN_SECONDS = 10  # for processes to end by themselves when another one failed
_NOTICE = b"\nstopping, and saving what there is to save; Ctrl-C again quits at once\n"
assert sys.platform != "win32"  # run_flags.py refuses --devices there
_ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Nodes:
    """The machines of a job: how many, and where their processes meet ("" on a single one)."""

    count: int = 1
    meeting_point: str = ""
    job: str = "gpt"


def nodes_of(given: str | None) -> Nodes:
    """The machines that `--nodes` names: HOST:PORT of the first with a number, as 2@node01:29400,
    or `slurm`, whose environment says it. ConfigError for anything else."""
    if given is None:
        return Nodes()
    if given == "slurm":
        return _slurm_nodes()
    found = re.fullmatch(r"(\d+)@([\w.-]+)(?::(\d+))?", given)
    if found is None or not int(found[1]):
        raise ConfigError(
            f"--nodes {given!r} is neither slurm nor NUMBER@HOST[:PORT]",
            hint="--nodes 2@node01:29400, the same on each machine",
        )
    return Nodes(int(found[1]), f"{found[2]}:{found[3] or _PORT}")


def _slurm_nodes() -> Nodes:
    count, names = os.environ.get("SLURM_NNODES", ""), os.environ.get("SLURM_JOB_NODELIST", "")
    if not count.isdigit() or not names:
        raise ConfigError(
            "--nodes slurm: SLURM_NNODES and SLURM_JOB_NODELIST are not set",
            hint="srun --ntasks-per-node=1 gpt pretrain CONFIG --devices N --nodes slurm",
        )
    job = os.environ.get("SLURM_JOB_ID", "gpt")
    # Jobs that share a machine must not meet at the same port.
    port = _PORT + (int(job) % _JOBS if job.isdigit() else 0)
    return Nodes(int(count), f"{first_host(names)}:{port}", job)


def first_host(names: str) -> str:
    """The first of a list of hosts as Slurm writes it: `gpu[03-06,9],cpu1` begins with gpu03."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,]*)", names)
    return f"{found[1]}{found[2] or ''}{found[3]}" if found else names


def check_devices(devices: int, device: str, gpus: int) -> None:
    """ConfigError or ResourceError where a machine with `gpus` GPUs has no `devices` devices of
    training.device `device`. On a CPU there may be any number."""
    kind, _, index = device.partition(":")
    if devices > 1 and (index or kind == "mps"):
        raise ConfigError(
            f"training.device {device} is a single device, and --devices {devices} are several",
            hint="--set training.device=cuda",
        )
    if kind == "cuda" and not gpus:
        raise ResourceError(
            f"--devices {devices}: torch finds no GPU here", hint="gpt doctor says why"
        )
    if kind in ("auto", "cuda") and gpus and devices > gpus:
        raise ResourceError(
            f"--devices {devices}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}",
            hint=f"--devices {gpus}; on the processors: --set training.device=cpu",
        )


def launch(
    arguments: list[str], devices: int, nodes: Nodes, device: str, timeout_seconds: float
) -> int:
    """Run `gpt` with `arguments` in `devices` processes here, and as many on each other machine.

    They share the processors, if OMP_NUM_THREADS does not say otherwise. Returns their exit code.
    A signal to this process is one to all of them. ConfigError or ResourceError where `devices` are
    not here; ResourceError where the other machines are not, or all processes were killed.
    """
    import torch
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    check_devices(devices, device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, allowed_cpus() // devices)))
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # what it would tell, we say
            logging.getLogger(name).setLevel(logging.CRITICAL)
    signals = _Signals()
    with signals.answered():
        if nodes.count > 1:
            log.info(f"meeting {nodes.count - 1} more of {nodes.count} at {nodes.meeting_point}")
            _await_meeting_point(nodes.meeting_point, timeout_seconds)
        os.environ[LAUNCHER] = str(os.getpid())
        try:
            signals.agent = _agent(arguments, devices, nodes, timeout_seconds)
            result = signals.agent.run()
        except RendezvousError as error:
            raise ResourceError(
                f"not all of {nodes.count} machines came to {nodes.meeting_point}: {error}",
                hint="the same command line on each of them, within ten minutes",
            ) from error
        finally:
            del os.environ[LAUNCHER]
        if result.is_failed() and nodes.count > 1:
            # Processes elsewhere ask what this machine keeps why others have ended.
            time.sleep(AFTERWORD_SECONDS)
    return _exit_code(result, signals.asked)


def _agent(
    arguments: list[str], devices: int, nodes: Nodes, timeout_seconds: float
) -> "LocalElasticAgent":
    """What starts the processes of this machine and waits for them. When one has failed, the others
    have `timeout_seconds` to end: one that hangs is killed then."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous.api import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    # Signals are answered here: torch's own handlers would take a second one for the end.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    meeting = RendezvousParameters(
        "c10d",
        nodes.meeting_point or "localhost:0",
        nodes.job,
        nodes.count,
        nodes.count,
        join_timeout=_GATHER_SECONDS,
    )
    handler = get_rendezvous_handler(meeting)
    # Who comes later is no reason to begin again, and a first machine that went away no error:
    # the processes notice, and know why.
    setattr(handler, "num_nodes_waiting", lambda: 0)  # noqa: B010
    spec = WorkerSpec(
        role="gpt",
        local_world_size=devices,
        rdzv_handler=handler,
        entrypoint=sys.executable,
        args=("-m", "gptcli", *arguments),
        max_restarts=0,
    )
    grace = max(_LEAST_SHUTDOWN_SECONDS, math.ceil(timeout_seconds))
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(), shutdown_timeout=grace)
    _give_time(agent, grace)
    return agent


def _give_time(agent: "LocalElasticAgent", seconds: int) -> None:
    """Let processes have `seconds` to end also where one has failed: torch takes its
    shutdown_timeout only where the agent itself is told to end, else half a minute."""
    start = agent._start_workers

    def start_workers(group: "WorkerGroup") -> dict[int, Any]:
        found, processes = start(group), agent._pcontext
        assert processes is not None
        close = processes.close
        setattr(processes, "close", lambda number=None, timeout=0: close(number, seconds))  # noqa: B010
        return found

    setattr(agent, "_start_workers", start_workers)  # noqa: B010


class _Signals:
    """Answers the signals to this process by passing them on to those that it started."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None  # to stop
        self.agent: LocalElasticAgent | None = None

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Inside the block; what is ignored, as under nohup, stays ignored."""
        before = {
            number: signal.signal(number, self._pass_on)
            for number in _ANSWERED
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        started = self._started()
        if number == signal.SIGUSR1:
            for process in filter(_listens, started):
                os.kill(process, number)
            return
        if number == signal.SIGINT and self.asked is signal.SIGINT:
            for process in started:
                with suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
            raise stop.Stopped
        self.asked = signal.Signals(number)
        stop.request(number)
        if number == signal.SIGINT and sys.stderr is not None and sys.stderr.isatty():
            os.write(sys.stderr.fileno(), _NOTICE)
        for process in started:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        if not started:
            raise stop.Stopped

    def _started(self) -> list[int]:
        group = self.agent.get_worker_group() if self.agent is not None else None
        return [w.id for w in group.workers if isinstance(w.id, int)] if group is not None else []


def _listens(process: int) -> bool:
    """Whether a process has begun to listen to SIGUSR1, which would kill it until then."""
    try:
        with open(f"/proc/{process}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def _await_meeting_point(place: str, seconds: float) -> None:
    """Wait until the first machine answers; ResourceError where it does not."""
    host, _, port = place.rpartition(":")
    if _is_here(host):
        return
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ResourceError(
                    f"--nodes: nobody at {place} for {seconds:.0f} s: {error.strerror or error}",
                    hint=f"start the same command line on {host}, and open its port {port}",
                ) from error
        time.sleep(0.5)


def _is_here(host: str) -> bool:
    """Whether an address of `host` is one of this machine's."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as own:
            own.bind(address)
            return True
    return False


def _exit_code(result: "RunResult", asked: signal.Signals | None) -> int:
    """What all processes of this machine together ended with; ResourceError or Stopped where they
    were killed before they could say anything."""
    if not result.is_failed():
        return 0
    codes = [failure.exitcode for failure in result.failures.values()]
    if asked is not None and stop.EXIT_CODES[asked] in codes:
        return stop.EXIT_CODES[asked]
    if asked is not None and -asked in codes:  # they did not listen yet
        raise stop.Stopped
    rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
    said = [code for code in (failure.exitcode, *codes) if code > 0]
    if said:  # and why
        return said[0]
    killer = signal.Signals(-failure.exitcode).name
    raise ResourceError(
        f"rank {rank} (process {failure.pid}) was killed by {killer}; the others have ended",
        hint="the same command line with --resume goes on from the last checkpoint",
    )
