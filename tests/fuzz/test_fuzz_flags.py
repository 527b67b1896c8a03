"""Any command line."""

import os
import sys
from pathlib import Path

import pytest
from guard import Gpt, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st

from gptcli.cli import main as cli

COMMANDS = [
    ["pretrain"],
    ["finetune"],
    ["generate"],
    ["eval"],
    ["explain"],
    ["export"],
    ["import"],
    ["doctor"],
    [],
    ["config", "show"],
    ["config", "check"],
    ["config", "copy"],
    ["config", "list"],
    ["config", "schema"],
    ["data", "show"],
    ["data", "check"],
    ["tokenizer", "train"],
    ["tokenizer", "show"],
    ["runs", "list"],
    ["runs", "show"],
    ["runs", "report"],
    ["runs", "verify"],
    ["runs", "prune"],
    ["runs", "compare"],
    ["runs", "stop"],
    ["nonsense"],
]


def flags_of(words: list[str]) -> list[str]:
    """The options of a command, as its help has them."""
    command = cli._command(words)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    options = {option for parameter in command.params for option in parameter.opts}
    return sorted(options - {"--debug"})  # which asks for tracebacks


FLAGS = {" ".join(words): flags_of(words) for words in COMMANDS}
VALUES = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "r",
            "tiny.yaml",
            "text.txt",
            "small",
            "r/checkpoints",
            "..",
            "/dev/null",
            "",
            "-",
            "training.max_steps=1",
            "model.n_layer=0",
            "data.train=text.txt",
            "a=b",
            "--",
            "model.n_embd=1000000000000",
            "\x1b[31m",
            "out",
            "auto",
            "cpu",
            "hf",
            "10m",
        ]
    ),
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with flags of its own, and values and words of all kinds."""
    words = draw(st.sampled_from(COMMANDS))
    line = list(words)
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()) and FLAGS[" ".join(words)]:
            flag = draw(st.sampled_from(FLAGS[" ".join(words)]))
            value = draw(VALUES)
            line += draw(st.sampled_from([[flag], [flag, value], [f"{flag}={value}"]]))
        else:
            line.append(draw(VALUES))
    if words in (["pretrain"], ["finetune"]):  # what is asked to train for years is no fault
        line += ["--max-time", "1s"]
    return [word.replace("\0", "") for word in line]


@pytest.fixture(scope="module")
def run(folder: Path) -> None:
    """A run to name."""
    assert cli.main(["pretrain", "tiny.yaml", "--run-dir", "r", "--quiet"]) == 0


@fuzzed
@given(line=command_lines())
@pytest.mark.usefixtures("run")
def test_flags(line: list[str], gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line does what it says, or what is wrong with it is named."""
    with case("flags"), open(os.devnull) as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", file)
        patch.chdir(folder)
        well(gpt, line, {0, 2, 3, 4, 5, 6})
