import io
import os
import sys
import threading
from pathlib import Path

import pytest

from gptcli.cli.generate_command import _Output, _settings
from gptcli.config.schema import GenerateConfig
from gptcli.generation.row import Generated

FLAGS = dict.fromkeys(GenerateConfig.model_fields)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--stop", ""], "--stop: an empty text"),
        (["--bad-words", ""], "--bad-words: an empty text"),
        (["--quantize", "int4"], "--quantize: "),
        (["--speculate", "yes"], "--speculate: "),
        (["--device", "gpu"], "--device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'\n"),
        (["--truncate", "right"], "--truncate: "),
        (["--prompt-tokens", "1,x"], "--prompt-tokens: "),
        (["--prompt-tokens", "-1"], "--prompt-tokens: "),
        (["--prompt-file", "f"], "--prompt and --prompt-file exclude each other"),
        (["--logprobs", "2"], "--logprobs needs --json"),
        (["word"], "unexpected argument word"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_values_are_usage_errors(gpt, flags, named):
    """A value that no run could use ended in a traceback, or was taken for another."""
    prompt = [] if flags[0] == "--prompt-tokens" else ["--prompt", "x"]
    code, out, err = gpt("generate", *prompt, *flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {named}")


def test_no_prompt(gpt):
    code, _, err = gpt("generate")
    assert code == 2
    assert err.startswith("error: no prompt given\nhint: ")


def settings(text: str, tmp_path: Path, **flags: object) -> GenerateConfig:
    (tmp_path / "g.yaml").write_text(text)
    return _settings(str(tmp_path / "g.yaml"), {**FLAGS, **flags}, None)


def test_flags_win_over_the_section_only_when_given(tmp_path):
    """A default of the command line that overwrites the YAML makes the section useless."""
    text = "generate: {prompt: hello, temperature: 0.5, n: 3, json: true, stream: false}\n"
    merged = settings(text, tmp_path, n=2)
    assert (merged.prompt, merged.temperature, merged.n) == ("hello", 0.5, 2)
    assert (merged.json_lines, merged.stream, merged.top_p) == (True, False, 0.95)


def test_a_prompt_flag_replaces_the_sections_prompt(tmp_path):
    merged = settings("generate: {prompt: hello}\n", tmp_path, prompt_tokens=[1, 2])
    assert (merged.prompt, merged.prompt_tokens) == (None, [1, 2])


@pytest.fixture
def stdin(monkeypatch):
    """A pipe at stdin; returns what writes to it and closes it."""
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader))

    def write(data: bytes) -> None:
        def feed() -> None:
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(data)

        threading.Thread(target=feed, daemon=True).start()

    yield write
    sys.stdin.close()


def test_prompt_from_stdin(stdin):
    """`echo` ends its line; a prompt with that newline continues on another line."""
    stdin(b"Once upon\na time\n")
    assert _settings(None, FLAGS, ["-"]).prompt == "Once upon\na time"


def test_prompts_from_stdin(tmp_path):
    """`-` is stdin wherever a file is named, and not a file of that name."""
    assert settings("{}", tmp_path, prompt_file="-").prompt_file == "/dev/stdin"


def test_stdin_that_is_no_utf8(stdin, capsys):
    stdin(b"caf\xe9\n")
    assert _settings(None, FLAGS, ["-"]).prompt == "caf\ufffd"
    assert "warning: stdin is not valid UTF-8" in capsys.readouterr().err


def generated(prompt: str, *texts: str, reason: str = "length") -> list[Generated]:
    return [
        Generated(prompt, text, [1], reason, 7, sample, None) for sample, text in enumerate(texts)
    ]


def output(capsys, batches, **given: object) -> str:
    printer = _Output(GenerateConfig.model_validate(given))
    if printer.live:  # as the job does: sample 0 in pieces, among pieces of the others
        for batch in batches:
            printer.prompt(batch[0].prompt)
            for sample in batch:
                for letter in sample.text:
                    printer.piece(sample.sample, letter)
            printer.finished([batch])
    else:
        printer.finished(batches)
    return capsys.readouterr().out


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("no_prompt", [True, False])
def test_texts_in_order(capsys, stream, no_prompt):
    """Streaming several samples at once must not mix them, nor change what is printed."""
    shown = output(capsys, [generated("p:", "a", "b")], n=2, stream=stream, no_prompt=no_prompt)
    p = "" if no_prompt else "p:"
    assert shown == f"{p}a\n---\n{p}b\n---\n"


@pytest.mark.parametrize("stream", [True, False])
def test_one_text_has_no_separator(capsys, stream):
    assert output(capsys, [generated("p:", "a\n")], stream=stream) == "p:a\n\n"


@pytest.mark.parametrize("stream", [True, False])
def test_prompts_of_a_file_are_separated(capsys, stream):
    batches = [generated("p", "a"), generated("q", "b")]
    assert output(capsys, batches, prompt_file="f", stream=stream) == "pa\n---\nqb\n---\n"


def test_json_is_one_object_a_line(capsys):
    shown = output(capsys, [generated("\u2028", "\x1b\n")], json=True)
    assert shown.count("\n") == 1
    assert shown.startswith('{"prompt": "\\u2028", "text": "\\u001b\\n", "tokens": [1]')


def test_json_leaves_out_half_texts(capsys):
    """A reader that takes `finish_reason` at its word would keep a text cut by Ctrl-C."""
    assert output(capsys, [generated("p", "a", reason="interrupted")], json=True) == ""


@pytest.mark.parametrize(("raw", "shown"), [(False, "p\\x1b[31m[/x]\n"), (True, "p\x1b[31m[/x]\n")])
def test_text_on_a_terminal(monkeypatch, raw, shown):
    """A model can learn to write escape sequences; a pipe needs them unchanged."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        monkeypatch.setattr(sys, "stdout", stream)
        _Output(GenerateConfig.model_validate({"raw": raw, "stream": False})).finished(
            [generated("p", "\x1b[31m[/x]")]
        )
    assert terminal.getvalue() == shown
    assert pipe.getvalue() == "p\x1b[31m[/x]\n"
