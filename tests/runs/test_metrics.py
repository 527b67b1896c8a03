"""metrics.jsonl survives kills and is cut back on resume."""

import math
from pathlib import Path

import pytest

from gptcli.errors import ResourceError
from gptcli.runs.metrics import SAMPLES, MetricsLog, read_metrics, read_samples, truncate_after


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir)]


def test_append_and_read(tmp_path: Path) -> None:
    """Guards against lost lines, a truncated file on reopening, and NaN, which is no JSON."""
    assert read_metrics(tmp_path) == []
    with MetricsLog(tmp_path) as metrics:
        metrics.write({"event": "train", "step": 1, "loss": math.nan})
        assert read_metrics(tmp_path) == [{"event": "train", "step": 1, "loss": None}]
    with MetricsLog(tmp_path) as metrics, MetricsLog(tmp_path, SAMPLES) as samples:
        metrics.write({"event": "train", "step": 2})
        samples.write({"step": 2, "text": "line\nline\u2028é\ud800"})
    assert steps(tmp_path) == [1, 2]
    assert read_samples(tmp_path)[0]["text"] == "line\nline\u2028é\ud800"
    with pytest.raises(ResourceError):
        MetricsLog(tmp_path / "absent")


@pytest.mark.parametrize("tail", [b'{"event": "train", "st', b"[1]\n", b"\xff\x00\n", b"[" * 99999])
def test_cut_line_is_tolerated(tmp_path: Path, tail: bytes) -> None:
    """Guards against a report, or the next line, that falls over what a kill left."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + tail)
    assert steps(tmp_path) == [1]
    with MetricsLog(tmp_path) as metrics:
        metrics.write({"step": 2})
    assert steps(tmp_path) == [1, 2]
    truncate_after(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_truncate_after(tmp_path: Path) -> None:
    """Guards against steps that appear twice after a resume; what goes is kept beside."""
    truncate_after(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
    for filename in ("metrics.jsonl", SAMPLES):
        with MetricsLog(tmp_path, filename) as lines:
            lines.write({"event": "note"})
            for step in range(1, 7):
                lines.write({"event": "train", "step": step})
    truncate_after(tmp_path, 9)
    assert not (tmp_path / "metrics.jsonl.bak").exists()
    truncate_after(tmp_path, 4)
    truncate_after(tmp_path, 3)
    assert [record.get("step") for record in read_metrics(tmp_path)] == [None, 1, 2, 3]
    assert read_samples(tmp_path) == [{**r, "event": r["event"]} for r in read_metrics(tmp_path)]
    backup = (tmp_path / "metrics.jsonl.bak").read_text().splitlines()
    assert backup == [f'{{"event": "train", "step": {step}}}' for step in (5, 6, 4)]


def test_whole_last_line_without_its_end(tmp_path: Path) -> None:
    """Guards a record whose newline alone was lost: it is kept and not glued to the next."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    truncate_after(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert not (tmp_path / "metrics.jsonl.bak").exists()
