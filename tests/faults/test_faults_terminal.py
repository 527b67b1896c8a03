"""Pipes, terminals and locales: rows S8 to S15 of the fault matrix.

Each test names its row and says what the row owes: exit code, message, hint, and what is kept.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cycle_model import cycle_model
from forked import Forked
from outcome import errors, hints, warnings
from processes import started
from pseudo_terminal import Terminal
from small import PROSE, TINY, working_in

from gptcli.cli import generate_command
from gptcli.cli.main import main
from gptcli.reports.text import visible
from gptcli.runs import checkpoint
from gptcli.runs.run_dir import read_run_json

Gpt = Callable[..., tuple[int, str, str]]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]

# A character of 2 and one of 4 bytes, the terminal's title, its clipboard (OSC 52), an invalid
# byte, a line's end.
HOSTILE = "é🙂\x1b]52;c\x07".encode() + b"\x9b\xffm0\r\nZ"
MARKUP = "[/x] :smile: [bold]b[/]"
needs_full = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained run."""
    with working_in(tmp_path_factory.mktemp("model")) as place:
        assert main(["pretrain", "tiny.yaml", "--run-dir=r", "--quiet"]) == 0
    return str(place / "r")


@pytest.fixture
def shell(folder: Path) -> Shell:
    """Run a shell line in which `gpt` is this project's."""

    def run(line: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", "-c", f'gpt() {{ {sys.executable} -m gptcli "$@"; }}\n{line}'],
            capture_output=True,
            text=True,
            timeout=50,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
            check=False,
        )

    return run


def test_s08_the_reader_goes_away(model: str) -> None:
    """S8: `gpt generate | head -1` is quiet and exit 0, whenever the pipe closes."""
    endless = ("--prompt=a\nb\nc", "--temperature=0", "--max-new-tokens=9999999")
    with started("generate", f"--model={model}", *endless) as child:
        assert child.stdout.readline() == b"a\n"
        child.stdout.close()
        assert child.wait() == (0, "")


def test_s08_in_a_shell(shell: Shell) -> None:
    """S8: so do other commands in a real pipeline, with `set -o pipefail` too, be the reader gone
    before the first line or in the middle."""
    line = 'set -o pipefail; gpt config schema | head -1; echo "${PIPESTATUS[@]} $?"'
    done = shell(line)
    assert (done.stdout, done.stderr) == ("{\n0 0 0\n", "")
    done = shell("(sleep 0.5; gpt --help; echo rc $? >&2) | true")
    assert done.stderr == "rc 0\n"


def test_s08_training_goes_on(folder: Path) -> None:
    """S8: `gpt pretrain ... 2>&1 | head` loses its lines, not the run."""

    def into_stdout() -> None:
        os.dup2(1, 2)

    with started("pretrain", "tiny.yaml", "--run-dir=r", before=into_stdout) as child:
        child.stdout.readline()
        child.stdout.close()
        assert child.wait()[0] == 0
    assert read_run_json(folder / "r")["status"] == "finished"


def test_s09_stdout_is_closed(shell: Shell, folder: Path) -> None:
    """S9: with `>&-` results would vanish: exit 6 before any work, and how to drop them on
    purpose."""
    for command in ("--help", "pretrain tiny.yaml --run-dir r"):
        done = shell(f"gpt {command} >&-; echo rc $? >&2")
        assert done.stderr == (
            "error: stdout is closed\nhint: to drop the results, add: > /dev/null\nrc 6\n"
        )
    assert not (folder / "r").exists()


@needs_full
@pytest.mark.parametrize("command", ["--help", "--version", "config schema"])
def test_s09_stdout_on_a_full_disk(command: str, shell: Shell) -> None:
    """S9: exit 6 and one line; no second complaint when the process ends."""
    done = shell(f"gpt {command} >/dev/full; echo rc $? >&2")
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert "No space left on device" in lines[0]
    assert lines[1] == "rc 6"


@needs_full
def test_s09_texts_on_a_full_disk(model: str) -> None:
    """S9: a text that cannot be written is exit 6, and no success."""
    given = ("generate", f"--model={model}", "--prompt=x", "--max-new-tokens=3", "--quiet")
    with started(*given, stdout=Path("/dev/full")) as child:
        assert child.wait() == (6, "error: stdout: No space left on device\n")


@needs_full
def test_s09_a_run_on_a_full_disk(folder: Path) -> None:
    """S9: a training whose last lines cannot be written ends with exit 6, and is whole."""
    given = ("pretrain", "tiny.yaml", "--run-dir=r", "--quiet")
    with started(*given, stdout=Path("/dev/full")) as child:
        assert child.wait() == (6, "error: stdout: No space left on device\n")
    assert read_run_json(folder / "r")["status"] == "finished"
    assert checkpoint.list_checkpoints(folder / "r")[-1].name == "step-00000004"


def capable() -> None:
    os.environ["TERM"] = "xterm-256color"
    os.environ.pop("NO_COLOR", None)


def test_s10_no_terminal() -> None:
    """S10: a log file gets plain lines, one for each log_every steps, and no control codes."""
    with started("pretrain", "tiny.yaml", "--run-dir=r", before=capable) as child:
        out = child.stdout.read()
        code, err = child.wait()
    assert code == 0, err
    assert b"\x1b" not in out
    assert "\x1b" not in err
    assert "\r" not in err
    steps = [line.split()[1] for line in err.splitlines() if line.startswith("step ")]
    assert steps == ["0", "1/4", "2/4", "3/4", "4/4", "4"]


@pytest.mark.parametrize("variable", ["NO_COLOR=1", "TERM=dumb"])
def test_s10_a_plain_terminal(variable: str, model: str) -> None:
    """S10: NO_COLOR and TERM=dumb give the same plain lines on a terminal, for training and for
    tables."""

    def plain() -> None:
        os.environ["TERM"] = "xterm-256color"
        name, _, value = variable.partition("=")
        os.environ[name] = value

    terminal = Terminal("pretrain", "tiny.yaml", "--run-dir=r", before=plain)
    assert terminal.wait() == 0
    assert b"\x1b" not in terminal.output
    assert "\nstep 1/4  loss " in terminal.shown
    terminal = Terminal("explain", f"--model={model}", "--text=On day 1 a cat", before=plain)
    assert terminal.wait() == 0
    assert b"\x1b" not in terminal.output


def without_drawing(shown: str) -> str:
    """What a terminal shows but for colours and movements, which are the only escapes of ours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_s10_a_narrow_terminal() -> None:
    """S10: on 20 columns progress stays one line that is drawn in place, cut to fit."""
    arguments = ("pretrain", "tiny.yaml", "--run-dir=r", "--set=training.max_steps=30")
    terminal = Terminal(*arguments, before=capable, columns=20)
    assert terminal.wait() == 0
    assert "\x1b[2K" in terminal.shown
    pieces = [line.rstrip() for line in re.split("[\r\n]", without_drawing(terminal.shown))]
    lines = [line for line in pieces if "━" in line or re.match(r"step \d+/30", line)]
    assert len(lines) > 2
    assert max(map(len, lines)) <= 20
    assert terminal.shown.count("\n") < 20  # and no line for each of the steps
    assert terminal.shown.rfind("\x1b[?25h") >= terminal.shown.rfind("\x1b[?25l")


def test_s11_an_ascii_locale(shell: Shell, folder: Path, model: str) -> None:
    """S11: letters that the locale lacks are written as escapes; nothing ends for their sake."""
    (folder / "c.yaml").write_text("generate: {prompt: é🙂}\n", encoding="utf-8")
    done = shell("gpt config show c.yaml; gpt config check é.yaml", PYTHONIOENCODING="ascii")
    assert "prompt: \\xe9\\U0001f642\n" in done.stdout
    assert done.returncode == 2
    assert done.stderr.startswith("error: \\xe9.yaml: no such config file\n")

    def ascii_streams() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]

    given = ("generate", f"--model={model}", "--prompt=é🙂", "--max-new-tokens=2", "--seed=1")
    with started(*given, before=ascii_streams) as child:
        assert child.stdout.read().startswith(b"\\xe9\\U0001f642")
        assert child.wait() == (0, "")
    (folder / "böse.txt").write_text(PROSE)
    given = ("pretrain", "tiny.yaml", "--set=data.train=böse.txt", "--run-dir=r")
    with started(*given, before=ascii_streams) as child:
        code, err = child.wait()
    assert code == 0
    assert "reading b\\xf6se.txt" in err


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_s12_generated_text_on_a_terminal(stream: str) -> None:
    """S12: escapes that a model has learned (title, clipboard, colours) are shown as \\x1b and
    never sent to the terminal; half a character comes with its other half."""
    cycle_model(HOSTILE)
    count = str(4 * len(HOSTILE))
    given = ("--temperature=0", "--prompt=Z", "--max-new-tokens", count, stream)
    terminal = Terminal("generate", *given, before=capable)
    assert terminal.wait() == 0
    text = visible(HOSTILE.decode("utf-8", "replace") * 4)
    assert terminal.shown.startswith(f"Z{text}\n")
    assert "\\x1b]52;c\\x07" in text
    for byte in (b"\x1b", b"\x07", b"\x9b"):
        assert byte not in terminal.output.replace("🙂".encode(), b"")
    assert terminal.output.decode()


def test_s12_what_is_asked_for_raw() -> None:
    """S12: a pipe gets the text as it is, for a program to read, and so does --raw a terminal."""
    cycle_model(HOSTILE)
    given = ("generate", "--temperature=0", "--prompt=Z", f"--max-new-tokens={len(HOSTILE)}")
    text = HOSTILE.decode("utf-8", "replace")
    with started(*given) as child:
        assert child.stdout.read() == f"Z{text}\n".encode()
        assert child.wait() == (0, "")
    terminal = Terminal(*given, "--raw")
    assert terminal.wait() == 0
    assert "\x1b]52;c\x07" in terminal.shown


EVIL = "a\x1b]0;evil\x07\x9b31m\u202e"


def test_s12_prompts_names_and_errors(model: str, folder: Path) -> None:
    """S12: so are escapes in a prompt that is shown again, in names of files and in errors, on a
    terminal and in a log; a tab and a line's end stay."""
    shown = "a\\x1b]0;evil\\x07\\x9b31m\\u202e"
    given = ("generate", f"--model={model}", f"--prompt={EVIL}\tb\n", "--max-new-tokens=1")
    terminal = Terminal(*given, before=capable)
    assert terminal.wait() == 0
    assert f"\n{shown}\tb\n" in terminal.shown
    commands = (
        ("config", "check", f"{EVIL}.yaml"),
        ("pretrain", "tiny.yaml", f"--set=data.train={json.dumps(EVIL)}"),
        ("generate", "--prompt=x", f"--model={EVIL}"),
        ("runs", "show", EVIL),
        ("pretrain", "tiny.yaml", f"--{EVIL}"),
    )
    for command in commands:
        terminal = Terminal(*command, before=capable)
        assert terminal.wait() > 1
        assert "\\x1b" in terminal.shown
        logged = Forked(list(command)).wait()[1]
        assert "\\x1b" in logged
        for letter in "\x1b\x07\x9b\u202e":
            assert letter not in logged, command
            assert letter not in without_drawing(terminal.shown), command


def test_s12_training_on_a_terminal(folder: Path) -> None:
    """S12: and in what training shows, beside the escapes that draw its own line."""
    (folder / f"{EVIL}.txt").write_text(PROSE)
    (folder / "tiny.yaml").write_text(
        TINY.replace("text.txt", json.dumps(f"{EVIL}.txt")).replace(
            "{n: 1,", f"{{prompts: [{json.dumps(EVIL)}], n: 1,"
        )
    )
    terminal = Terminal("pretrain", "tiny.yaml", "--run-dir=r", before=capable)
    assert terminal.wait() == 0
    assert "reading a\\x1b]0;evil\\x07\\x9b31m\\u202e.txt" in terminal.shown
    assert "sample: a\\x1b]0;evil" in terminal.shown
    for letter in "\x1b\x07\x9b\u202e":
        assert letter not in without_drawing(terminal.shown)


def test_s13_markup_in_generated_text(model: str) -> None:
    """S13: `[bold]`, `[/x]` and `:smile:` are printed as they are, on a terminal too."""
    given = ("generate", f"--model={model}", f"--prompt={MARKUP}", "--max-new-tokens=1", "--quiet")
    terminal = Terminal(*given, before=capable)
    assert terminal.wait() == 0
    assert terminal.shown.startswith(MARKUP)
    with started(*given) as child:
        assert child.stdout.read().decode().startswith(MARKUP)
        assert child.wait()[0] == 0


def test_s13_markup_in_what_training_shows(folder: Path) -> None:
    """S13: also above the line that training draws, and in names of files."""
    (folder / "[b] :smile:.txt").write_text(PROSE)
    (folder / "tiny.yaml").write_text(
        TINY.replace("text.txt", '"[[]b] :smile:.txt"').replace(
            "{n: 1,", f"{{prompts: ['{MARKUP}'], n: 1,"
        )
    )
    terminal = Terminal("pretrain", "tiny.yaml", "--run-dir=r", before=capable, columns=200)
    assert terminal.wait() == 0
    assert f"sample: {MARKUP}" in terminal.shown
    assert "b] :smile:.txt" in terminal.shown


def fed(data: bytes | None) -> Callable[[], None]:
    """What gives a child that stdin; None is one where nothing comes."""

    def feed() -> None:
        reader, writer = os.pipe()
        if data is not None:
            if os.fork() == 0:
                os.close(reader)
                try:
                    os.write(writer, data)
                finally:
                    os._exit(0)
            os.close(writer)
        os.dup2(reader, 0)
        sys.stdin = os.fdopen(0, closefd=False)

    return feed


def test_s14_nothing_on_stdin(model: str) -> None:
    """S14: `gpt generate -` with nothing on stdin is exit 2, and what to give instead."""
    with started("generate", f"--model={model}", "-", before=fed(b"")) as child:
        code, err = child.wait()
    assert code == 2
    assert "nothing on stdin" in errors(err)[0]
    assert hints(err)


def test_s14_a_prompt_from_stdin(model: str) -> None:
    """S14: the line's end of `echo` is no part of the prompt; bytes that are no UTF-8 become U+FFFD
    with a warning."""
    given = ("generate", f"--model={model}", "-", "--max-new-tokens=1", "--seed=1")
    with started(*given, before=fed(b"Once upon\na caf\xe9\n")) as child:
        text = child.stdout.read().decode()
        code, err = child.wait()
    assert code == 0, err
    assert text.startswith("Once upon\na caf\ufffd")
    assert not text.startswith("Once upon\na caf\ufffd\n")
    assert "stdin is not valid UTF-8" in warnings(err)


def test_s14_endless_stdin(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S14: `yes | gpt generate -` is exit 2 once more than 10 MB have come, not all the memory."""
    assert generate_command._MAX_STDIN_BYTES == 10_000_000
    monkeypatch.setattr(generate_command, "_MAX_STDIN_BYTES", 20_000)
    with started("generate", f"--model={model}", "-", before=fed(b"y\n" * 15_000)) as child:
        code, err = child.wait()
    assert code == 2
    assert "20,000 bytes" in errors(err)[0] or "20000" in errors(err)[0]


def test_s14_waiting_for_stdin(model: str) -> None:
    """S14: waiting for stdin can be ended by Ctrl-C."""
    with started("generate", f"--model={model}", "-", before=fed(None)) as child:
        time.sleep(0.2)
        child.send(signal.SIGINT)
        code, err = child.wait()
    assert (code, err.splitlines()[-1]) == (130, "stopped by SIGINT")


HELP = """\
import json, socket, sys, time
def refuse(*_): raise AssertionError("a connection was opened")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
began = time.perf_counter()
from gptcli.cli.main import main
codes = {name: main([*name.split(), "--help"]) for name in json.loads(sys.argv[1])}
seconds = time.perf_counter() - began
heavy = {"torch", "datasets", "transformers", "numpy", "matplotlib", "rich", "huggingface_hub"}
print(json.dumps([codes, sorted(heavy & set(sys.modules)), seconds]), file=sys.stderr)
"""


def test_s15_help(gpt: Gpt) -> None:
    """S15: --help, of gpt and of every command, needs no network and none of the large libraries,
    and is there in less than a second."""
    listed = re.findall(r"^  ([a-z]+)  ", gpt("--help")[1].partition("Commands:")[2], re.MULTILINE)
    assert {"pretrain", "generate", "runs"} <= set(listed)
    for commands in ([""], listed):
        done = subprocess.run(
            [sys.executable, "-c", HELP, json.dumps(commands)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            check=True,
        )
        codes, heavy, seconds = json.loads(done.stderr.splitlines()[-1])
        assert set(codes.values()) == {0}
        assert heavy == []
        assert seconds < 1.0 * len(commands)

    def processor_seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "gptcli", "--help"], capture_output=True, check=True)
        after = os.times()
        user = after.children_user - before.children_user
        return user + after.children_system - before.children_system

    assert min(processor_seconds() for _ in range(3)) < 1.0  # of a fresh process, Python included
