"""`gpt chat` from a pipe, and on a real terminal."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cycle_model import cycle_model
from pseudo_terminal import Terminal

from gptcli.cli import chat_lines
from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.model.gpt import GPT, initialise
from gptcli.runs.checkpoint import Contents, publish
from gptcli.runs.run_dir import new_run_dir

Gpt = Callable[..., tuple[int, str, str]]
Talk = Callable[..., tuple[int, str, str]]

# What comes behind a newline, and goes on for ever: characters of 2 and 4 bytes, a terminal's
# title, an invalid byte; no byte twice.
CYCLE = "é🙂\x1b]0;m\x07".encode() + b"\xff" + b"\r\nZ"
PASTING = re.compile(r"\x1b\[\?2004[hl]\r?")  # readline turns that of its prompt on and off
SHORT = ("--seed=1", "--max-new-tokens=8")


@pytest.fixture
def run_dir() -> Path:
    """A run with an untrained model on byte tokens, under GPT_RUNS."""
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=128, zero_init_output=False)
    config = Config(name="tiny", model=shape)
    tokenizer = Tokenizer.of_bytes()
    model = GPT(config.model, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    made = new_run_dir("tiny", None, overwrite=False)
    publish(made, 10, Contents(model.state_dict(), {}, {}, dump_config(config), tokenizer))
    return made


@pytest.fixture
def talk(gpt: Gpt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Talk:
    """`gpt chat` with `lines` in its stdin."""

    def run(lines: str | bytes, *arguments: str) -> tuple[int, str, str]:
        (tmp_path / "stdin").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        with open(tmp_path / "stdin") as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            return gpt("chat", *arguments)

    return run


# From a pipe


def test_a_pipe_gets_answers_alone(talk: Talk, run_dir: Path):
    """A script that reads prompts, notices or an answer of nothing between them."""
    code, out, err = talk("hi\n\n  \nthere\r\nyou", *SHORT, "--temperature=0.01")
    assert code == 0
    assert err.splitlines()[:2] == [
        "tiny, the plain template dialogue, block_size 128; seed 1",
        "it was not trained for dialogue, as far as is known: it goes on with texts",
    ]
    again = talk("hi\nthere\nyou\n", *SHORT, "--temperature=0.01")
    assert again == (code, out, err)
    assert talk("hi\nother\nyou\n", *SHORT, "--temperature=0.01")[1] != out
    quiet = talk("hi\nthere\nyou\n", *SHORT, "--temperature=0.01", "--quiet")
    assert quiet == (0, out, "")


def test_nothing_is_no_error(talk: Talk, run_dir: Path):
    """A script with nothing to ask."""
    assert talk("", *SHORT)[:2] == talk("/quit\nhi\n", *SHORT)[:2] == (0, "")


def test_commands(talk: Talk, run_dir: Path, tmp_path: Path):
    """Each command as documented, and the conversation that it leaves."""
    saved = tmp_path / "talk.jsonl"
    lines = [
        "/system Be kind.",
        "one",
        "two",
        "/undo",
        "/system",
        "/seed 7",
        "/retry",
        "/temperature 0.5",
        "/seed",
        "//slash",
        f"/save {saved}",
        "/system -",
        "/help",
    ]
    code, _, err = talk("\n".join(lines), *SHORT, "--quiet")
    assert code == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] != "assistant"] == [
        "Be kind.",
        "one",
        "/slash",
    ]
    told = err.splitlines()
    assert told[:7] == [
        "system message: Be kind.",
        "forgotten: two",
        "system message: Be kind.",
        "seed 7; that of the last answer: 1",
        "temperature 0.5",
        "seed 7; that of the last answer: 7",
        f"saved: {saved}, 5 messages",
    ]
    assert told[7] == "system message: (none)"
    assert "/undo             forget the last question and its answer" in told
    code, _, err = talk(f"/load {saved}\n/retry\n", *SHORT, "--quiet")
    assert (code, err) == (0, f"loaded: {saved}, 5 messages\n")


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("/rety", 2, "there is no command /rety\nhint: did you mean /retry?"),
        ("/", 2, "there is no command /\nhint: /help lists"),
        ("/usr/bin", 2, "there is no command /usr/bin\nhint: "),
        ("/undo it", 2, "/undo takes nothing after it"),
        ("/undo", 2, "nothing was asked yet"),
        ("/retry", 2, "nothing was asked yet"),
        ("/seed x", 2, "/seed: 'x' is no number"),
        ("/temperature -1", 2, "/temperature: must be at least 0"),
        ("/temperature nan", 2, "/temperature: input should be a finite number"),
        ("/save", 2, "/save needs the name of a file\nhint: as: /save talk.jsonl"),
        ("/save x", 2, "nothing was said yet"),
        ("/load x", 3, "x cannot be read: No such file or directory"),
        ("/load", 2, "/load needs"),
        ("y" * 200, 3, "the message takes 220 tokens; there is room for 120"),
        ("/system " + "y" * 200, 3, "the message, with the system message, takes"),
    ],
)
def test_a_line_that_cannot_be_answered(talk: Talk, run_dir: Path, line: str, code: int, told: str):
    """It is told, the next one is answered, and the exit code tells a script of it."""
    expected = talk("hi\n", *SHORT)[1]
    found, out, err = talk(f"{line}\nhi\n", *SHORT, "--quiet")
    assert (found, out) == (code, expected)
    assert err.startswith(f"error: {told}"), err


def test_a_saved_file_is_replaced_only_on_demand(talk: Talk, run_dir: Path, tmp_path: Path):
    """Guards: a conversation overwritten by a repeated /save."""
    saved = tmp_path / "talk.jsonl"
    saved.write_text("old")
    code, _, err = talk(f"hi\n/save {saved}\n", *SHORT, "--quiet")
    assert (code, saved.read_text()) == (2, "old")
    assert err.endswith(f"exists already\nhint: to replace it: /save! {saved}\n")
    code, _, err = talk(f"hi\n/save! {saved}\n/save {tmp_path}/no/x\nhi\n", *SHORT, "--quiet")
    assert (code, "2 messages" in err, "cannot write" in err) == (6, True, True)


def test_save_at_the_end(talk: Talk, run_dir: Path, tmp_path: Path):
    """Guards: a conversation that is lost because its place is found bad at the end."""
    saved = tmp_path / "talk.jsonl"
    assert talk("", *SHORT, f"--save={saved}")[0] == 0
    assert not saved.exists()  # nothing was said
    assert talk("hi\nyou\n/quit\nmore", *SHORT, f"--save={saved}")[0] == 0
    assert len(json.loads(saved.read_text())["messages"]) == 4
    code, out, err = talk("hi\n", *SHORT, f"--save={saved}")
    assert (code, out) == (2, "")
    assert "exists already" in err
    code, out, err = talk("hi\n", *SHORT, f"--save={tmp_path}/no/x")
    assert (code, out) == (6, "")


def test_bytes_that_are_no_text(talk: Talk, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards: a crash on bytes that are no UTF-8, and memory for a line without end."""
    code, out, err = talk(b"caf\xe9\n", *SHORT)
    assert code == 0
    assert "warning: the line is not valid UTF-8; bad bytes replaced" in err
    assert out == talk("caf\ufffd\n", *SHORT)[1]
    monkeypatch.setattr(chat_lines, "_MOST_BYTES", 1000)
    monkeypatch.setattr(chat_lines, "_CHUNK_BYTES", 300)
    code, out, err = talk(b"x" * 1_000_000 + b"\nhi\n", *SHORT, "--quiet")
    assert code == 3
    assert "more than 1,000 bytes is cut" in err
    assert out == talk("hi\n", *SHORT)[1]


def test_a_closed_pipe_ends_quietly(shell, run_dir: Path):
    """`| head -1` must not end in a traceback; and a fresh process works."""
    done = shell(
        "yes hi | head -200 | gpt chat --quiet --max-new-tokens 8 | head -1; echo ${PIPESTATUS[2]}"
    )
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0", "")


def test_sections_of_a_config(talk: Talk, run_dir: Path, tmp_path: Path):
    """Guards: keys without effect, flags that do not win."""
    (tmp_path / "c.yaml").write_text(
        "generate: {max_new_tokens: 8, seed: 1, prompt: x}\n"
        "chat: {system: Be kind., template: dialogue_zh}\n"
    )
    config = f"--config={tmp_path}/c.yaml"
    _, out, err = talk("hi\n/system\n", config)
    assert "template dialogue_zh" in err
    assert "system message: Be kind." in err
    flags = ("--system=Be kind.", "--template=dialogue_zh")
    assert talk("hi\n", *SHORT, *flags)[1] == out
    assert "Be rude." in talk("/system\n", config, "--system=Be rude.")[2]
    code, _, err = talk("hi\n", config, "--template=nope")
    assert code == 2
    assert err.endswith("hint: name a Jinja file, or a shipped one: dialogue, dialogue_zh\n")
    assert talk("hi\n", "--temperature=-1")[0] == 2


def test_a_stop_while_a_pipe_is_silent(forked, run_dir: Path):
    """Guards: SIGTERM that waits for a line that never comes."""
    reading, writing = os.pipe()

    def stdin() -> None:
        os.close(writing)
        sys.stdin = os.fdopen(reading)

    process = forked(["chat", *SHORT], before=stdin)
    os.write(writing, b"hi\n")
    assert process.stdout.readline()
    process.send(signal.SIGTERM)
    assert process.wait()[0] == 143
    os.close(writing)


# On a terminal


def own_stdin() -> None:
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ["TERM"] = "xterm"


def without_readline() -> None:
    own_stdin()
    sys.modules["readline"] = None  # type: ignore[assignment]


@pytest.fixture
def endless() -> Path:
    return cycle_model(CYCLE, block_size=256)


LONG = ("chat", "--temperature=0", "--max-new-tokens=9999999")
BOTH = pytest.mark.parametrize("before", [own_stdin, without_readline])


def after(terminal: Terminal, text: str, times: int = 1) -> None:
    """Read until `text` was shown so often."""
    while PASTING.sub("", terminal.shown).count(text) < times:
        assert terminal.read(), terminal.shown


@BOTH
def test_ctrl_c_stops_the_answer_not_the_program(
    endless: Path, tmp_path: Path, before: Callable[[], None]
):
    """A long answer that can only be ended together with the conversation."""
    saved = tmp_path / "talk.jsonl"
    terminal = Terminal(*LONG, f"--save={saved}", before=before)
    after(terminal, "> ")
    for turn in (1, 2):
        terminal.press(b"hi\r")
        after(terminal, "Zé🙂", 5 * turn)
        terminal.press(b"\x03")
        after(terminal, "(stopped; what was said stays", turn)
        after(terminal, "\n> ", turn + 1)
    terminal.press(b"/quit\r")
    assert terminal.wait() == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert "Zé🙂\x1b]0;m\x07" in messages[1]["content"]  # a file gets it as it is
    assert "\x1b]0;m" not in terminal.shown
    assert "\\x1b]0;m\\x07\ufffd" in terminal.shown
    assert "stopping, and saving" not in terminal.shown


@BOTH
def test_leaving(endless: Path, before: Callable[[], None]):
    """Ctrl-C at the prompt says how to leave; a second one leaves, with 0, as Ctrl-D does."""
    for keys in ((b"\x03", b"\x03"), (b"\x03", b"\x04"), (b"\x04",)):
        terminal = Terminal(*LONG, before=before)
        after(terminal, "> ")
        for number, key in enumerate(keys):
            terminal.press(key)
            if number < len(keys) - 1:
                after(terminal, "to leave: Ctrl-D, /quit, or Ctrl-C again")
                after(terminal, "\n> ", 2)
        assert terminal.wait() == 0
        assert "error" not in terminal.shown


def test_ctrl_c_drops_the_line_that_is_typed(endless: Path):
    """Guards: a conversation lost by the key that clears a line everywhere else."""
    terminal = Terminal(*LONG, before=own_stdin)
    after(terminal, "> ")
    for turn in (2, 3):
        terminal.press(b"half a line")
        after(terminal, "half a line", turn - 1)
        terminal.press(b"\x03")
        after(terminal, "\n> ", turn)
    assert "to leave" not in terminal.shown
    terminal.press(b"\x04")
    assert terminal.wait() == 0


def test_signals_at_the_prompt(endless: Path):
    """Guards: SIGTERM that waits for Enter, and a terminal that hangs up."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        terminal = Terminal(*LONG, before=own_stdin)
        after(terminal, "> ")
        os.kill(terminal.process, number)
        assert terminal.wait() == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_a_signal_just_before_the_waiting(endless: Path, number: signal.Signals, code: int):
    """Python notes it, raises inside readline, which drops that, and waits for a key."""

    def before() -> None:
        import readline

        own_stdin()
        readline.set_pre_input_hook(lambda: os.kill(os.getpid(), number))

    terminal = Terminal(*LONG, before=before)
    assert terminal.wait() == code


def test_a_stop_in_an_answer_saves_whole_ones(endless: Path, tmp_path: Path):
    """Guards: half an answer in a file, SIGTERM taken for Ctrl-C, answers lost that were given."""
    saved = tmp_path / "talk.jsonl"
    terminal = Terminal(*LONG, f"--save={saved}", before=own_stdin)
    after(terminal, "> ")
    terminal.press(b"one\r")
    after(terminal, "Zé🙂", 3)
    terminal.press(b"\x03")
    after(terminal, "\n> ", 2)
    terminal.press(b"two\r")
    after(terminal, "Zé🙂", 20)
    os.kill(terminal.process, signal.SIGTERM)
    assert terminal.wait() == 143
    messages = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["one"]
    assert "stopped by SIGTERM" in terminal.shown


@pytest.mark.parametrize(
    ("keys", "before"),
    [
        (b"one\\\rtwo\r", own_stdin),
        (b"one\\\rtwo\r", without_readline),
        (b"\x1b[200~one\rtwo\x1b[201~\r", own_stdin),  # as terminals paste
        (b"one\rtwo\r", without_readline),
    ],
)
def test_messages_of_several_lines(
    endless: Path, tmp_path: Path, keys: bytes, before: Callable[[], None]
):
    """A pasted text that becomes as many questions as it has lines."""
    saved = tmp_path / "talk.jsonl"
    arguments = ("chat", "--temperature=0", "--max-new-tokens=4", f"--save={saved}")
    terminal = Terminal(*arguments, before=before)
    after(terminal, "> ")
    time.sleep(0.1)  # readline turns pasting on behind the prompt
    terminal.press(keys)
    after(terminal, "cut at --max-new-tokens, 4")
    after(terminal, "\n> ", 2)
    terminal.press(b"\x04")
    assert terminal.wait() == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["one\ntwo"]
    assert (before is own_stdin) == ("\x1b[?2004h" in terminal.shown)  # asks for such pastes


def test_what_is_typed_during_an_answer(endless: Path, tmp_path: Path):
    """Guards: keys shown in the middle of an answer, or lost; a terminal left without echo."""
    terminal = Terminal("chat", "--temperature=0", "--max-new-tokens=3000", before=own_stdin)
    after(terminal, "> ")
    terminal.press(b"hi\r")
    after(terminal, "Zé🙂", 3)
    terminal.press(b"/seed 77\r/quit\r")
    assert terminal.wait() == 0
    answer, _, rest = terminal.shown.partition("cut at --max-new-tokens")
    assert "/seed" not in answer
    assert "seed 77" in rest


def test_completion_and_history(endless: Path):
    """The tab key completes commands, the arrow key brings the last line back."""
    terminal = Terminal("chat", "--temperature=0", "--max-new-tokens=4", before=own_stdin)
    after(terminal, "> ")
    terminal.press(b"/temp\t0.5\r")
    after(terminal, "\ntemperature 0.5\n> ")
    terminal.press(b"\x1b[A\r")
    after(terminal, "\ntemperature 0.5\n> ", 2)
    terminal.press(b"\x04")
    assert terminal.wait() == 0
