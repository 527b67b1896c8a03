"""`gpt generate --output-bytes`: data that is no text goes in and comes out as it is."""

import json
import sys
from pathlib import Path

import pytest
import torch

from gptcli.cli.main import main
from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.model.gpt import GPT, initialise
from gptcli.runs.checkpoint import Contents, publish
from gptcli.runs.run_dir import new_run_dir

# No UTF-8; line ends, NUL, what looks like a BOM, and an escape sequence.
PROMPT = b"\xef\xbb\xbf\x89PNG\r\n\x1a\n\x00\xff\xd8\x1b[31m\n"
FIXED = ("--max-new-tokens", "40", "--seed", "5")
FULL = "the text grew past block_size, 32 tokens: a full window goes on with its last 16\n"


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path) -> Path:
    """A run with one checkpoint of an untrained model on byte tokens, under GPT_RUNS."""
    config = Config(name="tiny", model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32))
    tokenizer = Tokenizer.of_bytes()
    model = GPT(config.model, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    made = new_run_dir("tiny", None, overwrite=False)
    publish(made, 10, Contents(model.state_dict(), {}, {}, dump_config(config), tokenizer))
    return made


@pytest.fixture
def prompt_file(tmp_path: Path) -> str:
    (tmp_path / "start.png").write_bytes(PROMPT)
    return str(tmp_path / "start.png")


def test_bytes_in_and_out(capsysbinary, prompt_file):
    """Bytes that become U+FFFD, a BOM or line end that is lost, or a newline at the end make an
    image that no program opens."""
    ids = ",".join(map(str, [256, *PROMPT]))
    assert main(["generate", "--prompt-tokens", ids, *FIXED, "--json"]) == 0
    expected = bytes(json.loads(capsysbinary.readouterr().out)["tokens"])
    assert b"\xef\xbf\xbd" not in expected
    with pytest.raises(UnicodeDecodeError):  # else this shows nothing
        expected.decode()

    given = ["generate", "--prompt-file", prompt_file, *FIXED, "--output-bytes"]
    assert main(given) == 0
    assert capsysbinary.readouterr() == (PROMPT + expected, FULL.encode())
    assert main([*given, "--no-prompt"]) == 0
    assert capsysbinary.readouterr() == (expected, FULL.encode())


def test_section_and_token_ids(capsysbinary, tmp_path):
    """A key that only the flag reaches; a prompt of ids printed as text."""
    (tmp_path / "g.yaml").write_text("generate: {output_bytes: true, prompt_tokens: [255, 0]}\n")
    assert main(["generate", "--config", str(tmp_path / "g.yaml"), *FIXED]) == 0
    out = capsysbinary.readouterr().out
    assert out.startswith(b"\xff\x00")
    assert not out.endswith(b"\n")


def test_a_pipe_from_end_to_end(shell, capsysbinary, prompt_file, tmp_path):
    """stdin read as text, or a log line in the file."""
    generate = f"gpt generate --output-bytes {' '.join(FIXED)}"
    done = shell(f"{generate} - < {prompt_file} > piped.png; echo rc $? >&2")
    assert done.stderr == f"{FULL}rc 0\n"
    data = (tmp_path / "piped.png").read_bytes()
    assert data.startswith(PROMPT)
    assert len(data) > len(PROMPT)
    assert main(["generate", "--prompt-file", prompt_file, *FIXED, "--output-bytes"]) == 0
    assert capsysbinary.readouterr().out == data


@pytest.mark.parametrize(
    "flags", [("-n", "2"), ("--json",), ("--stop", "x"), ("--stream",)], ids=lambda f: f[0]
)
def test_what_bytes_have_no_room_for(gpt, flags):
    """An option that is silently ignored, or bytes of several results in one file."""
    code, out, err = gpt("generate", "--prompt", "x", "--output-bytes", *flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --output-bytes and {flags[0]} exclude each other\nhint: ")


def test_a_terminal_is_refused(gpt, monkeypatch):
    """Bytes of an image can lock a terminal or change its title."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    given = ("generate", "--prompt", "x", "--output-bytes", *FIXED)
    code, out, err = gpt(*given)
    assert (code, out) == (2, "")
    assert "> out.png" in err


def test_a_terminal_takes_raw_bytes_when_told(capsysbinary, monkeypatch):
    """--raw without effect."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["generate", "--prompt", "\x1b[", "--output-bytes", "--raw", *FIXED]) == 0
    assert capsysbinary.readouterr().out.startswith(b"\x1b[")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_full_disk(forked):
    """A traceback, or success, when the bytes do not fit."""
    given = ["generate", "--prompt", "x", "--output-bytes", "--quiet"]
    done = forked(given, stdout=Path("/dev/full")).wait()
    assert done == (6, "error: stdout: No space left on device\n")
