import errno
import os
import signal
import subprocess
import sys

import pytest

from gptcli import __version__
from gptcli.cli import pretrain_command
from gptcli.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    GptError,
    NonFiniteError,
    ResourceError,
)

ALL_COMMANDS = ["pretrain", "finetune", "generate", "eval", "doctor", "runs", "config"]


def test_version(gpt):
    assert gpt("--version") == (0, f"gptcli {__version__}\n", "")


@pytest.mark.parametrize("arguments", [("--help",), ("-h",)])
def test_help_lists_the_commands(gpt, arguments):
    """Whoever asks for help gets it in either spelling."""
    code, out, err = gpt(*arguments)
    assert (code, err) == (0, "")
    for command in ALL_COMMANDS:
        assert f"\n  {command} " in out


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_every_command_has_help_and_the_global_flags(gpt, command):
    code, out, err = gpt(command, "--help")
    assert (code, err) == (0, "")
    assert "--debug" in out or "Commands:" in out


def test_a_command_is_imported_alone():
    """The modules of a dozen commands take longer to import than a short answer to compute."""
    script = (
        "import sys; from gptcli.cli.main import main; code = main(['--quiet', 'plan', '-h']);"
        "found = [m.removeprefix('gptcli.cli.') for m in sys.modules if m.endswith('_command')];"
        "print(code, found, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == "0 ['plan_command']\n"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["pretrain", "--bogus"], "no such option: --bogus", "gpt pretrain --help"),
        (["pretrain"], "missing argument 'CONFIG'", "gpt pretrain --help"),
        (["pretain", "small"], "Did you mean 'pretrain'?", "gpt --help"),
        (["talk"], "no such command 'talk'", "gpt --help"),
        (["pretrain", "small", "extra"], "unexpected extra argument", "gpt pretrain --help"),
        (["generate", "-n", "two", "--prompt", "x"], "'-n'", "gpt generate --help"),
        (["generate", "--beams", "5"], "no such option: --beams", "gpt generate --help"),
        (["runs", "rename"], "no such command 'rename'", "gpt runs --help"),
        (["runs"], "missing command", "gpt runs --help"),
        (["--bogus"], "no such option: --bogus", "gpt --help"),
    ],
)
def test_usage_errors_have_our_form(gpt, arguments, message, hint):
    """Typer prints a usage block and `Error:` by itself, which scripts that look for ours miss."""
    code, out, err = gpt(*arguments)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1:] == [f"hint: {hint}"]


@pytest.mark.parametrize(
    "flags",
    [("--resume", "--overwrite"), ("--resume", "--auto-resume"), ("--auto-resume", "--overwrite")],
)
def test_ways_to_treat_an_old_run_exclude_each_other(gpt, flags):
    code, out, err = gpt("pretrain", "small", *flags)
    assert (code, out) == (2, "")
    assert err == f"error: {flags[0]} and {flags[1]} exclude each other; give one of them\n"


def test_a_text_file_is_no_config(gpt, tmp_path):
    """Read as YAML a book gives a nonsense error, or is accepted as one long scalar."""
    code, out, err = gpt("finetune", "book.txt")
    assert (code, out) == (2, "")
    assert "book.txt" in err
    assert "hint: to train a new model on a text: gpt pretrain book.txt\n" in err


def raised_by(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `gpt pretrain` meet `error` where it would load its config."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pretrain_command, "load_run_config", fail)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ConfigError, 2),
        (DataError, 3),
        (CheckpointError, 4),
        (NonFiniteError, 5),
        (ResourceError, 6),
    ],
)
def test_exit_codes(gpt, monkeypatch, kind: type[GptError], code):
    raised_by(kind("what happened", "what helps"), monkeypatch)
    assert gpt("pretrain", "x") == (code, "", "error: what happened\nhint: what helps\n")


def test_every_line_of_an_error_is_marked(gpt, monkeypatch):
    """A program that greps for `error: ` must see the second problem too."""
    raised_by(ConfigError(["one", "two\nthree"], "a\nb"), monkeypatch)
    expected = "error: one\nerror: two\nerror: three\nhint: a\nhint: b\n"
    assert gpt("pretrain", "x") == (2, "", expected)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_exhausted_resources_are_no_bugs(gpt, monkeypatch, error):
    raised_by(error, monkeypatch)
    code, out, err = gpt("pretrain", "x")
    assert (code, out) == (6, "")
    assert err.startswith("error: ")
    assert "internal" not in err


def test_torch_out_of_memory(gpt, monkeypatch):
    torch = pytest.importorskip("torch")
    raised_by(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), monkeypatch)
    code, _, err = gpt("pretrain", "x")
    assert code == 6
    assert "micro_batch_size" in err


def test_a_bug_is_one_line(gpt, monkeypatch):
    raised_by(KeyError("lost\nkey"), monkeypatch)
    code, out, err = gpt("pretrain", "x")
    assert (code, out) == (1, "")
    assert err.startswith("error: internal: KeyError: ")
    assert "--debug" in err.splitlines()[1]
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("arguments", [("--debug", "pretrain", "x"), ("pretrain", "x", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(gpt, monkeypatch, arguments):
    raised_by(ValueError("oops"), monkeypatch)
    code, _, err = gpt(*arguments)
    assert code == 1
    assert err.startswith("Traceback")
    assert err.endswith("error: internal: ValueError: oops\n")


def test_debug_by_environment(gpt, monkeypatch):
    raised_by(ValueError("oops"), monkeypatch)
    monkeypatch.setenv("GPT_DEBUG", "1")
    assert gpt("pretrain", "x")[2].startswith("Traceback")


def test_handlers_and_logging_are_given_back(gpt):
    """A program that calls `main` as a function keeps its own Ctrl-C and its own log level."""
    import logging

    before = signal.getsignal(signal.SIGINT), list(logging.getLogger("gptcli").handlers)
    gpt("pretrain", "missing.yaml")
    assert before == (signal.getsignal(signal.SIGINT), list(logging.getLogger("gptcli").handlers))
