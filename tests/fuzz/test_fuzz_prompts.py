"""Any text or bytes as a prompt, and any settings of sampling."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from guard import Gpt, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st

from gptcli.data.tokenizer import train_bpe

ODD = st.sampled_from(
    ["<|endoftext|>", "\x1b]52;c;aGk=\x07", "\x9b2J", "[/bold]", ":smile:", "é\u0301"]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.one_of(ODD, st.text(max_size=5))).map("".join))
BYTES = st.one_of(st.binary(max_size=80), TEXTS.map(lambda t: t.encode("utf-8", "surrogatepass")))
FLOATS = st.one_of(st.floats(), st.floats(0, 2), st.sampled_from(["0", "1e-9", "inf", "nan"]))
SETTINGS = st.dictionaries(
    st.sampled_from(["--temperature", "--top-p", "--min-p", "--repetition-penalty"]),
    FLOATS,
    max_size=2,
)
WHOLE = st.dictionaries(
    st.sampled_from(["--top-k", "-n", "--seed", "--logprobs", "--max-new-tokens"]),
    st.one_of(st.integers(0, 6), st.integers()),
    max_size=2,
)


@pytest.fixture(scope="module")
def models(folder: Path) -> list[str]:
    """A model of bytes, and one of a trained vocabulary."""
    from gptcli.cli.main import main

    text = (folder / "text.txt").read_text()
    train_bpe([text], 300, "gpt4", 10**9).save(folder / "bpe")
    other = "--set=tokenizer={kind: file, path: bpe}"
    assert main(["pretrain", "tiny.yaml", "--run-dir", "bytes", "--quiet"]) == 0
    assert main(["pretrain", "tiny.yaml", "--run-dir", "words", "--quiet", other]) == 0
    return ["bytes", "words"]


@fuzzed
@given(
    way=st.sampled_from(["argument", "file", "stdin", "tokens"]),
    content=BYTES,
    model=st.integers(0, 1),
    settings=SETTINGS,
    whole=WHOLE,
    switches=st.sets(
        st.sampled_from(
            [
                "--json",
                "--no-prompt",
                "--raw",
                "--allow-special",
                "--truncate=error",
                "--stop=e",
                "--no-stream",
            ]
        )
    ),
)
def test_prompts(
    way: str,
    content: bytes,
    model: int,
    settings: dict[str, Any],
    whole: dict[str, int],
    switches: set[str],
    models: list[str],
    gpt: Gpt,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt is continued, or what is wrong with it is named; JSON stays JSON."""
    flags = ["generate", "--model", models[model], *sorted(switches)]
    given_flags = {**settings, **whole}
    # What takes for ever because it is asked to is no fault.
    given_flags["--max-new-tokens"] = min(int(given_flags.get("--max-new-tokens", 4)), 12)
    if abs(int(given_flags.get("-n", 1))) > 20:
        given_flags["-n"] = 2
    flags += [
        f"{name}={value}" if len(name) > 2 else f"{name}{value}"
        for name, value in given_flags.items()
    ]
    path = folder / "prompt.txt"
    path.write_bytes(content)
    if way == "argument":
        flags += ["--prompt", content.decode("utf-8", "surrogateescape").replace("\0", "")]
    elif way == "file":
        flags += ["--prompt-file", str(path)]
    elif way == "tokens":
        flags += ["--prompt-tokens", ",".join(str(byte) for byte in content[:9])]
    else:
        flags += ["--prompt-file", "-"]
    with case("prompts"), open(path) as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", file)
        code, out, _ = well(gpt, flags, {0, 2, 3})
    if code == 0 and "--json" in switches:
        for line in out.splitlines():
            assert set(json.loads(line)) >= {"text", "tokens", "finish_reason", "seed"}
    assert os.path.exists("bytes")
