"""Files for TensorBoard beside metrics.jsonl."""

import json
from pathlib import Path

import pytest

from gptcli.errors import ConfigError
from gptcli.runs.metrics import truncate_after
from gptcli.runs.tensorboard_log import TensorBoardLog, check_tensorboard

pytest.importorskip("tensorboard")


def points(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"))
    found.Reload()
    return [(e.step, round(e.value, 4)) for e in found.Scalars(tag)]


def test_points_are_the_lines_and_a_resume_doubles_none(tmp_path: Path) -> None:
    """Bug: after a resume TensorBoard shows the steps that were done again twice."""
    (tmp_path / "run.json").write_text(json.dumps({"created": "2026-01-01T00:00:00+00:00"}))
    log = TensorBoardLog(tmp_path)
    for step in (10, 20, 30):
        log.write({"event": "train", "step": step, "loss": 5 - step / 10, "update_ratio": None})
    task = {"name": "accuracy", "value": 0.5}
    log.write({"event": "eval", "step": 20, "loss": 3.5, "task": task})
    log.close()
    log.close()
    assert points(tmp_path, "train/loss") == [(10, 4.0), (20, 3.0), (30, 2.0)]
    truncate_after(tmp_path, 20)
    with TensorBoardLog(tmp_path) as again:
        again.write({"event": "train", "step": 30, "loss": 1.5})
    assert points(tmp_path, "train/loss") == [(10, 4.0), (20, 3.0), (30, 1.5)]
    assert points(tmp_path, "eval/accuracy") == [(20, 0.5)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a run finds out at its first evaluation that the package is missing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_tensorboard()
    assert caught.value.hint == "pip install 'gptcli[tensorboard]'"
