"""How the end of a run is told, whatever the run was."""

import signal
from pathlib import Path

import pytest

from gptcli.cli.run_flags import end_run
from gptcli.training.build import RunResult


def result(**given: object) -> RunResult:
    about = {
        "status": "finished",
        "run_dir": Path("r"),
        "report": Path("r/report.html"),
        "step": 5,
        "scores": None,
        "signal": None,
        "resume_command": "gpt pretrain r/config.yaml --resume",
    }
    return RunResult(**{**about, **given})


def test_finished(capsys):
    assert end_run(result()) == 0
    assert capsys.readouterr().out == "r\nr/report.html\n"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_stopped_by_a_signal(capsys, number, code):
    """A scheduler tells by the exit code that a job was cut short and must be sent again."""
    assert end_run(result(status="stopped", report=None, signal=number)) == code
    out, err = capsys.readouterr()
    assert out == "r\n"
    assert err == (
        f"stopped by {number.name} at step 5; to continue: gpt pretrain r/config.yaml --resume\n"
    )


def test_stopped_by_the_clock(capsys):
    """--max-time is a wish that was met, not a failure."""
    assert end_run(result(status="stopped")) == 0
    assert "to continue: " in capsys.readouterr().err


def test_tasks_are_a_table(capsys):
    tasks = {"exact_match": {"before": 0.0, "after": 0.25, "rows": 8}, "other": {"before": 1.0}}
    assert end_run(result(tasks=tasks)) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "TASK         BEFORE  AFTER  ROWS",
        "exact_match   0.000  0.250     8",
        "other         1.000      -     -",
    ]
