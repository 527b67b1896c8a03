import json
from pathlib import Path

import pytest


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run, a later one that was killed in the middle of a line, and a stranger."""
    root = tmp_path / "runs"
    make(root / "b-first", "2026-01-01T00:00:00+00:00", "finished", bits=1.5)
    killed = make(root / "a-second", "2026-01-02T00:00:00+00:00", "running", bits=None)
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    (root / "notes").mkdir()
    return root


def make(path: Path, created: str, status: str, bits: float | None) -> Path:
    path.mkdir(parents=True)
    scores = {"scores": {"loss": 2.5, "bits_per_byte": bits}} if bits else {}
    about = {"name": "t", "created": created, "status": status, "command": "gpt pretrain small"}
    (path / "run.json").write_text(json.dumps({**about, **scores}))
    (path / "config.yaml").write_text("name: t\n")
    lines = [
        {"event": "train", "step": 10, "tokens": 100, "loss": 3.0, "tokens_per_second": 9.0},
        {"event": "eval", "step": 10, "tokens": 100, "loss": 2.0, "bits_per_byte": 1.75},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_list(gpt, runs):
    """In order of creation, which is not the order of names; a killed run still has figures."""
    code, out, err = gpt("runs", "list")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["RUN", "STATUS", "STEP", "VAL", "BITS/BYTE"],
        ["b-first", "finished", "10", "1.5000"],
        ["a-second", "running", "10", "1.7500"],
    ]


def test_list_of_nothing(gpt, tmp_path):
    code, out, err = gpt("runs", "list")
    assert (code, out) == (0, "")
    assert "no runs in" in err


def test_show(gpt, runs):
    code, out, _ = gpt("runs", "show", "b-first")
    assert code == 0
    facts = dict(line.split(None, 1) for line in out.splitlines())
    assert facts["status"] == "finished"
    assert facts["loss"] == "2.5000"
    assert facts["command"] == "gpt pretrain small"


def test_show_takes_the_newest(gpt, runs):
    assert "a-second" in gpt("runs", "show")[1]


def test_report(gpt, runs):
    code, out, _ = gpt("runs", "report", str(runs / "b-first"))
    assert code == 0
    assert [Path(line).name for line in out.splitlines()] == [
        "report.html",
        "report.md",
        "report.json",
    ]
    for line in out.splitlines():
        assert Path(line).stat().st_size > 0


@pytest.mark.parametrize("command", ["show", "report"])
def test_unknown_run(gpt, runs, command):
    code, out, err = gpt("runs", command, "nowhere")
    assert (code, out) == (4, "")
    assert err == "error: nowhere: no such run\nhint: gpt runs list\n"


def test_no_run_yet(gpt):
    code, _, err = gpt("runs", "show")
    assert code == 4
    assert "hint: gpt pretrain small" in err
