"""What a kill, a full disk or a failing disk leaves behind. Children are forked and really die."""

import errno
import logging
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.errors import GptError, ResourceError
from gptcli.runs.checkpoint import (
    Contents,
    list_checkpoints,
    publish,
    read,
    verify,
)
from gptcli.runs.metrics import MetricsLog, read_metrics

Make = Callable[..., Contents]
log = logging.getLogger("gptcli")


def in_child(work: Callable[[], object]) -> int:
    """Process id of a child that runs `work` and exits with 0, a GptError's code, or 1."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except GptError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(run_dir: Path) -> list[str]:
    return [p.name for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]


def test_disk_full(tmp_path: Path, make_contents: Make) -> None:
    """Guards against a full disk that costs the old checkpoint or leaves a part of the new one."""
    publish(tmp_path, 1, make_contents())

    def save_with_little_room() -> None:
        # A limit on file size stands for the full disk: the write fails half way.
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        with pytest.raises(ResourceError, match="step 2 is not saved") as caught:
            publish(tmp_path, 2, make_contents())
        assert "it needs 8." in caught.value.message
        assert "free in" in caught.value.message
        raise caught.value

    assert exit_code(in_child(save_with_little_room)) == 6
    assert leftovers(tmp_path) == []
    assert [verify(path)["step"] for path in list_checkpoints(tmp_path)] == [1]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_failing_disk(
    tmp_path: Path, make_contents: Make, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Guards against calling a checkpoint saved whose fsync or rename failed."""
    publish(tmp_path, 1, make_contents(1))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ResourceError, match="Input/output error"):
            publish(tmp_path, 1, make_contents(2))
    assert leftovers(tmp_path) == []
    assert read(list_checkpoints(tmp_path)[0], with_optimizer=True).state["seed"] == 1


def test_metrics_on_a_full_disk(tmp_path: Path, warnings: list[str]) -> None:
    """Guards a run against ending because its log cannot grow: one warning, and no line is lost."""

    def log_with_little_room() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        metrics = MetricsLog(tmp_path)
        for step in range(20):
            metrics.write({"event": "train", "step": step})
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        metrics.write({"event": "train", "step": 20})
        assert len(warnings) == 1

    assert exit_code(in_child(log_with_little_room)) == 0
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(21))
