"""`gpt pretrain --prove-resume`, and what it compares by."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import Forked

from gptcli import prove_resume
from gptcli.config.load import load_config
from gptcli.errors import ConfigError, GptError
from gptcli.runs.outcome import differences, digest, outcome

Gpt = Callable[..., tuple[int, str, str]]

CONFIG = """\
name: tiny
tokenizer: {kind: bytes}
data: {train: text.txt}
model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 32}
training: {max_steps: 6, tokens_per_step: 64, log_every: 1, eval_every: 3, save_every: 2,
           micro_batch_size: 2, precision: fp32, compile: off, device: cpu}
schedule: {warmup_steps: 1}
samples: {n: 1, max_new_tokens: 4}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("".join(f"day {i} is {i * i}.\n" for i in range(300)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)  # a second of plots
    return tmp_path


class Process(Forked):
    """As subprocess.Popen, but a fork of this process."""

    def __init__(self, command: list[str], **_: Any) -> None:
        assert command[1:4] == ["-m", "gptcli", "pretrain"]
        super().__init__(command[3:])
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def kill(self) -> None:
        if self.poll() is None:
            self.send(signal.SIGKILL)

    def wait(self) -> int:  # type: ignore[override]
        if self.code is None:
            self.code = super().wait()[0]
        return self.code


def test_a_proof(folder: Path, gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are really killed, in all three kinds of places."""
    monkeypatch.setattr("gptcli.prove_resume.subprocess", SimpleNamespace(Popen=Process))
    monkeypatch.setattr("gptcli.prove_resume._START_SECONDS", (0.01, 0.02))
    monkeypatch.setattr("gptcli.prove_resume._LONGEST_PAUSE_SECONDS", 0.01)
    config = load_config("tiny.yaml").config
    proof = prove_resume.prove_resume(config, steps=30, kills=3, directory=folder / "p", seed=3)
    assert proof.identical, proof.differences
    assert len(proof.kills) == 3
    assert proof.training_kills == 2
    assert {"while it started", "in the middle of a save"} <= set(proof.kills)
    assert proof.sha256[0] == proof.sha256[1]
    assert json.loads((folder / "p" / "proof.json").read_text())["kills"] == proof.kills
    assert not (folder / "p" / "straight").exists()


def test_what_is_said(folder: Path, gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command says identical or not, and where; both runs are kept where they differ."""
    monkeypatch.setattr("gptcli.prove_resume.subprocess", SimpleNamespace(Popen=Process))
    monkeypatch.setitem(prove_resume.prove_resume.__kwdefaults__, "kills", 1)
    code, out, err = gpt("pretrain", "tiny.yaml", "--prove-resume", "--run-dir=same")
    assert code == 0, err
    killed, same = out.splitlines()
    assert killed == "killed in the middle of a save"
    tried = "6 steps straight, and killed 1 times while training"
    assert same.startswith(f"bit-identical on this machine: {tried} (sha256 ")
    give = prove_resume._give_start

    def spoil(straight: Path, killed: Path, process: Any) -> None:
        give(straight, killed, process)
        first = killed / "metrics.jsonl"
        first.write_text(first.read_text().replace('"loss"', '"lost"'))

    monkeypatch.setattr("gptcli.prove_resume._give_start", spoil)
    code, out, err = gpt("pretrain", "tiny.yaml", "--prove-resume", "--run-dir=other")
    assert code == 4
    assert "error: not bit-identical on this machine: 6 steps straight" in err
    assert "error: metrics: the first other line is that of step 0 (" in err
    assert "hint: both runs are in other" in err
    assert (folder / "other" / "straight" / "run.json").exists()


def killing_at(moment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kills come where `moment` waits for them, in forks of this process."""
    monkeypatch.setattr("gptcli.prove_resume.subprocess", SimpleNamespace(Popen=Process))
    monkeypatch.setattr("gptcli.prove_resume._moments", lambda *_: [moment])


def test_kills_that_meet_nobody(folder: Path, gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a run that was through before any kill counts as one that was killed and came back."""

    def late(run: Path, process: Process) -> str:
        process.wait()
        return "behind step 6"

    killing_at(late, monkeypatch)
    code, out, err = gpt("pretrain", "tiny.yaml", "--prove-resume", "--run-dir=p")
    assert (code, out) == (2, "")
    assert "error: nothing is proved: the run of 6 steps was through before a kill met it\n" in err
    with pytest.raises(ConfigError, match="without a kill there is nothing to prove"):
        prove_resume.prove_resume(load_config("tiny.yaml").config, kills=0)


def test_kills_while_starting_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a kill before anything was trained counts as one that the training survived."""

    def early(run: Path, process: Process) -> str:
        return prove_resume._STARTING

    killing_at(early, monkeypatch)
    with pytest.raises(ConfigError, match="nothing is proved"):
        prove_resume.prove_resume(load_config("tiny.yaml").config, directory=folder / "p")


def test_a_process_that_crashes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a process that ends by itself, by an error or a signal of somebody else, is a kill."""

    def crash(run: Path, process: Process) -> str:
        (folder / "text.txt").unlink()
        process.wait()
        return "behind step 3"

    killing_at(crash, monkeypatch)
    with pytest.raises(GptError) as caught:
        prove_resume.prove_resume(load_config("tiny.yaml").config, directory=folder / "p")
    assert caught.value.exit_code == 3

    def other(run: Path, process: Process) -> str:
        process.send(signal.SIGALRM)
        process.wait()
        return "behind step 3"

    (folder / "text.txt").write_text("some day it will be.\n" * 99)
    killing_at(other, monkeypatch)
    with pytest.raises(GptError) as caught:
        prove_resume.prove_resume(load_config("tiny.yaml").config, directory=folder / "q")
    assert caught.value.exit_code == 142


def test_flags_that_do_not_go_with_it(gpt: Gpt) -> None:
    for flag in ("--resume", "--overwrite", "--dry-run"):
        code, _, err = gpt("pretrain", "tiny.yaml", "--prove-resume", flag)
        assert code == 2
        assert "--prove-resume makes runs of its own" in err


def test_a_run_that_fails(folder: Path) -> None:
    """What a process of the proof said of its end is said, with its exit code."""
    (folder / "text.txt").unlink()
    with pytest.raises(GptError, match=r"text\.txt: no such file") as caught:
        prove_resume.prove_resume(load_config("tiny.yaml").config, directory=folder / "p")
    assert caught.value.exit_code == 3


def test_outcomes(folder: Path, gpt: Gpt) -> None:
    """Two equal runs have one outcome, whenever they ran; another seed is another everywhere."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ("--run-dir", name, f"--set=seed={seed}", "--quiet")
        assert gpt("pretrain", "tiny.yaml", *flags)[0] == 0
    a, b, c = (outcome(folder / name) for name in "abc")
    assert differences(a, b) == []
    assert digest(a) == digest(b) != digest(c)
    names = [one.split(":")[0] for one in differences(a, c)]
    assert {"weights", "optimizer", "metrics"} <= set(names)
    (metrics,) = [one for one in differences(a, c) if one.startswith("metrics")]
    assert "step 0" in metrics
    assert "loss" in metrics
