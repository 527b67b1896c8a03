"""The processes that work on one job together, started by torchrun, `--devices` or Slurm.

Each process knows its rank; rank 0 reads and writes the run directory. Before every step they agree
in one small exchange on whether to stop and save, and on the time, which is rank 0's clock. What
one process raises ends all: whoever waits for it finds the connection closed, looks up why, and
ends with the same exit code, or with a `ResourceError` that names the rank that is gone.
"""

import ctypes
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gptcli import stop
from gptcli.errors import GptError, LostRankError, PeerError, ResourceError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("gptcli")

_PATIENCE = timedelta(hours=2)  # for what one rank does while the others wait: saving, sampling
LAUNCHER = "GPT_LAUNCHER"  # the variable with the process that started this one for --devices
AFTERWORD_SECONDS = 5.0  # how long a rank has to say why it ended
# torchrun's names, and those that Slurm gives to the tasks of `srun`.
_RANK, _SIZE = ("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS")
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID")
_LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")


@dataclass(frozen=True)
class World:
    """How many processes there are (`size`; `local_size` of them on this machine), and which of
    them this is (`rank`, counted from 0; `local_rank` on this machine)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process reads and writes the run directory."""
        return self.rank == 0

    def dealt(self, count: int) -> range:
        """Which of `count` things are this process's: every `size`-th."""
        return range(self.rank, count, self.size)


@dataclass
class _Group:
    """The connection to the others: the group that waits for what takes long, where each rank is,
    and what each says last."""

    patient: Any
    places: list[str]
    store: Any
    explained: Exception | None = None  # what a broken connection turned out to be


_world = World()
_group: _Group | None = None


def current() -> World:
    """This process's place among those that `joined` brought together; alone, rank 0 of 1."""
    return _world


def from_environment() -> World:
    """The place that torchrun or `srun` gave to this process."""
    size = _number(_SIZE, 1)
    if size == 1 or "MASTER_ADDR" not in os.environ:
        return World()
    return World(_number(_RANK, 0), size, _number(_LOCAL_RANK, 0), _number(_LOCAL_SIZE, 1))


def end_with_launcher() -> None:
    """Let this process be asked to stop, by SIGTERM, when the one that started it for `--devices`
    is gone, however it ended."""
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None:
        return
    with suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of linux/prctl.h
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def joined(device_kind: str, timeout_seconds: float) -> Iterator[World]:
    """Be one of the processes inside the block.

    A rank from which nothing comes for `timeout_seconds` during a step counts as lost. Raises
    ResourceError when a rank is lost, PeerError when another one ended with an error.
    """
    global _world, _group
    here = from_environment()
    if here.size == 1:
        yield here
        return
    _world, _group = here, _connect(here, device_kind, timeout_seconds)
    try:
        yield here
    except Exception as error:
        reason = explained(error)
        if reason is not error:
            raise reason from error
        if reason is not _group.explained:
            _say(here.rank, _last_word(error))
            _disconnect()
            _let_others_hear()
        raise
    else:
        with suppress(Exception):
            meet()  # torchrun gives a rank 30 s after another one has ended, and then kills it
        _say(here.rank, {"code": 0, "text": "ended before the others"})
    finally:
        _disconnect()
        _world, _group = World(), None


def explained(error: Exception) -> Exception:
    """Why the connection to the others broke, where that is what `error` is; else itself."""
    if _group is None or isinstance(error, GptError | stop.Stopped):
        return error
    if not _is_broken_connection(error):
        return error
    _group.explained = _why(_world, error)
    return _group.explained


def raise_if_stopped(*, patient: bool = False) -> None:
    """Raise `stop.Stopped` for all processes where a stop was asked of any."""
    (number,) = agree([float(stop.requested() or 0)], patient=patient)
    if number:
        if stop.requested() is None:
            stop.request(int(number))
        stop.raise_if_requested()


def patient_group() -> Any:
    """The connection that waits for what takes long; None for a process that is alone."""
    return _group.patient if _group is not None else None


def agree(values: Sequence[float], *, patient: bool = False) -> list[float]:
    """The largest of each of the `values` over all processes. With `patient`, however long one of
    them takes to come."""
    if _group is None:
        return list(values)
    import torch
    import torch.distributed as dist

    given = torch.tensor(values, dtype=torch.float64)
    group = _group.patient if patient else None  # the default one
    dist.all_reduce(given, op=dist.ReduceOp.MAX, group=group)
    return [float(value) for value in given]


def meet() -> None:
    """Wait until all processes are here, however long that takes."""
    agree([0.0], patient=True)


def told(value: Any = None) -> Any:
    """What rank 0 gives here, for all; it must be JSON-able."""
    return gathered(value if _world.leads else None)[0]


def gathered(value: Any) -> list[Any]:
    """What each process gives here, by rank, for all; JSON-able. Waits however long that takes."""
    if _group is None:
        return [value]
    import torch
    import torch.distributed as dist

    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(_world.size)]
    dist.all_gather(sizes, torch.tensor(len(text)), group=_group.patient)
    widest = max(int(size) for size in sizes)
    padded = torch.zeros(widest, dtype=torch.uint8)
    padded[: len(text)] = text
    texts = [torch.zeros(widest, dtype=torch.uint8) for _ in range(_world.size)]
    dist.all_gather(texts, padded, group=_group.patient)
    found = zip(texts, sizes, strict=True)
    return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in found]


def gathered_arrays(arrays: "list[torch.Tensor]") -> "list[list[torch.Tensor]]":
    """The tensors that each process gives here, by rank, for all."""
    if _group is None:
        return [arrays]
    import torch
    import torch.distributed as dist

    about = gathered([[list(a.shape), str(a.dtype).removeprefix("torch.")] for a in arrays])
    found = []
    for rank, descriptions in enumerate(about):
        theirs = []
        for number, (shape, dtype) in enumerate(descriptions):
            there = torch.empty(shape, dtype=getattr(torch, dtype))
            tensor = arrays[number].contiguous() if rank == _world.rank else there
            if tensor.numel():
                dist.broadcast(tensor, src=rank, group=_group.patient)
            theirs.append(tensor)
        found.append(theirs)
    return found


@contextmanager
def first() -> Iterator[None]:
    """Rank 0 goes through the block before the others, who then find what it left on disk."""
    if not _world.leads:
        meet()
    yield
    if _world.leads:
        meet()


def _connect(here: World, device_kind: str, timeout_seconds: float) -> _Group:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=timeout_seconds)
    try:
        store, rank, size = next(rendezvous("env://", here.rank, here.size, timeout=timeout))
        backend = "cpu:gloo,cuda:nccl" if device_kind == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore("gpt", store), rank=rank, world_size=size,
            timeout=timeout,
        )  # fmt: skip
        # Beside the collectives: what a rank says last must not depend on the others.
        said = PrefixStore(f"said-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        said.set(f"place-{here.rank}", f"{socket.gethostname()}, process {os.getpid()}")
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        places = [said.get(f"place-{r}").decode() for r in range(size)]
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ResourceError(
            f"rank {here.rank} of {here.size} could not reach the others at {where} within"
            f" {timeout_seconds:.0f} s: {_first_line(error)}",
            hint="start all of them: gpt pretrain CONFIG --devices N, or torchrun; behind a"
            " firewall open that port",
        ) from error
    return _Group(patient, places, said)


def _disconnect() -> None:
    import torch.distributed as dist

    with suppress(Exception):  # the others may be gone already
        dist.destroy_process_group()


def _say(rank: int, what: dict[str, Any]) -> None:
    """Leave a last word for those who wait for this rank."""
    assert _group is not None
    with suppress(Exception):  # the store may have gone with rank 0
        _group.store.set(f"end-{rank}", json.dumps(what))


def _let_others_hear() -> None:
    """Stay, as rank 0, until the others know why the connection broke: without a launcher, what was
    said goes with this process."""
    assert _group is not None
    silent, until = set(range(1, _world.size)), time.monotonic() + AFTERWORD_SECONDS
    with suppress(Exception):
        while _world.leads and silent and time.monotonic() < until:
            silent = {rank for rank in silent if not _group.store.check([f"end-{rank}"])}
            time.sleep(0.02)


def _last_word(error: Exception) -> dict[str, Any]:
    """Why this process ends, for the others."""
    if isinstance(error, stop.Stopped):
        return {"code": 0, "text": "", "signal": int(stop.requested() or signal.SIGTERM)}
    if isinstance(error, GptError):
        return {"code": error.exit_code, "text": str(error)}
    return {"code": 1, "text": f"{type(error).__name__}: {error}"}


def _why(here: World, error: Exception) -> Exception:
    """Why a connection broke: another rank's last word, or its silence."""
    assert _group is not None
    _say(here.rank, {"code": None, "text": ""})
    silent, until = set(range(here.size)) - {here.rank}, time.monotonic() + AFTERWORD_SECONDS
    while silent and time.monotonic() < until:
        for rank in sorted(silent):
            try:
                if not _group.store.check([f"end-{rank}"]):
                    continue
                word = json.loads(_group.store.get(f"end-{rank}"))
            except RuntimeError:  # the store was rank 0's
                return _lost([0], here, error)
            silent.discard(rank)
            if word.get("signal") is not None:
                stop.request(word["signal"])
                return stop.Stopped()
            if word["code"] is not None:
                said = f"rank {rank}: {word['text']}"
                return PeerError(said, word["code"]) if word["code"] else ResourceError(said)
        time.sleep(0.05)
    return _lost(sorted(silent), here, error)


def _lost(ranks: list[int], here: World, error: Exception) -> GptError:
    assert _group is not None
    if not ranks:
        return ResourceError(f"the connection to the other ranks broke: {_first_line(error)}")
    named = ", ".join(f"rank {rank} ({_group.places[rank]})" for rank in ranks)
    kind = (
        LostRankError
        if 0 in ranks and here.rank == min(set(range(here.size)) - set(ranks))
        else ResourceError
    )
    return kind(
        f"lost {named} of {here.size}: {_first_line(error)}",
        hint="the same command line with --resume goes on from the last checkpoint",
    )


def _is_broken_connection(error: Exception) -> bool:
    """Whether it comes from the exchange with the other processes."""
    import torch.distributed as dist

    texts = ("gloo", "NCCL", "onnection", "Socket", "timed out", "Timed out")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _number(names: Sequence[str], default: int) -> int:
    for name in names:
        text = os.environ.get(name, "")
        if text.isdigit():
            return int(text)
    return default
