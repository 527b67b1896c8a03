"""What is said of a run at a glance, and what of it may be removed."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli import stop
from gptcli.errors import CheckpointError, ResourceError
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.follow import follow
from gptcli.runs.holder import lock_holder, stop_run
from gptcli.runs.listing import list_runs, size_bytes, summarise
from gptcli.runs.metrics import last_metrics
from gptcli.runs.prune import removable, remove
from gptcli.runs.run_dir import RunLock

NO_PROCESS = 4_000_000  # above Linux's largest process number on small machines


def make(path: Path, status: str = "running", train: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True)
    about = {"name": "t", "status": status, "created": "2026-01-01T00:00:00+00:00"}
    (path / "run.json").write_text(json.dumps(about))
    lines = [{"event": "eval", "step": 0, "loss": 5.0, "bits_per_byte": 3.0}]
    if train is not None:
        lines.append({"event": "train", **train})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_killed_run_is_not_running(tmp_path: Path) -> None:
    """Bug: run.json of a killed process says running for ever."""
    run = make(tmp_path / "run", train={"step": 7, "loss": 4.0, "progress": 0.7})
    assert summarise(run).status == "killed"
    (run / ".lock").write_text(f"{NO_PROCESS} {socket.gethostname()}\n")
    assert summarise(run).status == "killed"
    (run / ".lock").write_text(f"{os.getpid()} {socket.gethostname()}\n")  # its number was reused
    assert summarise(run).status == "killed"
    with RunLock(run):
        found = summarise(run)
        assert (found.status, found.holder and found.holder.pid) == ("running", os.getpid())
    assert summarise(run).status == "killed"


def test_looking_does_not_keep_others_out(tmp_path: Path) -> None:
    """Bug: a look at the lock takes it, and the run that starts meanwhile is refused."""
    run = make(tmp_path / "run")
    with RunLock(run):
        pass
    (run / ".lock").write_text(f"{NO_PROCESS} {socket.gethostname()}\n")
    for _ in range(20):
        assert lock_holder(run) is None
        with RunLock(run):
            assert lock_holder(run) is not None


def test_figures_of_the_last_lines(tmp_path: Path) -> None:
    """Bug: a cut line, an old evaluation far above or a strange value ends the list."""
    run = make(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        for step in range(2000):
            line = {"event": "train", "step": step, "loss": float(step), "note": "eval train"}
            file.write(json.dumps(line) + "\n")
        file.write('{"event": "train", "step": 99')
    last = last_metrics(run)
    assert (last["train"]["step"], last["eval"]["step"]) == (1999, 0)
    found = summarise(run)
    assert (found.step, found.loss, found.bits_per_byte) == (1999, 1999.0, 3.0)
    (run / "run.json").write_text('{"status": 7, "training": [], "scores": "x", "tasks": {"a": 1}}')
    assert summarise(run).status == "7"


def test_sizes_follow_no_links(tmp_path: Path) -> None:
    """Bug: a link to a disk full of data makes a run seem large, or a loop never ends."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"x" * 1000)
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    assert 1000 <= size_bytes(tmp_path / "a") < 1100 + len(str(tmp_path))


def test_runs_come_in_order_of_creation(tmp_path: Path) -> None:
    """Bug: one damaged run.json hides all runs."""
    for name in ("b", "a"):
        make(tmp_path / name)
    (tmp_path / "a" / "run.json").write_text("{")
    (tmp_path / "c").mkdir()
    assert [run.path.name for run in list_runs(tmp_path)] == ["a", "b"]


def test_following_ends_with_the_run(tmp_path: Path) -> None:
    """Bug: lines that come after the first look, in two parts or by a resumed process, are lost; or
    following a run that has ended never ends."""
    run = make(tmp_path / "run")
    log = run / "log.txt"
    log.write_text("one\ntwo\nthree\n")
    assert list(follow(run, 2)) == ["two", "three"]  # nobody works there

    def work() -> None:
        for status, text in (("stopped", "four\nfi"), ("finished", "ve\nsix\n")):
            with RunLock(run):
                time.sleep(0.3)
                with open(log, "a") as file:
                    file.write(text)
                (run / "run.json").write_text(json.dumps({"status": status}))
            time.sleep(0.4)

    worker = threading.Thread(target=work)
    worker.start()
    while lock_holder(run) is None:
        time.sleep(0.01)
    assert list(follow(run, 1, wait_seconds=20.0)) == ["three", "four", "five", "six"]
    worker.join()


def test_following_can_be_ended(tmp_path: Path) -> None:
    """Bug: Ctrl-C does not end the following of a run that goes on."""
    run = make(tmp_path / "run")
    with RunLock(run):
        lines = follow(run)
        stop.request(2)
        with pytest.raises(stop.Stopped):
            next(lines)


def test_stopping_asks_the_right_process(tmp_path: Path) -> None:
    """Bug: a signal goes to a stranger: of another machine, or with a dead process's number."""
    run = make(tmp_path / "run")
    (run / ".lock").write_text(f"{os.getpid()} {socket.gethostname()}\n")
    with pytest.raises(CheckpointError, match="is not running"):
        stop_run(run, save=True)
    with RunLock(run):
        (run / ".lock").write_text(f"{os.getpid()} elsewhere\n")
        with pytest.raises(ResourceError, match=r"in use by process \d+ on elsewhere"):
            stop_run(run, save=True)


def test_prune_keeps_what_a_run_needs(
    tmp_path: Path, make_contents: Callable[..., Contents]
) -> None:
    """Bug: the best, the newest or the checkpoint before the decay is removed; or one in use."""
    run = make(tmp_path / "run", status="finished")
    contents = make_contents()
    for step in (10, 20, 30, 40, 50):
        contents.state.update(decaying=step > 20)
        checkpoint.publish(run, step, contents)
    checkpoint.write_best(run, 30, 1.0)
    (run / "checkpoints" / "step-00000050" / "state.json").unlink()  # the newest is damaged
    (run / "checkpoints" / ".tmp-step-00000060-1").mkdir()
    found = removable([run])
    assert {(one.path.name, one.reason) for one in found} == {
        ("step-00000010", "superseded checkpoint"),
        (".tmp-step-00000060-1", "left by a killed process"),
    }
    with RunLock(run):
        assert removable([run]) == []
        assert not remove(found[0])
    assert all(remove(one) for one in found)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {f"step-000000{step}" for step in (20, 30, 40, 50)} | {"best.json"}
    assert removable([run]) == []


def test_prune_of_whole_runs(tmp_path: Path, make_contents: Callable[..., Contents]) -> None:
    """Bug: a failed run that had trained, one that was stopped or one just begun is removed."""
    aside = make(tmp_path / "a.old-20260101-000000", status="finished")
    checkpoint.publish(aside, 1, make_contents())
    make(tmp_path / "failed", status="failed")
    make(tmp_path / "killed")
    make(tmp_path / "trained", status="failed", train={"step": 5})
    make(tmp_path / "stopped", status="stopped")
    begun = make(tmp_path / "begun")
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    (begun / "run.json").write_text(json.dumps({"status": "running", "created": now}))
    found = removable(sorted(tmp_path.iterdir()))
    assert [one.path.name for one in found] == ["a.old-20260101-000000", "failed", "killed"]
    assert all(remove(one) for one in found)
    assert {path.name for path in tmp_path.iterdir()} == {"trained", "stopped", "begun"}
