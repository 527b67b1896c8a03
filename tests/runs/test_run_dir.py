"""Making, finding and locking run directories, and their run.json."""

import json
import math
import os
import time
from pathlib import Path

import pytest

from gptcli import stop
from gptcli.errors import ConfigError, ResourceError
from gptcli.runs.run_dir import (
    RunLock,
    new_directory,
    new_place,
    new_run_dir,
    newest_run,
    newest_unfinished,
    read_run_json,
    runs_root,
    update_run_json,
    write_json_atomic,
)


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "root"))


def add_checkpoint(run_dir: Path) -> None:
    (run_dir / "checkpoints/step-00000001").mkdir(parents=True)
    (run_dir / "checkpoints/step-00000001/manifest.json").touch()


def test_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against two runs of one second that share a directory."""
    runs = [new_run_dir("small", None, overwrite=False) for _ in range(3)]
    assert len({*runs}) == 3
    assert all(run.parent == tmp_path / "root" for run in runs)
    assert all(run.name.startswith("small-20") for run in runs)
    assert read_run_json(runs[0])["status"] == "running"
    monkeypatch.delenv("GPT_RUNS")
    assert runs_root() == Path("runs")


def test_a_run_that_failed_before_its_first_checkpoint_is_no_obstacle(tmp_path: Path) -> None:
    """A typing error in data.train once blocked --run-dir for the corrected command."""
    run = new_run_dir("a", tmp_path / "run", overwrite=False)
    (run / "log.txt").write_text("failed")
    assert new_run_dir("a", run, overwrite=False) == run
    assert not (run / "log.txt").exists()


def test_existing_run_is_kept(tmp_path: Path) -> None:
    """Guards against mixing two runs, or losing the first, when a command is given twice."""
    run = tmp_path / "run"
    assert new_run_dir("a", run, overwrite=False) == run
    (run / "metrics.jsonl").write_text("old")
    saved = run / "checkpoints" / "step-00000000"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"use --resume to continue or --overwrite") as caught:
        new_run_dir("b", run, overwrite=False)
    assert caught.value.exit_code == 2
    assert new_run_dir("b", run, overwrite=True) == run
    assert read_run_json(run)["name"] == "b"
    (old,) = tmp_path.glob("run.old-*")
    assert (old / "metrics.jsonl").read_text() == "old"


def test_overwrite_spares_what_is_no_run(tmp_path: Path) -> None:
    """Guards a home directory given as --run-dir by mistake."""
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").touch()
    (tmp_path / "file").touch()
    for path in (tmp_path / "letters", tmp_path / "file"):
        with pytest.raises(ConfigError):
            new_run_dir("a", path, overwrite=True)
    assert (tmp_path / "letters/dear.txt").exists()


def test_overwrite_of_the_directory_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against the run that is moved aside being the one that is then written into."""
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run/checkpoints")
    for path in (Path(".."), tmp_path / "run"):
        with pytest.raises(ConfigError, match="in which you are") as caught:
            new_run_dir("a", path, overwrite=True)
        assert caught.value.hint == f"cd {tmp_path}, and --run-dir run"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    monkeypatch.chdir(tmp_path)
    assert new_run_dir("a", Path("run"), overwrite=True) == Path("run")


def test_overwrite_waits_for_nobody(tmp_path: Path) -> None:
    """Guards a running run against being moved away under its feet."""
    run = new_run_dir("a", tmp_path / "run", overwrite=False)
    with RunLock(run), pytest.raises(ResourceError, match="in use"):
        new_run_dir("a", run, overwrite=True)
    assert read_run_json(run)["name"] == "a"


def test_place_that_takes_no_files(tmp_path: Path) -> None:
    """Guards against finding out after hours that nothing can be saved."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(ResourceError, match="cannot make") as caught:
            new_run_dir("a", path, overwrite=False)
        assert caught.value.exit_code == 6


def test_lock_keeps_a_second_process_out(tmp_path: Path) -> None:
    """Guards against two processes that write one run directory."""
    with RunLock(tmp_path):
        child = os.fork()
        if not child:
            code = 1
            try:
                with RunLock(tmp_path):
                    code = 0
            except ResourceError as error:
                named = f"process {os.getppid()} on {os.uname().nodename}" in error.message
                code = error.exit_code if named else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
    with RunLock(tmp_path):
        pass


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    """Guards a restart after kill -9 against a stale lock."""
    child = os.fork()
    if not child:
        RunLock(tmp_path).__enter__()
        (tmp_path / "locked").touch()
        time.sleep(60)
        os._exit(1)
    while not (tmp_path / "locked").exists():
        time.sleep(0.005)
    with pytest.raises(ResourceError, match=f"process {child}"):
        RunLock(tmp_path).__enter__()
    os.kill(child, 9)
    os.waitpid(child, 0)
    with RunLock(tmp_path):
        pass


def test_newest_is_by_creation(tmp_path: Path) -> None:
    """Guards against file times, which copies and clocks change, and against empty runs."""
    root = tmp_path / "root"
    assert newest_run(root) is None
    made = {}
    for number, name in enumerate(("c", "b", "a")):
        made[name] = new_run_dir(name, root / name, overwrite=False)
        update_run_json(made[name], created=f"2026-01-0{number + 1}T00:00:00+00:00")
    os.utime(made["c"])
    assert newest_run(root, having_checkpoint=False) == made["a"]
    assert newest_run(root) is None
    add_checkpoint(made["b"])
    add_checkpoint(made["c"])
    assert newest_run(root) == made["b"]
    (made["b"] / "run.json").unlink()
    assert newest_run(root) == made["c"]
    made["c"].rename(root / "c.old-20260101-000000")
    assert newest_run(root) == made["b"]


def test_newest_unfinished(tmp_path: Path) -> None:
    """Guards --resume against another config's run, a finished one, or one with nothing to load."""
    root = tmp_path / "root"
    runs = [new_run_dir("small", root / f"{n}", overwrite=False) for n in range(4)]
    other = new_run_dir("large", root / "large", overwrite=False)
    for run in [*runs[:3], other]:
        add_checkpoint(run)
    update_run_json(runs[2], status="finished")
    update_run_json(runs[1], status="stopped")
    assert newest_unfinished(root, "small") == runs[1]
    assert newest_unfinished(root, "large") == other
    assert newest_unfinished(root, "none") is None


def test_run_json(tmp_path: Path, warnings: list[str]) -> None:
    """Guards readers against NaN, which is no JSON, and against half written files."""
    assert read_run_json(tmp_path) == {}
    update_run_json(tmp_path, loss=math.nan, scores=[1.0, math.inf], command=["caf\udce9"])
    update_run_json(tmp_path, status="finished")
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "loss": None,
        "scores": [1.0, None],
        "command": ["caf\udce9"],
        "status": "finished",
    }
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []
    (tmp_path / "run.json").write_text(text[:20])
    assert read_run_json(tmp_path) == {}
    assert "cannot be read" in warnings[0]
    with pytest.raises(ResourceError, match="cannot write"):
        write_json_atomic(tmp_path / "absent" / "x.json", {})


def test_a_new_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    """Guards against half of an import or export that looks like all of it, and against litter."""

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    with new_directory(tmp_path / "deep" / "er" / "out") as temp:
        (temp / "below").mkdir()
        (temp / "below" / "a").write_text("a")
        assert not (tmp_path / "deep" / "er" / "out").exists()
    assert (tmp_path / "deep" / "er" / "out" / "below" / "a").read_text() == "a"
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["out"]

    def fail(error: BaseException) -> None:
        with new_directory(tmp_path / "new" / "er" / "out") as temp:
            (temp / "a").write_text("a")
            raise error

    with pytest.raises(stop.Stopped):
        fail(stop.Stopped())
    assert names() == ["deep"]
    with pytest.raises(ResourceError, match="No space left on device"):
        fail(OSError(28, "No space left on device"))
    assert names() == ["deep"]
    stale = tmp_path / f".tmp-out-{os.getpid()}"  # of a killed process that had this number
    stale.mkdir()
    (stale / "old").write_text("")
    (tmp_path / "out").mkdir()  # an empty directory is as good as none
    with new_directory(tmp_path / "out") as temp:
        (temp / "a").write_text("a")
    assert names() == ["deep", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_where_nothing_new_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what is there, and the directory in which somebody works: replaced by another, it
    would leave their shell in one that is gone."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (".", "..", "../here", "/", tmp_path / "here", "../file", "../link"):
        with pytest.raises(ConfigError, match="exists already"), new_directory(Path(taken)):
            pytest.fail("was let in")
    with pytest.raises(ConfigError, match="so there can be no"), new_place(Path("../file/x/y")):
        pytest.fail("was let in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here", "link"]
