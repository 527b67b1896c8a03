"""Disks that are full, failing or slow, memory that does not suffice: the R rows of the matrix.

Each test names its row and says what the row owes: exit code, message, hint, and what is kept.
"""

import errno
import json
import logging
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch
from forked import Forked
from outcome import errors, hints, warnings
from processes import logged, started, training, until
from small import PROSE

from gptcli.data.rows import Prefetch
from gptcli.runs import checkpoint
from gptcli.runs.metrics import MetricsLog, read_metrics
from gptcli.runs.run_dir import read_run_json
from gptcli.training import session, step

Gpt = Callable[..., tuple[int, str, str]]

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc and prlimit")
TRAIN = ("pretrain", "tiny.yaml", "--run-dir=r")
SAVE_OFTEN = ("--set=training.max_steps=1000000", "--set=training.save_every=10")
TOO_SMALL = 40_000  # bytes: for the model's file, not for the logs of a test
CONSTANT = "--set=schedule.kind=constant"  # no resume goes back behind a decay
ADAMW = "--set=optimizer.kind=adamw"


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.list_checkpoints(run_dir)]


def told_steps(run_dir: Path) -> list[int]:
    return [r["step"] for r in read_metrics(run_dir) if r["event"] == "train"]


def leftovers(run_dir: Path) -> list[str]:
    return [p.name for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]


def limit_files(child: Forked, most_bytes: int) -> None:
    """From now on no file of the process can grow beyond that: as a disk that is full."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.prlimit(child.process, resource.RLIMIT_FSIZE, (most_bytes, hard))


@contextmanager
def without_room(folder: Path) -> Iterator[tuple[Forked, int]]:
    """A run that has saved, has no room for another checkpoint any more, and has trained on; and
    its last checkpoint."""
    run = folder / "r"
    with started(*TRAIN, *SAVE_OFTEN) as child:
        until(lambda: (run / "checkpoints").exists() and steps(run)[-1:] > [0])
        limit_files(child, TOO_SMALL)
        time.sleep(0.02)  # a save that is being published
        last = steps(run)[-1]
        until(lambda: logged(run) > last + 12)
        assert steps(run)[-1] == last
        yield child, last


@needs_proc
def test_r01_training_goes_on(folder: Path) -> None:
    """R1: where the disk is full at a save, or a limit of file sizes is reached, the run trains on
    with a warning that says so; older checkpoints stay, nothing half-written does, and once there
    is room the next save works."""
    with without_room(folder) as (child, last):
        assert leftovers(folder / "r") == []
        checkpoint.verify(checkpoint.checkpoint_dir(folder / "r", last))
        limit_files(child, resource.RLIM_INFINITY)
        until(lambda: steps(folder / "r")[-1] > last)
        child.send(signal.SIGTERM)
        code, err = child.wait()
    assert code == 143, err
    first = warnings(err).splitlines()[0]
    assert first.startswith(f"not saved at step {last + 10}, trying again later: checkpoint of")
    assert "a file of it is larger than this process may write" in first
    for path in checkpoint.list_checkpoints(folder / "r"):
        checkpoint.verify(path)
    assert steps(folder / "r")[-1] == told_steps(folder / "r")[-1]


@needs_proc
def test_r01_the_last_save(gpt: Gpt, folder: Path) -> None:
    """R1: where the last save fails, exit 6 with the reason; the older checkpoint stays, and
    a resume goes on from it."""
    with without_room(folder) as (child, last):
        child.send(signal.SIGTERM)
        code, err = child.wait()
    assert code == 6
    (line,) = errors(err)
    assert line.startswith("checkpoint of step ")
    assert "is not saved: a file of it is larger than this process may write" in line
    assert hints(err) == "ulimit -f unlimited"
    assert steps(folder / "r")[-1] == last
    assert leftovers(folder / "r") == []
    assert read_run_json(folder / "r")["status"] == "failed"
    more = f"--set=training.max_steps={last + 3}"
    code, _, err = gpt(*TRAIN, "--resume", "--set=training.save_every=10", more)
    assert code == 0, err
    assert told_steps(folder / "r") == list(range(1, last + 4))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a batch ends with exit code 1."""

    def train(*_: Any) -> None:
        raise AssertionError("a batch was asked for")

    monkeypatch.setattr(Prefetch, "next", train)


@pytest.mark.usefixtures("no_training")
def test_r02_no_room_for_two(gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: the old checkpoint goes when the new one is there, so two must fit: otherwise exit 6
    before the first step, with both figures."""
    disk = os.statvfs_result((4096, 4096, 10_000, 2500, 2500, 100, 100, 100, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    code, out, err = gpt(*TRAIN)
    assert (code, out) == (6, "")
    assert errors(err) == ["two checkpoints need 16.9 MB, but only 10.2 MB are free in r"]
    assert hints(err) == "free some space, or put the run elsewhere: --run-dir DIR or GPT_RUNS=DIR"
    assert steps(folder / "r") == []


@needs_proc
def test_r03_logs(folder: Path) -> None:
    """R3: on a full disk the run goes on; the lines of its log wait, with one warning, and come
    once there is room: none is missing."""
    log = folder / "r" / "metrics.jsonl"
    with training(folder / "r") as child:
        limit_files(child, log.stat().st_size)
        time.sleep(0.1)  # some thirty steps
        size, before = log.stat().st_size, logged(folder / "r")
        time.sleep(0.05)
        assert log.stat().st_size == size
        limit_files(child, resource.RLIM_INFINITY)
        until(lambda: logged(folder / "r") > before + 2)
        child.send(signal.SIGTERM)
        code, err = child.wait()
    assert code == 143, err
    lines = [line for line in warnings(err).splitlines() if "metrics.jsonl" in line]
    assert len(lines) == 1
    assert "metrics.jsonl: File too large; its lines wait until there is room" in lines[0]
    found = told_steps(folder / "r")
    assert found == list(range(1, found[-1] + 1))
    assert found[-1] > before + 2


def test_r03_an_end_without_room(folder: Path) -> None:
    """R3: a run that ends while the disk is full ends with exit 6 and what it could not write; what
    was saved before stays."""
    with training(folder / "r", steps=20) as child:  # log.txt has lines that are not written yet
        limit_files(child, 0)
        time.sleep(0.05)
        child.send(signal.SIGTERM)
        code, err = child.wait()
    assert code == 6, err
    assert "internal" not in err
    assert "r/run.json: File too large" in errors(err)[0] or "is not saved" in errors(err)[0]
    assert steps(folder / "r") == [0]


def failing(call: str, code: int, name: str) -> Callable[..., Any]:
    """A system call that fails where the file or the old name has `name` in it."""
    real = getattr(os, call)

    def run(target: Any, *rest: Any, **keys: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if name in path:
            raise OSError(code, os.strerror(code))
        return real(target, *rest, **keys)

    return run


@needs_proc
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_r04_a_failing_disk(
    call: str, code: int, gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R4: a checkpoint whose fsync or rename fails is not saved, with the disk's reason; the run
    goes on, and its next checkpoint is whole. At the last one, exit 6, and the one before stays."""
    flags = (
        "--set=training.save_every=2",
        "--set=training.max_steps=6",
        "--set=schedule.kind=linear",
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(call, code, ".tmp-step-00000002"))
        assert gpt(*TRAIN, *flags)[0] == 0
    reason = os.strerror(code)
    log = (folder / "r" / "log.txt").read_text()
    assert (
        f"not saved at step 2, trying again later: checkpoint of step 2 is not saved: {reason}"
        in log
    )
    assert steps(folder / "r")[-2:] == [4, 6]
    for path in checkpoint.list_checkpoints(folder / "r"):
        checkpoint.verify(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(call, code, ".tmp-step-00000006"))
        result = gpt("pretrain", "tiny.yaml", "--run-dir=other", *flags)
    assert result[0] == 6
    assert errors(result[2])[0].startswith(f"checkpoint of step 6 is not saved: {reason}; it needs")
    assert steps(folder / "other")[-1] == 4
    assert leftovers(folder / "other") == []


@needs_proc
def test_r04_a_directory_that_cannot_be_synced(
    gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R4: where the new name of a checkpoint may not be on disk, it is not saved, and not there."""
    real = os.fsync

    def fail(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "checkpoints" and (path / "step-00000002").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    flags = ("--set=training.save_every=2", "--set=training.max_steps=4")
    monkeypatch.setattr(os, "fsync", fail)
    code, _, err = gpt(*TRAIN, *flags, "--set=schedule.kind=linear")
    assert code == 0, err
    assert "not saved at step 2" in warnings(err)
    assert steps(folder / "r") == [0, 4]
    assert leftovers(folder / "r") == []


@needs_proc
def test_r04_a_power_cut_after_a_save(
    gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R4: the lines of metrics.jsonl and samples.jsonl up to a checkpoint are on disk before it is,
    and the names of the run directory and of the folder it is in before either."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def move(source: Path, target: Path) -> None:
        rename(source, target)
        done.append(f"published {target.name}")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", move)
    (folder / "deep").mkdir()
    code, _, err = gpt("pretrain", "tiny.yaml", "--run-dir=deep/r", "--set=training.max_steps=2")
    assert code == 0, err
    assert done.index("deep") < done.index(folder.name) < done.index("published step-00000000")
    first, last = (done.index(f"published step-0000000{step}") for step in (0, 2))
    assert {"metrics.jsonl", "samples.jsonl"} <= set(done[:first])
    assert {"metrics.jsonl", "samples.jsonl"} <= set(done[first:last])


def test_r04_lines_that_no_disk_took(folder: Path) -> None:
    """R4: lines of metrics.jsonl that could not be written until the end are counted in a
    warning."""
    path = folder / "small"
    path.mkdir()

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        with MetricsLog(path) as log:
            for step in range(9):
                log.write({"event": "train", "step": step})
        os.write(2, "".join(told).encode())

    told: list[str] = []
    logging.getLogger("gptcli").addHandler(handler := _Told(told))
    try:
        Forked(["--version"], before=full).wait()
        err = Forked(["--version"], before=full).wait()[1]
    finally:
        logging.getLogger("gptcli").removeHandler(handler)
    assert "its lines wait until there is room" in err
    assert "metrics.jsonl: its last " in err
    assert " lines are lost" in err
    assert len(read_metrics(path)) < 9


class _Told(logging.Handler):
    """Keeps messages in a list."""

    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self._told.append(record.getMessage() + "\n")


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "log.txt"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "link"])
def test_k16_no_regular_file_where_a_log_is(
    name: str, kind: str, gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K16: a pipe, directory or link with the name of a log is never waited for nor written into:
    exit 6 with its name and what to do; lists of runs are shown all the same."""
    assert gpt(*TRAIN, CONSTANT)[0] == 0
    place = folder / "r" / name
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "directory":
        place.mkdir()
    else:
        place.symlink_to(folder / "text.txt")
    text = (folder / "text.txt").read_bytes()
    code, _, err = gpt(*TRAIN, CONSTANT, "--resume", "--set=training.max_steps=8")
    assert code == 6
    (line,) = errors(err)
    assert line.startswith(("cannot read ", "cannot write "))
    assert f"r/{name}: " in line
    assert "ls -l r" in hints(err)
    assert (folder / "text.txt").read_bytes() == text
    monkeypatch.setenv("GPT_RUNS", ".")
    code, out, err = gpt("runs", "list")
    assert (code, out.splitlines()[1].split()[0]) == (0, "r"), err
    assert gpt("runs", "verify", "r")[0] in (0, 4, 6)


@needs_proc
@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_k16_a_log_of_another_user(name: str, gpt: Gpt, folder: Path) -> None:
    """K16: a log that belongs to another user and cannot be written is exit 6, with its name."""
    assert gpt(*TRAIN, CONSTANT)[0] == 0
    for path in (folder, *(folder / "r").rglob("*")):
        path.chmod(0o777)
    (folder / "r").chmod(0o777)
    (folder / "r" / name).chmod(0o444)

    def become_nobody() -> None:
        os.setgid(65534)
        os.setuid(65534)

    if os.getuid():
        pytest.skip("only root can become another user")
    child = Forked(
        [*TRAIN, CONSTANT, "--resume", "--set=training.max_steps=8"], before=become_nobody
    )
    code, err = child.wait()
    assert code == 6, err
    (line,) = errors(err)
    assert line == f"cannot write r/{name}: Permission denied"
    assert "ls -l r" in hints(err)


def less_memory(more_bytes: int) -> Callable[[], None]:
    """For a child: it can take only so much more memory."""

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

    return limit


def said_command(err: str) -> list[str]:
    """The arguments of the command line, behind `gpt`, that the last hint ends with."""
    words = shlex.split(hints(err).splitlines()[-1].rpartition(": ")[2])
    assert words[0] == "gpt"
    return words[1:]


@needs_proc
def test_r05_a_model_that_does_not_fit(folder: Path) -> None:
    """R5: exit 6 before the model is made, with the memory that its weights, gradients and
    optimizer need and the memory that is free, and the settings to lower. Activations are not in
    that figure: `gpt plan` of the run's config, which a hint gives, has the whole estimate."""
    large = ("--set=model.n_embd=2048", "--set=model.n_layer=4")
    code, err = Forked([*TRAIN, *large], before=less_memory(300 * 2**20)).wait()
    assert code == 6
    (line,) = errors(err)
    assert "parameters: their weights, gradients and optimizer alone need 2.2" in line
    assert "GiB of memory on cpu, free are 0." in line
    for word in ("model.n_embd", "model.n_layer", "tokenizer.vocab_size"):
        assert word in hints(err)
    assert read_run_json(folder / "r")["status"] == "failed"
    assert said_command(err) == ["plan", "r/config.yaml"]
    plan = Forked([*said_command(err), "--json"], before=less_memory(300 * 2**20))
    memory = json.loads(plan.stdout.read())["memory"]
    assert plan.wait()[0] == 6
    assert memory["activations_bytes"] > 0
    assert memory["weights_bytes"] > 700 * 2**20


@needs_proc
def test_r05_a_step_that_does_not_fit(folder: Path) -> None:
    """R5: a step is tried before the first: where it runs out of memory, smaller micro batches are
    tried, each told; where one row is too much, exit 6 with what to lower, and nothing is trained
    or saved."""
    (folder / "text.txt").write_text(PROSE * 20)
    wide = ("--set=model.block_size=65536", "--set=model.n_embd=256", "--set=model.n_layer=2")
    rows = ("--set=training.tokens_per_step=262144", "--set=training.micro_batch_size=4")
    child = Forked([*TRAIN, *wide, *rows, ADAMW], before=less_memory(160 * 2**20))
    code, err = child.wait()
    assert code == 6
    assert errors(err) == ["out of memory on cpu with micro batches of one row of 65536 tokens"]
    for half in ("4 -> 2", "2 -> 1"):
        assert f"out of memory: micro_batch_size {half}, more of them a step" in warnings(err)
    assert "model.block_size, n_layer or n_embd" in hints(err)
    assert said_command(err) == ["plan", "r/config.yaml"]
    assert read_run_json(folder / "r")["status"] == "failed"
    assert steps(folder / "r") == told_steps(folder / "r") == []


def running_out(patch: pytest.MonkeyPatch, when: Callable[[Any], bool]) -> None:
    """A GPU that is out of memory in the steps of which `when` says so."""
    real = step._gradients

    def compute(run: Any, batch: Any) -> Any:
        if when(run):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(run, batch)

    patch.setattr(step, "_gradients", compute)


@pytest.mark.parametrize("done", [0, 3])
def test_r06_out_of_memory(
    done: int, gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R6: where smaller micro batches and activation checkpointing do not help, at step 1 or later,
    exit 6 with what to change; the steps before are saved, and a resume goes on from them."""
    with monkeypatch.context() as patch:
        running_out(patch, lambda run: run.state.step == done)
        code, out, err = gpt(*TRAIN)
    assert (code, out) == (6, "")
    assert errors(err) == ["out of memory on cpu with micro batches of one row of 32 tokens"]
    assert warnings(err).splitlines() == [
        "out of memory: micro_batch_size 2 -> 1, more of them a step",
        "out of memory with one row: activation_checkpointing off -> on",
    ]
    assert "model.block_size, n_layer or n_embd" in hints(err)
    assert steps(folder / "r")[-1] == done
    assert read_run_json(folder / "r")["status"] == "failed"
    code, _, err = gpt(*TRAIN, "--resume")
    assert code == 0, err
    assert told_steps(folder / "r") == [1, 2, 3, 4]


def test_r06_what_the_config_forbids(
    gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R6: activation checkpointing that the config has switched off is not switched on, but is the
    first hint."""
    running_out(monkeypatch, lambda run: True)
    code, _, err = gpt(*TRAIN, "--set=training.activation_checkpointing=off")
    assert code == 6
    assert hints(err).startswith("set training.activation_checkpointing to auto; or ")
    assert "activation_checkpointing off -> on" not in warnings(err)


def test_r06_smaller_micro_batches(gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R6: where a smaller micro batch helps, the run goes on with it, says so once, and trains on
    the same gradients: the mean over the step's tokens."""
    running_out(monkeypatch, lambda run: run.choices.micro_batch_size > 1)
    code, _, err = gpt(*TRAIN)
    assert code == 0, err
    assert warnings(err) == "out of memory: micro_batch_size 2 -> 1, more of them a step"
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)
    assert gpt("pretrain", "tiny.yaml", "--run-dir=straight")[0] == 0
    losses = [
        [r["loss"] for r in read_metrics(folder / name) if r["event"] == "train"]
        for name in ("r", "straight")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert read_run_json(folder / "r")["choices"]["micro_batch_size"] == 1


HUGE = ("--set=model.n_embd=65536", "--set=model.n_layer=48")


@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_r07_a_model_too_large(dry: tuple[str, ...], gpt: Gpt) -> None:
    """R7: a run or a dry run of a model that no memory here can hold is exit 6 with its size, what
    its weights, gradients and optimizer need, and what is free, in a moment, and takes none of that
    memory; no flag begins it all the same."""
    began = time.monotonic()
    code, out, err = gpt("pretrain", "tiny.yaml", "--run-dir=r's", *HUGE, *dry)
    assert (code, out) == (6, "")
    (line,) = errors(err)
    assert line.startswith("2,474,14")
    assert " parameters: their weights, gradients and optimizer alone need 27,650.7" in line
    assert " GiB of memory on cpu, free are " in line
    assert "set model.n_embd, model.n_layer or tokenizer.vocab_size lower" in hints(err)
    assert time.monotonic() - began < 5
    if not dry:  # which has no directory of its own
        code, _, err = gpt(*said_command(err))
        assert code == 6
        assert errors(err)[0].startswith("a step takes 55,7")


def test_r07_the_plan(gpt: Gpt) -> None:
    """R7: gpt plan prints the estimate part by part, and ends with 6 where it is more than there
    is, with what to change."""
    code, out, err = gpt("plan", "tiny.yaml", *HUGE)
    assert code == 6
    for part in ("weights", "gradients", "optimizer", "activations", "memory at the peak"):
        assert part in out
    assert errors(err)[0].startswith("a step takes 55,7")
    assert "choose a smaller model" in hints(err)


def test_r07_a_step_that_may_be_too_large(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """R7: where only the estimate of a step is above the free memory, which may be off, the run
    begins with a warning that has both figures."""
    monkeypatch.setattr("gptcli.device._available_bytes", lambda: 200 * 2**20)
    code, _, err = gpt(*TRAIN)
    assert code == 0, err
    (line,) = warnings(err).splitlines()
    assert line.startswith("a step may run out of memory: it takes about 0.")
    assert "usable are 0.18 GiB (gpt plan r/config.yaml says what takes less)" in line
    assert Path("r/config.yaml").is_file()


def no_temporary_files() -> None:
    """For a child: no directory for temporary files exists."""
    os.environ["TMPDIR"] = "/nonexistent"
    tempfile.tempdir = "/nonexistent"


def test_r08_no_temporary_directory(folder: Path) -> None:
    """R8: training and generating need no temporary directory."""
    code, err = Forked([*TRAIN, "--quiet"], before=no_temporary_files).wait()
    assert (code, err) == (0, "")
    for path in checkpoint.list_checkpoints(folder / "r"):
        checkpoint.verify(path)
    text = ["generate", "--model=r", "--prompt=On", "--max-new-tokens=4", "--seed=1"]
    child = Forked(text, before=no_temporary_files)
    shown = child.stdout.read()
    assert child.wait()[0] == 0
    assert shown.startswith(b"On")


def test_r08_no_home(folder: Path) -> None:
    """R8: nor a home that can be written: what libraries keep there is done without."""

    def no_home() -> None:
        os.environ["HOME"] = datasets.config.HF_DATASETS_CACHE = "/dev/null/home"
        os.environ["GPT_CACHE"] = "/dev/null/cache"

    code, err = Forked([*TRAIN, "--quiet"], before=no_home).wait()
    assert code == 0, err


def test_r09_slow_saves(gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R9: where a save takes longer than the training since the last one, the run says so, once,
    with both times and the setting; each save's time is in the log."""
    monkeypatch.setattr(session, "_SLOW_SAVE_SECONDS", 0.01)
    sync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.005)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    code, _, err = gpt(*TRAIN, "--set=training.save_every=1")
    assert code == 0, err
    (line,) = warnings(err).splitlines()
    assert line.startswith("this save took 0.")
    assert "since the last one: r is slow, or training.save_every 1 too small" in line
    assert err.count("saved r/checkpoints/step-") == 5


def test_r09_fast_saves(gpt: Gpt) -> None:
    """R9: saves that take milliseconds are no burden, however often they come."""
    code, _, err = gpt(*TRAIN, "--set=training.save_every=1")
    assert (code, warnings(err)) == (0, "")
