"""`gpt explain` as users call it."""

import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptcli.cli import terminal
from gptcli.cli.explain_command import explanation_text
from gptcli.config.load import dump_config, load_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.explain import explain
from gptcli.model.gpt import GPT, initialise
from gptcli.reports.explain_page import explain_html
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents

Run = Callable[..., tuple[int, str, str]]
TEXT = "Ein <b>Text</b> & 你好, länger als ein Block.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with random weights as a checkpoint."""
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, zero_init_output=False)
    config = Config(model=shape)
    made = GPT(shape, 257)
    initialise(made, torch.Generator().manual_seed(1))
    contents = Contents(
        made.state_dict(), {}, {"job": "import"}, dump_config(config), Tokenizer.of_bytes()
    )
    return str(checkpoint.publish(tmp_path_factory.mktemp("model"), 0, contents))


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ([], 2, "error: no text given\nhint: give one of --text TEXT, --file FILE, - (stdin)"),
        (["--text", "a", "-"], 2, "error: --text and - exclude each other"),
        (["word"], 2, "error: unexpected argument 'word'"),
        (["--text", ""], 2, "error: there is no text to explain"),
        (["--text", "ab", "--head", "0"], 2, "error: --head needs --layer"),
        (["--text", "ab", "--layer", "2"], 2, "error: --layer 2: the model's layers are 0 to 1"),
        (["--text", "ab", "--layer", "0", "--head", "9"], 2, "error: --head 9: the model's heads"),
        (["--text", "ab", "--token", "0"], 2, "error: --token 0: the predicted tokens of this"),
        (["--text", "ab", "--token", "-3"], 2, "error: --token -3: the predicted tokens of this"),
        (["--text", "ab", "--top", "0"], 2, "error: invalid value for '--top'"),
        (["--file", "gone.txt"], 3, "error: gone.txt: no such file"),
        (["--text", "ab", "--html", "no/such/page.html"], 6, "page.html: cannot be written"),
    ],
)
def test_wrong_flags(gpt: Run, model: str, flags: list[str], code: int, said: str) -> None:
    """Guards: tracebacks, and flags that are silently ignored."""
    found, _, err = gpt("explain", "--model", model, *flags)
    assert (found, said in err) == (code, True), err


def test_a_file_of_many_documents(gpt: Run, model: str, tmp_path: Path) -> None:
    """Guards: the first one explained as if it were all."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    code, _, err = gpt("explain", "--model", model, "--file", str(rows))
    assert (code, "holds 2 documents" in err) == (3, True)


def test_a_pipe_gets_plain_numbers_that_are_those_of_gpt_eval(
    gpt: Run, model: str, tmp_path: Path
) -> None:
    """Guards: colours in a file; a loss that differs from the one that gpt eval reports."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    code, out, err = gpt("explain", "--model", model, "--file", str(file), "--top", "2")
    assert code == 0
    assert "\x1b" not in out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:5] == ["POSITION", "BITS", "PROBABILITY", "RANK", "TOKEN"]
    assert [int(row[0]) for row in rows[1:]] == list(range(len(TEXT.encode()) + 1))
    bits = sum(float(row[1]) for row in rows[2:])
    _, report, _ = gpt("eval", "--model", model, "--data", str(file), "--json")
    scores = json.loads(report)["scores"]
    assert bits * math.log(2) / scores["tokens"] == pytest.approx(scores["loss"], abs=0.005)
    assert f"loss {scores['loss']:.4f}, {scores['bits_per_byte']:.4f} bits per byte" in err
    assert "in 2 windows of up to 32 tokens" in err


def test_json_from_stdin(gpt: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: attention of another head, keys that readers of the JSON rely on."""
    monkeypatch.setattr("gptcli.cli.explain_command.read_stdin", lambda: "你好")
    arguments = ["--model", model, "-", "--json", "--token", "-1", "--layer", "1", "--head", "1"]
    code, out, _ = gpt("explain", *arguments)
    found = json.loads(out)
    assert code == 0
    assert found["bits"] == pytest.approx(sum(t["bits"] for t in found["tokens"][1:]))
    assert found["chosen"] == 6
    assert [one["position"] for one in found["without"]] == [0, 1, 2, 3, 4, 5]
    (attention,) = found["attention"]
    assert (attention["layer"], attention["head"]) == (1, 1)
    assert [round(sum(row), 4) for row in attention["weights"]] == [1.0] * 7
    settings = load_config(None).config
    weights = explain(settings, "你好", model=model, layer=1).attention[1]
    assert attention["weights"] == weights[1].round(6).tolist()


def test_attention_of_a_prediction(gpt: Run, model: str) -> None:
    """Guards: the row of the token itself, which has not been seen yet when it is predicted."""
    flags = ["--text", "abcd", "--token", "3", "--layer", "0"]
    code, out, _ = gpt("explain", "--model", model, *flags)
    assert code == 0
    assert out.startswith('Position 3, "c": ')
    row = out.split("Layer 0, mean of its heads:\n")[1].splitlines()[1]
    assert row.startswith('       2  "b"  ')
    assert len(re.findall(r'[012] "\S+" [\d.]+ %', row)) == 3


def test_a_terminal_gets_colours(model: str, monkeypatch: pytest.MonkeyPatch, gpt: Run) -> None:
    """Guards: a text that steers the terminal; colours where NO_COLOR forbids them."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert terminal.takes_colours()
    found = explain(load_config(None).config, "a\x1b[2J\nb", model=model)
    shown = explanation_text(found, None, None, colours=True)
    assert "\x1b[2J" not in shown
    assert "\x1b[30;48;5;" in shown
    assert "↵\x1b[0m\n" in shown  # no colour runs on over the line's end
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.takes_colours()


def test_page_stands_alone(model: str) -> None:
    """Guards: a request from the page, text that becomes markup, colours without numbers."""
    settings = load_config(None).config
    found = explain(settings, TEXT + "</script>", model=model, token=40, maps=True)
    page = explain_html(found)
    assert "http:" not in page
    assert "https:" not in page
    assert set(re.findall(r'src="(.{15})', page)) == {"data:image/png;"}
    assert "<b>" not in page
    assert "<script" not in page
    assert page.count("<img ") == page.count('alt="Layer ') == 4
    for token in found.tokens[1:]:
        assert f"<td>{token.bits:.2f}</td>" in page
    assert "2 windows of 32 tokens" in page
    assert [int(level) for level in re.findall(r"<h([1-6])", page)] == [1, 2, 2, 2, 2]


def test_page_of_a_long_text(model: str) -> None:
    """Guards: a page of megabytes, or one that says nothing of what it leaves out."""
    found = explain(load_config(None).config, "long " * 500, model=model, top=1, maps=True)
    page = explain_html(found)
    assert "501 more are in the output of --json" in page
    assert len(page) < 1_000_000
