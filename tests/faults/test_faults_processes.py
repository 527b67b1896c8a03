"""Several processes of one run, of which one or all go wrong: rows P1 to P7 of the fault matrix.

Real processes, connected by gloo, that fork from this one. The slow tests have torchrun start them.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import errors, hints, warnings
from processes import logged, until
from ranks import Ranks, checkpoints, train_together

from gptcli import pretrain
from gptcli.cli.main import main
from gptcli.runs import sharded
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json
from gptcli.training.parallel import Parallel

Gpt = Callable[..., tuple[int, str, str]]

TINY = ["pretrain", "tiny.yaml", "--run-dir=r"]
ENDLESS = [*TINY, "--set=training.max_steps=1000000", "--set=training.save_every=20"]
STRATEGIES = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
PATIENCE = 120


def shared(strategy: str) -> str:
    return f"--set=distributed.strategy={strategy}"


@contextmanager
def training(*flags: str, steps: int = 25, **given: Any) -> Iterator[Ranks]:
    """Two processes that train until something happens to them."""
    ranks = Ranks([*ENDLESS, *flags], **given)
    try:
        until(lambda: logged(Path("r")) >= steps, PATIENCE)
        yield ranks
    finally:
        for child in ranks.processes:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(child.process, signal.SIGKILL)
                os.waitpid(child.process, 0)


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run) if line["event"] == "train"]


def goes_on(gpt: Gpt, *flags: str) -> None:
    """A resume on two processes, and then one on a single process, add their steps to the rest."""
    saved = int(checkpoints(Path("r"))[-1][5:])
    more = [f"--set=training.max_steps={saved + 2}", "--resume", *flags]
    assert "of 2 processes" in train_together([*TINY, *more])
    code, _, err = gpt(*TINY, f"--set=training.max_steps={saved + 4}", "--resume", *flags)
    assert code == 0, err
    assert steps_of(Path("r")) == list(range(1, saved + 5))
    assert gpt("runs", "verify", "r")[0] == 0


def test_p01_the_end_of_the_data(gpt: Gpt) -> None:
    """P1: all count the rows of all, so the run ends at the same step on every rank, exit 0, and
    where it ends on one, though one of them has a row less to compute in each step."""
    flags = ["--set=training.max_steps=null", "--set=training.max_epochs=1"]
    flags += ["--set=training.tokens_per_step=288", "--set=training.micro_batch_size=1"]
    train_together([*TINY, *flags])
    code, _, err = gpt("pretrain", "tiny.yaml", "--run-dir=one", *flags)
    assert code == 0, err
    assert steps_of(Path("r")) == steps_of(Path("one")) != []
    assert read_run_json(Path("r"))["status"] == "finished"


def not_a_number(after: int) -> Callable[[], None]:
    """Gradients of this process are NaN, behind some steps."""

    def patch() -> None:
        real, calls = Parallel.backward, 0

        def spoilt(self: Parallel, loss: Any) -> None:
            nonlocal calls
            calls += 1
            real(self, loss * float("nan") if calls > after else loss)

        Parallel.backward = spoilt  # type: ignore[method-assign]

    return patch


@STRATEGIES
def test_p02_gradients_of_one_rank_are_not_finite(strategy: str) -> None:
    """P2: gradients of one rank that are not finite are skipped by all; after three in a row all
    end with exit 5, said once, and the last good checkpoint is kept."""
    flags = [shared(strategy), "--set=training.max_steps=20", "--set=training.save_every=4"]
    ranks = Ranks([*TINY, *flags], before={1: not_a_number(after=4)})
    (code, said), (other, silent) = ranks.wait()
    assert (code, other, silent) == (5, 5, ""), said
    assert len(errors(said)) == 1
    assert checkpoints(Path("r"))[-1] == "step-00000004"
    assert read_run_json(Path("r"))["status"] == "failed"


def no_memory() -> None:
    """This process is out of memory in some step."""
    real, calls = Parallel.backward, 0

    def backward(self: Parallel, loss: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise torch.OutOfMemoryError("tried to allocate 20 MiB")
        real(self, loss)

    Parallel.backward = backward  # type: ignore[method-assign]


@STRATEGIES
def test_p02_one_rank_is_out_of_memory(strategy: str) -> None:
    """P2: a rank that is out of memory ends all within seconds, exit 6, said once, with its number
    and what needs less; what was saved before is kept."""
    began = time.monotonic()
    (code, said), (other, silent) = Ranks([*TINY, shared(strategy)], before={1: no_memory}).wait()
    assert time.monotonic() - began < 15
    assert (code, other, silent) == (6, 6, ""), said
    assert errors(said)[0].startswith("rank 1: out of memory: tried to allocate 20 MiB")
    assert checkpoints(Path("r")) == ["step-00000000"]


@STRATEGIES
def test_p02_a_signal_to_one_rank(strategy: str) -> None:
    """P2: SIGTERM to one rank stops all after the same step, saved, exit 143; SIGUSR1 to one saves
    once, and all go on."""
    with training(shared(strategy), "--set=training.save_every=1000000", steps=2) as ranks:
        ranks.processes[1].send(signal.SIGUSR1)
        until(lambda: len(checkpoints(Path("r"))) == 2)
        saved = int(checkpoints(Path("r"))[-1][5:])
        until(lambda: logged(Path("r")) > saved)
        ranks.processes[1].send(signal.SIGTERM)
        (code, said), (other, silent) = ranks.wait()
    assert (code, other, silent) == (143, 143, ""), said
    last = int(checkpoints(Path("r"))[-1][5:])
    assert last > saved
    assert f"stopped by SIGTERM at step {last}; to continue: gpt pretrain" in said


@pytest.mark.parametrize("killed", [1, 0])
def test_p03_a_rank_is_killed(killed: int, gpt: Gpt) -> None:
    """P3: the other ranks end within seconds, exit 6, and say which one is lost; the same command
    line with --resume goes on, on as many processes or on one."""
    with training() as ranks:
        began = time.monotonic()
        ranks.processes[killed].send(signal.SIGKILL)
        found = ranks.wait()
    assert time.monotonic() - began < 10
    process = ranks.processes[killed].process
    code, said = found[1 - killed]
    assert (found[killed][0], code) == (-signal.SIGKILL, 6), said
    assert errors(said)[0].startswith(f"lost rank {killed} (")
    assert f", process {process}) of 2: " in errors(said)[0]
    assert hints(said) == "the same command line with --resume goes on from the last checkpoint"
    goes_on(gpt)


@STRATEGIES
def test_p03_a_rank_hangs(strategy: str) -> None:
    """P3: a rank that does nothing any more counts as lost after distributed.timeout_seconds; it
    ends too when it comes back."""
    with training(shared(strategy), "--set=distributed.timeout_seconds=2", steps=2) as ranks:
        os.kill(ranks.processes[1].process, signal.SIGSTOP)
        began = time.monotonic()
        code, said = ranks.processes[0].wait()
        assert time.monotonic() - began < 15
        assert code == 6, said
        assert errors(said)[0].startswith("lost rank 1 (")
        os.kill(ranks.processes[1].process, signal.SIGCONT)
        assert ranks.processes[1].wait()[0] == 6


def full_disk() -> None:
    """This process can write no share of a checkpoint behind step 0."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter as Writer

    real = Writer.write_data

    def write_data(self: Any, plan: Any, planner: Any) -> Any:
        if "step-00000000" not in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, plan, planner)

    Writer.write_data = write_data  # type: ignore[method-assign]


def bad_disk() -> None:
    """This process can put together no checkpoint behind step 0."""
    real = sharded._put_together

    def put_together(tensors: Any, place: Path, path: Path) -> str:
        if "step-00000000" not in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(tensors, place, path)

    sharded._put_together = put_together


@pytest.mark.parametrize("rank", [0, 1])
def test_p04_one_rank_cannot_save(rank: int) -> None:
    """P4: where one rank cannot write its share of a checkpoint, or rank 0 not put them together,
    none is published: a warning, and another try at the next save; at the last one exit 6 on all,
    and the checkpoint before is kept."""
    fault, why = {0: (bad_disk, "Input/output error"), 1: (full_disk, "No space left on device")}[
        rank
    ]
    flags = [shared("fsdp"), "--set=training.save_every=2", "--set=distributed.timeout_seconds=10"]
    (code, said), (other, silent) = Ranks([*TINY, *flags], before={rank: fault}).wait()
    assert (code, other, silent) == (6, 6, ""), said
    assert "not saved at step 2, trying again later: " in warnings(said)
    assert why in errors(said)[0]
    assert checkpoints(Path("r")) == ["step-00000000"]
    assert not list(Path("r/checkpoints").glob(".tmp-*"))
    assert main(["runs", "verify", "r"]) == 0


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_p05_another_number_of_ranks(sizes: tuple[int, int], gpt: Gpt) -> None:
    """P5: the run goes on with the rows that follow, whatever the number of ranks was, and says
    that its last bits may differ."""
    said = ""
    for size, steps in zip(sizes, (2, 4), strict=True):
        line = [*TINY, "--auto-resume", f"--set=training.max_steps={steps}"]
        line += ["--set=schedule.kind=constant"]
        said = train_together(line) if size == 2 else gpt(*line)[2]
    assert f"processes {sizes[0]} -> {sizes[1]}" in warnings(said)
    straight = ("--run-dir=straight", "--set=schedule.kind=constant")
    assert gpt("pretrain", "tiny.yaml", *straight)[0] == 0
    found = [
        [line["loss"] for line in read_metrics(Path(run)) if line["event"] == "train"]
        for run in ("r", "straight")
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_p06_ranks_that_differ() -> None:
    """P6: ranks with another config or other data than rank 0 are exit 2 on all before a step, said
    once, with the rank's number."""
    Path("other.txt").write_text(Path("text.txt").read_text().replace("cat", "dog"))
    for flag, what in (("seed=5", "config"), ("data.train=other.txt", "data")):
        ranks = Ranks([*TINY, "--overwrite"], only={1: [*TINY, f"--set={flag}"]})
        (code, said), (other, silent) = ranks.wait()
        assert (code, other, silent) == (2, 2, ""), said
        assert f"rank 1 has another {what} than rank 0" in errors(said)
        assert steps_of(Path("r")) == []


def slow_report() -> None:
    """The report of this process takes its time."""

    def write_report(run_dir: Path) -> None:
        Path("reporting").touch()
        until(Path("go").exists, 60)

    pretrain.write_report = write_report


def test_p07_no_rank_ends_before_rank_0() -> None:
    """P7: torchrun kills a rank 30 s after another one ended, so none ends before rank 0 has saved
    and written its report."""
    with training(steps=2, before={0: slow_report}) as ranks:
        for child in ranks.processes:
            child.send(signal.SIGTERM)
        until(Path("reporting").exists)
        time.sleep(0.5)
        assert os.waitpid(ranks.processes[1].process, os.WNOHANG) == (0, 0)
        Path("go").touch()
        assert [code for code, _ in ranks.wait()] == [143, 143]


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """`torchrun` of two processes."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*line, "-m", "gptcli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that a launcher started, by rank."""
    found = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    by_rank = {
        dict(
            entry.split("=", 1)
            for entry in Path(f"/proc/{process}/environ").read_text().split("\0")
            if "=" in entry
        ).get("RANK"): int(process)
        for process in found
    }
    return [by_rank["0"], by_rank["1"]]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
@STRATEGIES
def test_p03_a_rank_of_torchrun_is_killed(strategy: str, gpt: Gpt) -> None:
    """P3: so it is under torchrun, of one rank and of all; torchrun itself ends with 1."""
    for killed in ([1], [0, 1]):
        more = ["--resume"] if Path("r").exists() else []
        before = logged(Path("r"))
        job = torchrun(*ENDLESS, shared(strategy), *more)
        until(lambda: logged(Path("r")) >= before + 25, PATIENCE)  # noqa: B023
        processes = ranks_of(job)
        for rank in killed:
            os.kill(processes[rank], signal.SIGKILL)
        began = time.monotonic()
        _, said = job.communicate(timeout=PATIENCE)
        assert time.monotonic() - began < 15
        assert job.returncode == 1
        if killed == [1]:
            assert "error: lost rank 1 (" in said
            assert f", process {processes[1]}) of 2: " in said
    goes_on(gpt, shared(strategy))


@pytest.mark.slow
def test_p07_torchrun_is_told_to_end(gpt: Gpt) -> None:
    """P7: SIGTERM to torchrun reaches all ranks: saved, and said by rank 0."""
    job = torchrun(*ENDLESS)
    until(lambda: logged(Path("r")) >= 25, PATIENCE)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0
    last = int(checkpoints(Path("r"))[-1][5:])
    assert f"stopped by SIGTERM at step {last}; to continue: gpt pretrain" in said
    assert json.loads(Path("r/run.json").read_text())["status"] == "stopped"
    goes_on(gpt)
