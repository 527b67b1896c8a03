"""Prompt files: lines of text, and JSON lines with settings of their own."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from gptcli import stop
from gptcli.config.schema import GenerateConfig
from gptcli.errors import ConfigError, DataError
from gptcli.generation.prompt_file import read_bytes, read_prompts

DEFAULTS = GenerateConfig(temperature=0.5, n=2, stop=["x"], seed=9, json_lines=True)


def rows(tmp_path: Path, *lines: str | dict[str, Any], name: str = "p.jsonl") -> str:
    file = tmp_path / name
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(file)


def problems(tmp_path: Path, *lines: str | dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_prompts(rows(tmp_path, *lines), DEFAULTS)
    return [line.removeprefix(f"{tmp_path}/") for line in caught.value.problems]


def test_a_row_changes_only_itself(tmp_path):
    """Guards: settings of one row that reach the next, or defaults that a row loses."""
    own = {
        "n": 3,
        "max_new_tokens": 4,
        "temperature": 1,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 2.0,
        "stop": ["a", "b"],
        "bad_words": ["c"],
        "seed": 3,
        "logprobs": 2,
    }
    file = rows(tmp_path, {"prompt": "one", **own}, "", {"prompt_tokens": [1, 2]})
    first, second = read_prompts(file, DEFAULTS)
    assert first.settings == DEFAULTS.model_copy(update={"prompt": "one", **own})
    assert second.settings == DEFAULTS.model_copy(update={"prompt_tokens": [1, 2]})
    assert [first.where, second.where] == [f"{file}:1", f"{file}:3"]


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    """Guards: an offset alone, which no editor finds."""
    (tmp_path / "p.txt").write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"p\.txt:2: not UTF-8 at byte 7 of the file"):
        read_prompts(str(tmp_path / "p.txt"), DEFAULTS)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_file_without_end(monkeypatch):
    """Guards: memory filled by `yes | gpt generate --prompt-file -`."""
    monkeypatch.setattr("gptcli.generation.prompt_file._MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="more than 1,000 bytes"):
        read_prompts("/dev/zero", DEFAULTS)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "PROMPTS.JSONL", "p.ndjson"])
def test_rows_are_known_by_what_they_are(tmp_path, name):
    """Guards: JSON continued as text because of the file's name."""
    [found] = read_prompts(rows(tmp_path, {"prompt": "a\nb"}, name=name), DEFAULTS)
    assert found.settings.prompt == "a\nb"


def test_a_whole_number_may_be_written_with_an_exponent(tmp_path):
    """Guards: 1e2, which a YAML config takes, refused in a row."""
    [found] = read_prompts(rows(tmp_path, '{"prompt": "a", "max_new_tokens": 1e2}'), DEFAULTS)
    assert found.settings.max_new_tokens == 100


def test_text_that_looks_like_json(tmp_path, caplog):
    """Guards: prompts that begin with a brace refused, some lines read as rows, or rows continued
    as text with no word about it."""
    lines = ['{"prompt": "a"}', "{ int x; }", "[1]"]
    found = read_prompts(rows(tmp_path, *lines, name="p.txt"), DEFAULTS)
    assert [prompt.settings.prompt for prompt in found] == lines
    assert found[1].where.endswith("p.txt:2")
    [told] = caplog.messages
    assert told.endswith(
        "p.txt: 1 of 3 lines are JSON objects, not all: every line is taken as text;"
        " name it *.jsonl for rows"
    )
    caplog.clear()
    read_prompts(rows(tmp_path, *lines[1:], name="p.txt"), DEFAULTS)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a",}', r"p\.jsonl:2:16: not valid JSON: "),
        ("[1, 2]", r"p\.jsonl:2: not a JSON object"),
        ("Once", r"p\.jsonl:2:1: not valid JSON"),
        ("[" * 100_000, r"p\.jsonl:2: not valid JSON: nested"),
    ],
)
def test_jsonl_without_json(tmp_path, line, told):
    """Guards: a typing error in one row that turns all rows into prompts."""
    for name in ("p.jsonl", "p.ndjson"):
        with pytest.raises(DataError, match=told.replace("jsonl", name[2:])):
            read_prompts(rows(tmp_path, {"prompt": "a"}, line, name=name), DEFAULTS)


def test_all_problems_at_once_with_their_lines(tmp_path):
    """Guards: ten runs to find ten typing errors; a key without effect."""
    found = problems(
        tmp_path,
        {"prompt": "a", "temprature": 1},
        {"prompt": "a", "top_p": 2, "n": 1.5},
        {"prompt": "a", "prompt_tokens": [1]},
        {"n": 2},
        {"prompt": 5},
        {"prompt": "a", "device": "cpu", "json": True},
        {"prompt": "\ud800"},
        {"prompt": "a", "stop": [""]},
        {"prompt": "a", "temperature": float("nan")},
        {"prompt": None},
        {"prompt_tokens": [-1]},
    )
    wanted = [
        "p.jsonl:1:1: unknown key 'temprature' in generate; did you mean 'temperature'?",
        "p.jsonl:2:1: generate.n: expected a whole number, got the number 1.5",
        "p.jsonl:2:1: generate.top_p: must be at most 1, got 2",
        "p.jsonl:3:1: needs either prompt or prompt_tokens",
        "p.jsonl:4:1: needs either prompt or prompt_tokens",
        "p.jsonl:5:1: generate.prompt: expected text or null, got the number 5; quote it: '5'",
        "p.jsonl:6:1: device is the same for all prompts: remove it here",
        "p.jsonl:6:1: json is the same for all prompts: remove it here",
        "p.jsonl:7:1: generate.prompt: '\\ud800' is not valid Unicode text",
        "p.jsonl:8:1: generate.stop: an empty text is part of every text;",
        "p.jsonl:9:1: generate.temperature: expected a number, got the text 'nan'",
        "p.jsonl:10:1: needs either prompt or prompt_tokens",
        "p.jsonl:11:1: generate.prompt_tokens[0]: must be at least 0, got -1",
    ]
    assert [line[: len(start)] for line, start in zip(found, wanted, strict=True)] == wanted


def test_a_file_of_problems_is_cut(tmp_path):
    """Guards: a terminal full of the same line."""
    found = problems(tmp_path, *[{"promt": "a"}] * 150)
    assert len(found) == 101
    assert found[-1].endswith("p.jsonl: and 50 more problems")


def test_logprobs_need_json(tmp_path):
    """Guards: a setting that is silently without effect."""
    file = rows(tmp_path, {"prompt": "a", "logprobs": 1})
    with pytest.raises(ConfigError, match=r"p\.jsonl:1:1: logprobs needs --json"):
        read_prompts(file, GenerateConfig())


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="names an open pipe")
def test_waiting_for_a_pipe_can_be_stopped() -> None:
    """A read begins again after a signal: Ctrl-C had no effect until the other end was closed."""
    reader, writer = os.pipe()
    os.write(writer, b"Once\n")
    try:
        asking = threading.Timer(0.3, stop.request, [signal.SIGTERM])
        asking.start()
        with pytest.raises(stop.Stopped):
            read_bytes(f"/dev/fd/{reader}")
    finally:
        asking.join()
        stop.reset()
        os.close(reader)
        os.close(writer)
