"""`gpt generate` on a real terminal, and in a pipe whose reader goes away."""

import os
import pty
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from gptcli.cli.main import main
from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.model.gpt import GPT, initialise
from gptcli.reports.text import visible
from gptcli.runs.checkpoint import Contents, publish
from gptcli.runs.run_dir import new_run_dir

# Characters of 2 and 4 bytes, a terminal's title, an invalid byte, a line's end; no byte twice.
CYCLE = "é🙂\x1b]0;m\x07".encode() + b"\xff" + b"\r\nZ"
TEXT = CYCLE.decode("utf-8", "replace")
GREEDY = ("--temperature", "0", "--prompt", "Z")


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path) -> Path:
    """A run whose model goes through `CYCLE` for ever."""
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, tie_embeddings=False)
    config = Config(name="cycle", model=shape)
    tokenizer = Tokenizer.of_bytes()
    model = GPT(config.model, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))  # the blocks add nothing
    with torch.no_grad():
        model.wte.weight.zero_()
        model.head.weight.zero_()
        for i, byte in enumerate(CYCLE):
            model.wte.weight[byte, i] = 1.0
            model.head.weight[CYCLE[(i + 1) % len(CYCLE)], i] = 1.0
    made = new_run_dir("cycle", None, overwrite=False)
    publish(made, 10, Contents(model.state_dict(), {}, {}, dump_config(config), tokenizer))
    return made


class Terminal:
    """`gpt` in a fork of this process, on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.output = b""
        self.process, self._screen = pty.fork()
        if self.process == 0:
            code = 70
            try:
                sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
                code = main(list(arguments))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def read(self) -> bool:
        """Some more of what is shown; False at the end."""
        try:
            data = os.read(self._screen, 65536)
        except OSError:  # Linux says so when the other end is closed
            return False
        self.output += data
        return bool(data)

    def press(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def wait(self) -> int:
        """The exit code, once all is read."""
        while self.read():
            pass
        os.close(self._screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    @property
    def shown(self) -> str:
        """As the program wrote it; the terminal turns LF into CR LF."""
        return self.output.decode(errors="ignore").replace("\r\n", "\n")


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_text_on_a_terminal(stream):
    """A model that learned escape sequences must not set the terminal's title, nor half a
    character end up as two; a line's end that comes in two pieces is still one."""
    count = str(4 * len(CYCLE))
    terminal = Terminal("generate", *GREEDY, "--max-new-tokens", count, stream)
    assert terminal.wait() == 0
    text, _, rest = terminal.shown.partition(f"Z{visible(TEXT * 4)}\n")
    assert text == ""
    assert rest.startswith("the text grew past block_size")
    assert b"\x1b" not in terminal.output
    assert terminal.output.decode()
    assert "tokens/s" in rest


def test_raw_text_on_a_terminal():
    """--raw without effect."""
    terminal = Terminal("generate", *GREEDY, "--max-new-tokens", str(len(CYCLE)), "--raw")
    assert terminal.wait() == 0
    assert "é🙂\x1b]0;m\x07\ufffd\r\nZ\n" in terminal.shown


def test_text_in_a_pipe(forked):
    """Escapes for people in what a program reads."""
    arguments = ["generate", *GREEDY, "--max-new-tokens", str(len(CYCLE))]
    child = forked(arguments)
    assert child.stdout.read() == f"Z{TEXT}\n".encode()
    assert child.wait() == (0, "")


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


def test_head_in_a_shell(shell, run_dir):
    """A traceback, or a pipeline that `set -o pipefail` calls failed, after `| head -1`."""
    began = time.monotonic()
    done = shell(
        f"gpt generate {' '.join(GREEDY)} --max-new-tokens 9999999 --model {run_dir} | head -1;"
        ' echo "${PIPESTATUS[@]}"'
    )
    first = f"Z{TEXT}".splitlines()[0]
    assert done.stdout == f"{first}\n0 0\n"
    assert done.stderr == ""
    assert time.monotonic() - began < 40
