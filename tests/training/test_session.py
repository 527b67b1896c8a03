"""What a process does around its steps: choices, logs, threads and saves of a run that is resumed,
fails, or is asked to save."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.errors import DataError
from gptcli.pretrain import pretrain
from gptcli.runs import checkpoint
from gptcli.runs.run_dir import read_run_json
from gptcli.training import build, loop
from gptcli.training.choices import Choices


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)


def config(folder: Path, **training: Any) -> Config:
    book = folder / "book.txt"
    book.write_text("the sun and the moon sing of a river\n" * 40)
    return Config.model_validate(
        {
            "name": "tiny",
            "tokenizer": {"kind": "bytes"},
            "data": {"train": str(book), "val_fraction": 0.1},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
            "schedule": {"kind": "constant", "warmup_steps": 0},
            "training": {
                "max_steps": 4,
                "tokens_per_step": 64,
                "eval_every": 100,
                "save_every": 2,
                "precision": "fp32",
                "compile": "off",
                **training,
            },
            "samples": {"prompts": []},
        }
    )


def before(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, act: Callable[..., object]
) -> None:
    """Call `act` before each call of the function that `where` knows as `name`."""
    real = getattr(where, name)

    def run(*arguments: Any, **keys: Any) -> Any:
        act(*arguments)
        return real(*arguments, **keys)

    monkeypatch.setattr(where, name, run)


def test_another_kind_of_device_is_tried_as_a_fresh_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a run that moved from a GPU to a CPU trains without the trials, on all threads."""
    with monkeypatch.context() as patch:
        patch.setattr(Choices, "to_json", lambda self: {**asdict(self), "device": "cuda:0"})
        pretrain(config(tmp_path), run_dir=tmp_path / "run")
    tuned: list[str] = []
    before(monkeypatch, build, "tune", lambda choices, *_: tuned.append(choices.device))
    longer = config(tmp_path, max_steps=6)
    assert pretrain(longer, run_dir=tmp_path / "run", resume="resume").step == 6
    assert tuned == ["cpu"]
    assert (
        pretrain(config(tmp_path, max_steps=8), run_dir=tmp_path / "run", resume="resume").step == 8
    )
    assert tuned == ["cpu"]  # now it goes on where it was
    assert "forward_backward_seconds" in read_run_json(tmp_path / "run")["choices"]["races"]


def open_logs() -> list[str]:
    """Files of runs that this process has open."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    paths = [os.readlink(link) for link in links if os.path.islink(link)]
    return [path for path in paths if path.endswith(".jsonl")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("fails", ["rows", "step", "run.json"])
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Bug: after a run that fails, the caller computes on the threads that its race chose, and its
    logs stay open."""
    threads = torch.get_num_threads()

    def fail(*_: Any) -> None:
        torch.set_num_threads(threads + 1)
        raise DataError("gone")

    def fail_at_the_end(*_: Any) -> None:
        if stop.requested() is not None:
            fail()

    if fails == "rows":
        monkeypatch.setattr("gptcli.pretrain.training_rows", fail)
    elif fails == "step":
        monkeypatch.setattr(loop, "forward_backward", fail)
    else:
        before(monkeypatch, loop, "forward_backward", lambda *_: stop.request(15))
        from gptcli.training import session

        before(monkeypatch, session, "update_run_json", fail_at_the_end)
    with pytest.raises(DataError, match="gone"):
        pretrain(config(tmp_path), run_dir=tmp_path / "run")
    assert torch.get_num_threads() == threads
    assert open_logs() == []


def test_a_save_that_is_due_answers_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: SIGUSR1 during the step before a checkpoint saves it, and the step behind it again."""
    calls: list[int] = []
    saved: list[int] = []

    def ask(*_: Any) -> None:
        calls.append(0)
        if len(calls) in (2, 5):
            stop.request_save()

    before(monkeypatch, loop, "forward_backward", ask)
    before(monkeypatch, checkpoint, "publish", lambda directory, step, *_: saved.append(step))
    pretrain(config(tmp_path, max_steps=8), run_dir=tmp_path / "run")
    assert saved == [0, 2, 4, 5, 6, 8]
