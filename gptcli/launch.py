"""`--devices`: this command line once for each device, by torchrun's agent."""

import logging
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gptcli import stop
from gptcli.device import allowed_cpus
from gptcli.errors import ConfigError, ResourceError

_SHUTDOWN_SECONDS = 600  # for the checkpoint that a stop saves, before the agent kills
_PORT = 29400


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
    return Nodes(int(count), f"{first_host(names)}:{_PORT}", job)


def first_host(names: str) -> str:
    """The first of a list of hosts as Slurm writes it: `gpu[03-06,9],cpu1` begins with gpu03."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,]*)", names)
    return f"{found[1]}{found[2] or ''}{found[3]}" if found else names


def launch(arguments: list[str], devices: int, nodes: Nodes) -> int:
    """Run `gpt` with `arguments` in `devices` processes here, and as many on each other machine.

    They share the processors, if OMP_NUM_THREADS does not say otherwise. Returns their exit code;
    ResourceError where one was killed. A signal to this process is one to all of them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, allowed_cpus() // devices)))
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # what it would tell, we say
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=devices,
        run_id=nodes.job,
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.meeting_point or "localhost:0",
        max_restarts=0,
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )
    signal.signal(signal.SIGUSR1, _pass_on)
    try:
        elastic_launch(config, sys.executable)("-m", "gptcli", *arguments)
    except SignalException as error:
        return stop.EXIT_CODES.get(error.sigval, 128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        codes = [found.exitcode for found in error.failures.values() if found.exitcode > 0]
        if codes:  # who ended with it said why
            return int(failure.exitcode if failure.exitcode > 0 else codes[0])
        killer = signal.Signals(-failure.exitcode).name
        raise ResourceError(
            f"rank {rank} (process {failure.pid}) was killed by {killer}; the others have ended",
            hint="the same command line with --resume goes on from the last checkpoint",
        ) from None
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal on to the processes of this machine."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    for child in children.read_text().split() if children.exists() else []:
        os.kill(int(child), number)
