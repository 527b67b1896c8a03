"""Shell completion: what is offered, and that the printed scripts work in real shells."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli.completion import SCRIPTS


@pytest.fixture
def offered(gpt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What is offered for a line, in a folder with a run, a config and a text."""
    for name in ("runs/small-1", "runs/notes", "texts"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/small-1/run.json").write_text("{}")
    checkpoint = tmp_path / "runs/small-1/checkpoints/step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    (tmp_path / "book.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPT_RUNS", raising=False)

    def ask(line: str, shell: str = "zsh") -> list[str]:
        monkeypatch.setenv("GPT_COMPLETE", shell)
        code, out, err = gpt(line)
        monkeypatch.delenv("GPT_COMPLETE")
        assert (code, err) == (0, "")
        return out.splitlines()

    return ask


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gpt pret", ["pretrain"]),
        ("gpt --quiet pret", ["pretrain"]),
        ("gpt pretrain sma", ["small"]),
        ("gpt pretrain m", ["mine.yaml"]),
        ("gpt pretrain ./te", ["./texts/"]),
        ("gpt pretrain 'sma", ["small"]),
        ("gpt pretrain small --run-d", ["--run-dir"]),
        ("gpt pretrain small --set model.n_la", ["model.n_layer="]),
        ("gpt pretrain small --set model.preset=gpt2-x", ["model.preset=gpt2-xl"]),
        ("gpt pretrain small --set model.tie_embeddings=t", ["model.tie_embeddings=true"]),
        ("gpt generate --quantize ", ["int8", "fp16", "bf16"]),
        ("gpt generate --model ", ["runs/small-1"]),
        ("gpt generate --model runs/small-1 --trunc", ["--truncate"]),
        ("gpt generate --model=runs/sm", ["--model=runs/small-1"]),
        ("gpt generate --quantize=f", ["--quantize=fp16"]),
        ("gpt generate --model runs/small-1/", ["runs/small-1/checkpoints/step-00000010"]),
        ("gpt runs sho", ["show"]),
        ("gpt runs show ", ["small-1"]),
        ("gpt runs compare small-1 ", ["small-1"]),
        ("gpt config copy tiny", ["tiny", "tinystories"]),
        ("gpt completion f", ["fish"]),
        ("gpt generate --prompt ", []),
        ("gpt nonsense ", []),
        ("gpt pretrain --set model.nothing=", []),
        ("gpt pretrain /nowhere/", []),
    ],
)
def test_offered(offered: Any, line: str, expected: list[str]) -> None:
    """Guards: a place of the command line that is taken for another one."""
    assert offered(line) == expected


def test_bash_gets_what_stands_behind_its_own_breaks(offered: Any) -> None:
    """Guards: `model.preset=model.preset=gpt2`: bash replaces what follows = only."""
    assert offered("gpt pretrain small --set model.preset=gpt2-x", "bash") == ["gpt2-xl"]
    assert offered("gpt pretrain small --set model.n_la", "bash") == ["model.n_layer="]


def test_every_option_of_a_command_is_offered(offered: Any, gpt: Any) -> None:
    """Guards: options that completion does not find, or makes up."""
    for command in ("pretrain", "generate", "serve", "runs prune"):
        code, text, _ = gpt(*command.split(), "--help")
        listed = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE)) - {"--help"}
        assert code == 0
        assert listed <= set(offered(f"gpt {command} --")), command


def test_unknown_shells_are_refused(gpt: Any) -> None:
    """Guards: an empty script for a shell that is not known."""
    code, out, err = gpt("completion", "tcsh")
    assert (code, out) == (2, "")
    assert "none of bash, zsh, fish" in err


SHELLS = {
    "bash": """{script}
COMP_LINE='gpt pretrain sma' COMP_POINT=16
_gpt_completion
echo "${{COMPREPLY[@]}}" """,
    "fish": """{script}
complete -C 'gpt pretrain sma'""",
    "zsh": """compdef() {{ }}
_files() {{ }}
compadd() {{ shift $(( ${{@[(i)--]}} )); print -- $@ }}
words=(gpt pretrain sma) CURRENT=3 PREFIX=sma
{script}
_gpt_completion""",
}


@pytest.mark.parametrize("shell", [s for s in SCRIPTS if shutil.which(s)])
def test_the_script_works_in_its_shell(shell: str, tmp_path: Path) -> None:
    """Guards: quoting that a shell reads otherwise; a protocol that script and `gpt` do not share.
    zsh is given what its completion system would call."""
    called = tmp_path / "gpt"
    called.write_text(f'#!/bin/sh\nexec {sys.executable} -m gptcli "$@"\n')
    called.chmod(0o755)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(root), "HOME": str(tmp_path)}
    text = SHELLS[shell].format(script=SCRIPTS[shell])
    done = subprocess.run(
        [shell, "-c", text], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.split()[:1] == ["small"], done.stderr
