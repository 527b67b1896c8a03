"""gpt generate with --choices, --regex and --json-schema, from the command line to the texts."""

import json
import os
import re
import string
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders
from tokenizers.models import BPE

from gptcli.config.generate_schema import GenerateConfig
from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer, load_tokenizer_json
from gptcli.generate import generate_bytes
from gptcli.generation import constraint
from gptcli.model.gpt import GPT, initialise
from gptcli.runs.checkpoint import Contents, publish
from gptcli.runs.load import load_model
from gptcli.runs.run_dir import new_run_dir

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}


def publish_model(tokenizer: Tokenizer) -> Path:
    """A run with one checkpoint of an untrained model, under GPT_RUNS."""
    config = Config(name="tiny", model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32))
    model = GPT(config.model, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    made = new_run_dir("tiny", None, overwrite=False)
    publish(made, 10, Contents(model.state_dict(), {}, {}, dump_config(config), tokenizer))
    return made


@pytest.fixture
def run_dir() -> Path:
    return publish_model(Tokenizer.of_bytes())


FIXED = ("generate", "--prompt", "Once", "--seed", "5", "-n", "4")


def test_a_missing_package_is_told_before_the_model_is_looked_for(gpt, monkeypatch):
    """Guards: minutes of loading before an ImportError."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    constraint._problem.cache_clear()
    code, out, err = gpt(*FIXED, "--regex", "a{9}")
    assert (code, out) == (2, "")
    assert err.startswith("error: choices, regex and json_schema need the package llguidance")
    assert err.endswith("\nhint: pip install 'gptcli[constrain]'\n")


pytest.importorskip("llguidance", reason="needs the extra constrain")


def rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_choices(gpt, run_dir):
    """Guards: a list whose spaces or commas are lost; `complete` that a reader cannot rely on."""
    for written, choices in [
        ("yes,no, maybe", ["yes", "no", " maybe"]),
        ('["a, b", "c"]', ["a, b", "c"]),
        ("one", ["one"]),
        ("[1],2", ["[1]", "2"]),
    ]:
        code, out, err = gpt(*FIXED, "--choices", written, "--json", "--logprobs", "1")
        assert (code, err) == (0, "")
        found = rows(out)
        assert {row["text"] for row in found} <= set(choices)
        assert all(row["complete"] is True and row["finish_reason"] == "stop" for row in found)
        assert all(len(row["logprobs"]) == len(row["tokens"]) for row in found)


def test_regex_streamed_and_whole(gpt, run_dir):
    whole = gpt(*FIXED, "--regex", "[a-c]{3}(é|x)\n?", "--no-stream")
    assert whole == gpt(*FIXED, "--regex", "[a-c]{3}(é|x)\n?")
    code, out, err = whole
    assert (code, err) == (0, "")
    assert re.fullmatch("(Once[a-c]{3}(é|x)\n?\n---\n){4}", out)


def test_a_schema_in_a_file_a_pipe_and_a_config(gpt, run_dir, tmp_path):
    """Guards: a schema that is looked for in one way only; a shell's pipe, which is read once."""
    (tmp_path / "p.json").write_text(json.dumps(POINT, indent=2))
    (tmp_path / "g.yaml").write_text(
        f"generate: {{prompt: Once, n: 4, json_schema: {POINT!r}}}\n".replace("False", "false")
    )
    given = [*FIXED, "--json", "--json-schema"]
    code, out, err = gpt(*given, str(tmp_path / "p.json"))
    assert (code, err) == (0, "")
    for row in rows(out):
        found = json.loads(row["text"])
        assert list(found) == ["x"]
        assert -9 <= found["x"] <= 9
    assert gpt(*given, json.dumps(POINT)) == (0, out, "")
    config = ("generate", "--config", str(tmp_path / "g.yaml"), "--seed", "5", "--json")
    assert gpt(*config) == (0, out, "")
    if Path("/dev/fd").is_dir():  # as the shell's <(cat p.json)
        reader, writer = os.pipe()
        os.write(writer, json.dumps(POINT).encode())
        os.close(writer)
        assert gpt(*given, f"/dev/fd/{reader}") == (0, out, "")
        os.close(reader)
    _, changed, _ = gpt(*config, "--choices", "a")  # a flag replaces the section's
    assert {row["text"] for row in rows(changed)} == {"a"}


def test_rows_have_their_own(gpt, run_dir, tmp_path):
    """Guards: the constraint of one row that reaches another, or a default that stays beside it."""
    file = tmp_path / "p.jsonl"
    given = [
        {"prompt": "a", "choices": ["p", "q"]},
        {"prompt": "b", "regex": "z{20}"},
        {"prompt": "c", "json_schema": POINT},
        {"prompt": "d", "json_schema": json.dumps({"type": "null"})},
        {"prompt": "e"},
        {"prompt": "f", "choices": None, "max_new_tokens": 20},
    ]
    file.write_text("\n".join(map(json.dumps, given)))
    flags = ("--prompt-file", str(file), "--choices", "u,v", "--seed", "1", "--json")
    code, out, err = gpt("generate", *flags)
    assert (code, err) == (0, "")
    texts = [row["text"] for row in rows(out)]
    assert texts[0] in ("p", "q")
    assert texts[1] == "z" * 20
    assert list(json.loads(texts[2])) == ["x"]
    assert texts[3] == "null"
    assert texts[4] in ("u", "v")
    assert texts[5] not in ("u", "v")
    assert "complete" not in rows(out)[5]
    code, shared, _ = gpt("generate", *flags, "--speculate", "lookup")
    assert (code, [row["text"] for row in rows(shared)]) == (0, texts)


def test_texts_that_are_cut_are_told_of(gpt, run_dir):
    """Guards: half of a JSON object that a program reads as an answer, and a line for each of many
    texts."""
    cut = ("--regex", "[ab]{5}[0-9]*", "--json")
    code, out, err = gpt(*FIXED, *cut, "--max-new-tokens", "4")
    assert code == 0
    assert [(r["finish_reason"], r["complete"]) for r in rows(out)] == [("length", False)] * 4
    assert err == (
        "warning: 4 of 4 texts are not complete: max_new_tokens or a stop text ended them before"
        " their constraint was fulfilled\n"
    )
    code, out, err = gpt(*FIXED, *cut, "--max-new-tokens", "5")
    assert (code, err) == (0, "")
    assert [(r["finish_reason"], r["complete"]) for r in rows(out)] == [("length", True)] * 4
    code, out, err = gpt(*FIXED, *cut, "--stop", "b", "--max-new-tokens", "5")
    short = sum(len(row["text"]) < 5 for row in rows(out))
    assert short
    assert err.startswith(f"warning: {short} of 4 texts are not complete: ")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--choices", ""], "--choices: expected one or more texts of at least one character"),
        (["--choices", "a,,b"], "--choices: expected one or more texts"),
        (["--choices", "[]"], "--choices: expected one or more texts"),
        (["--regex", ""], "regex: an empty pattern"),
        (["--regex", "["], "regex: unclosed character class"),
        (["--json-schema", "nope.json"], "json_schema: cannot read nope.json: No such file"),
        (["--json-schema", '{"not": {}}'], "json_schema: keywords that cannot be kept: "),
        (["--choices", "a", "--regex", "b"], "--choices and --regex exclude each other; give one"),
    ],
)
def test_bad_ones_are_usage_errors_without_a_model(gpt, flags, told):
    """Guards: a traceback; a model that is loaded, or found missing, before the flag is read."""
    code, out, err = gpt(*FIXED, *flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {told}")


def test_bad_rows_are_named(gpt, run_dir, tmp_path):
    file = tmp_path / "p.jsonl"
    given = [
        {"choices": []},
        {"regex": "("},
        {"json_schema": {"not": {}}},
        {"regex": "a", "choices": ["a"]},
    ]
    file.write_text("\n".join(json.dumps({"prompt": "a", **row}) for row in given))
    code, out, err = gpt("generate", "--prompt-file", str(file))
    assert (code, out) == (2, "")
    wanted = [
        "1:1: generate.choices: expected one or more texts of at least one character",
        "2:1: regex: unclosed group",
        '3:1: json_schema: keywords that cannot be kept: ["not"]',
        "4:1: generate.regex: excludes choices, and both are given; give one of them",
    ]
    assert err == "".join(f"error: {file}:{line}\n" for line in wanted)


def test_what_the_tokens_cannot_spell(gpt, tmp_path):
    """Guards: a text that breaks its constraint where the model lacks tokens, and the texts beside
    it lost with it."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *string.ascii_letters])}
    library = Library(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    library.decoder = decoders.Fuse()
    library.add_special_tokens(["<unk>", "</s>"])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    publish_model(load_tokenizer_json(tmp_path / "tokenizer.json"))
    code, out, err = gpt(*FIXED, "--choices", "a,é")
    assert (code, out, err) == (2, "", "error: choices: the model's tokens cannot spell 'é'\n")
    file = tmp_path / "p.jsonl"
    given = [{"regex": "ab(é|è)"}, {"regex": "xyz"}]
    file.write_text("\n".join(json.dumps({"prompt": "a", **row}) for row in given))
    code, out, err = gpt("generate", "--prompt-file", str(file), "--seed", "1", "--json")
    assert code == 2
    assert [(row["text"], row["finish_reason"], row["complete"]) for row in rows(out)] == [
        ("ab", "failed", False),
        ("xyz", "stop", True),
    ]
    assert err == (
        f"error: {file}:1: regex 'ab(é|è)': none of the model's tokens goes on with it\n"
    )


def test_bytes_too(run_dir):
    """Guards: a constraint without effect where bytes are written instead of text."""
    given = GenerateConfig(prompt="x", seed=1, regex="é{3}", output_bytes=True, no_prompt=True)
    assert generate_bytes(load_model(str(run_dir), torch.device("cpu")), given) == "ééé".encode()
