"""`gpt generate` on a real terminal."""

import logging
import sys
from pathlib import Path

import pytest
from cycle_model import cycle_model
from pseudo_terminal import Terminal
from safetensors.torch import load_file, save_file
from sealing import reseal

from gptcli.cli.display import Display
from gptcli.cli.terminal import write_error, write_out
from gptcli.reports.text import visible

# Characters of 2 and 4 bytes, a terminal's title, an invalid byte, a line's end; no byte twice.
CYCLE = "é🙂\x1b]0;m\x07".encode() + b"\xff" + b"\r\nZ"
TEXT = CYCLE.decode("utf-8", "replace")
GREEDY = ("--temperature", "0", "--prompt", "Z")


@pytest.fixture(autouse=True)
def run_dir() -> Path:
    return cycle_model(CYCLE)


def test_interrupt_keeps_what_was_shown():
    """Ctrl-C that erases the text, leaves the prompt of the shell behind it, or looks like a
    success."""
    terminal = Terminal("generate", *GREEDY, "--max-new-tokens", "9999999")
    while terminal.shown.count("Z") < 5:
        assert terminal.read()
    before = terminal.shown
    terminal.press(b"\x03")
    assert terminal.wait() == 130
    assert terminal.shown.startswith(before.rstrip("\r"))
    lines = terminal.shown.splitlines()
    assert lines[-1] == "stopped by SIGINT"
    assert all(line in f"Z{visible(TEXT)}" for line in lines[:4])


def poisoned(run_dir: Path, byte: int) -> None:
    """Let the logits behind a byte be no numbers."""
    (step,) = (run_dir / "checkpoints").glob("step-*")
    weights = load_file(step / "model.safetensors")
    weights["wte.weight"][byte] = float("nan")
    save_file(weights, step / "model.safetensors")
    reseal(step)


def test_an_error_after_a_text_has_a_line_of_its_own(run_dir: Path):
    """`...half a texterror: ...`: an error that nobody finds, and a shell's prompt after it."""
    poisoned(run_dir, CYCLE[2])
    terminal = Terminal("generate", *GREEDY, "--max-new-tokens", "9")
    assert terminal.wait() == 4
    text, error, hint = terminal.shown.splitlines()
    assert text == "Zé"
    assert error.startswith("error: ")
    assert error.endswith("non-finite logits")
    assert hint.startswith("hint: ")


def test_a_warning_within_a_text_has_a_line_of_its_own():
    """The same for lines of the log; the text goes on behind them."""

    def show() -> None:
        write_out("half a text")
        Display().handle(logging.LogRecord("gptcli", logging.WARNING, "", 0, "dry", None, None))
        write_out(" and its end\n")
        write_error("done")

    terminal = Terminal("--version", before=show)
    assert terminal.wait() == 0
    assert terminal.shown.startswith("half a text\nwarning: dry\n and its end\ndone\ngptcli ")


def test_a_text_in_a_file_gets_no_line_end_for_an_error(run_dir: Path, tmp_path: Path):
    """An empty line before the error on the screen, where the text is not."""
    poisoned(run_dir, CYCLE[2])
    out = tmp_path / "out.txt"

    def redirect() -> None:
        sys.stdout = open(out, "w")  # noqa: SIM115  for the rest of the process

    terminal = Terminal("generate", *GREEDY, "--max-new-tokens", "9", before=redirect)
    assert terminal.wait() == 4
    assert terminal.shown.startswith("error: ")


def test_only_the_first_text_is_streamed_and_none_is_mixed():
    """Texts that grow together, torn apart on the screen."""
    terminal = Terminal("generate", *GREEDY, "--max-new-tokens", "9", "-n", "3", "--no-prompt")
    assert terminal.wait() == 0
    text = visible(CYCLE[:9].decode())
    assert terminal.shown.startswith(f"{text}\n---\n" * 3)


def test_prompt_file_on_a_terminal(tmp_path):
    """Texts of later prompts shown under the first, or without their prompt."""
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "m", "max_new_tokens": 20}\n{"prompt": "Z", "max_new_tokens": 1}\n'
    )
    arguments = ["--prompt-file", str(tmp_path / "p.jsonl"), "--temperature", "0"]
    terminal = Terminal("generate", *arguments)
    assert terminal.wait() == 0
    after = (CYCLE * 5)[CYCLE.index(b"m") + 1 :][:20].decode("utf-8", "replace")
    assert terminal.shown.startswith(f"m{visible(after)}\n---\nZ")
