import json
import re
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
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:4] == ["RUN", "STATUS", "DONE", "STEP"]
    assert rows[1][:7] == ["b-first", "finished", "100", "%", "10", "3.0000", "1.5000"]
    assert rows[2][:6] == ["a-second", "killed", "-", "10", "3.0000", "1.7500"]


def test_list_of_nothing(gpt, tmp_path):
    code, out, err = gpt("runs", "list")
    assert (code, out) == (0, "")
    assert "no runs in" in err


def test_show(gpt, runs):
    code, out, _ = gpt("runs", "show", "b-first")
    assert code == 0
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    assert facts["status"] == "finished"
    assert facts["val loss"] == "2.5000"
    assert facts["command"] == "gpt pretrain small"
    assert "nats per token" in out  # the plot, without colours where stdout is no terminal
    assert "\x1b" not in out


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


def test_list_loads_no_slow_library(shell, runs):
    """Bug: torch or matplotlib is loaded to print a table, which then takes seconds."""
    slow = "torch|matplotlib|numpy|plotext|datasets"
    found = shell(
        f"PYTHONPROFILEIMPORTTIME=1 gpt runs list 2>&1 >/dev/null | grep -cE '[|] +({slow})$'"
    )
    assert found.stdout.strip() == "0", found


def test_tail_of_a_run_that_has_ended(gpt, runs):
    """Bug: following a run that nobody trains waits for ever, or says nothing of how it ended."""
    (runs / "b-first" / "log.txt").write_text("a\nb\nc\n")
    code, out, err = gpt("runs", "tail", "b-first", "-n", "2")
    assert (code, out) == (0, "b\nc\n")
    assert err.endswith("b-first: finished at step 10\n")


def test_tail_of_no_lines(gpt, runs):
    """Bug: -n 0 begins with an empty line."""
    (runs / "b-first" / "log.txt").write_text("a\nb\nc\n")
    assert gpt("runs", "tail", "b-first", "-n", "0")[:2] == (0, "")


def test_prune_says_what_it_goes_by(gpt, runs):
    """Bug: the reason names the first checkpoint, but a run with logged steps and none is kept."""
    (runs / "a-second" / "metrics.jsonl").write_text("")
    code, out, _ = gpt("runs", "prune")
    assert (code, "killed before its first logged step" in out) == (0, True)
    code, out, _ = gpt("runs", "prune", "--help")
    assert "first logged step" in " ".join(out.split())


def test_stop_of_a_run_that_is_not_running(gpt, runs):
    """Bug: the process that happens to have the number in the lock is ended."""
    code, out, err = gpt("runs", "stop", "b-first", "--save")
    assert (code, out) == (4, "")
    assert "is not running" in err


def test_prune_asks_first(gpt, runs):
    """Bug: something is removed without --yes."""
    (runs / "b-first").rename(runs / "b-first.old-20260101-000000")
    code, out, err = gpt("runs", "prune")
    assert code == 0
    assert "would remove" in out
    assert "moved aside" in out
    assert "--yes" in err
    assert (runs / "b-first.old-20260101-000000").is_dir()
    assert gpt("runs", "prune", "--yes")[0] == 0
    assert [path.name for path in sorted(runs.iterdir())] == ["a-second", "notes"]
    assert gpt("runs", "prune")[2] == "nothing to remove\n"


def test_compare_needs_two(gpt, runs):
    """Bug: a run compared with nothing is a traceback."""
    code, out, err = gpt("runs", "compare", "b-first")
    assert (code, out) == (2, "")
    assert err.startswith("error: a comparison needs two models\n")


@pytest.mark.parametrize("command", ["show", "report", "tail", "stop", "prune"])
def test_unknown_run(gpt, runs, command):
    code, out, err = gpt("runs", command, "nowhere")
    assert (code, out) == (4, "")
    assert err == "error: nowhere: no such run\nhint: gpt runs list\n"


def test_no_run_yet(gpt):
    code, _, err = gpt("runs", "show")
    assert code == 4
    assert "hint: gpt pretrain small" in err
