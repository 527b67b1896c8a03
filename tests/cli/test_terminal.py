import sys

import pytest

from gptcli.cli.terminal import columns


def test_columns():
    table = columns([["a", "1"], ["long", "200"]], right=frozenset({1}))
    assert table == "a       1\nlong  200\n"
    assert columns([]) == ""


def test_closed_stdout(shell):
    """Python lets results vanish without a word when stdout is closed."""
    done = shell("gpt --help >&-; echo rc $? >&2")
    assert done.stderr == (
        "error: stdout is closed\nhint: to drop the results, add: > /dev/null\nrc 6\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("command", ["--help", "--version", "doctor --help"])
def test_full_disk_behind_stdout(shell, command):
    """A full disk gave a traceback, or a second complaint of the interpreter at its end."""
    done = shell(f"gpt {command} >/dev/full; echo rc $? >&2")
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert "No space left on device" in lines[0]
    assert lines[1] == "rc 6"


@pytest.mark.parametrize("command", ["--help", "--version"])
def test_reader_gone(shell, command):
    """`| head` must end quietly, also when the interpreter flushes at its end."""
    done = shell(f"(sleep 0.7; gpt {command}; echo rc $? >&2) | true")
    assert done.stderr == "rc 0\n"


def test_stderr_gone(shell):
    """An error that cannot be told still has its exit code."""
    assert shell("gpt pretrain --bogus 2>&-").returncode == 2


def test_ascii_locale(shell, tmp_path):
    """A terminal that cannot show a letter must not end the program."""
    (tmp_path / "runs" / "läuft").mkdir(parents=True)
    (tmp_path / "runs" / "läuft" / "run.json").write_text('{"status": "finished"}')
    done = shell("gpt runs list", PYTHONIOENCODING="ascii", GPT_RUNS="runs")
    assert done.returncode == 0, done.stderr
    assert "l\\xe4uft" in done.stdout
