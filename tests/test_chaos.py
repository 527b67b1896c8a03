"""`scripts/chaos.py`: what it counts, and what it takes for lost."""

import collections
import os
import random
import shutil
import signal
from pathlib import Path

import chaos
import chaos_faults
import pytest
from chaos_faults import Child, Run

from gptcli.runs import checkpoint

SHORT = [f"--set=training.{key}" for key in ("max_steps=6", "save_every=2", "keep_last=4")]
SHORT += ["--set=schedule.warmup_steps=1", "--set=schedule.kind=constant"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One to train, of six steps, without a report, whose plots take a second."""
    monkeypatch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)
    monkeypatch.setattr(Child.__init__, "__defaults__", ([*chaos_faults._TRAIN, *SHORT],))
    folder = chaos.prepared(tmp_path)
    return Run(folder, 1.0, random.Random(1), collections.Counter())


def path_of(run: Run, step: int) -> Path:
    return checkpoint.checkpoint_dir(run.directory, step)


def test_a_lost_save_is_owed_for_ever(run: Run) -> None:
    """Bug: only the saves since the fault before were looked for; what vanished later was not."""
    chaos_faults.undisturbed(run)
    chaos.check(run)
    assert (run.wrong, run.acknowledged) == ([], {0, 2, 4, 6})
    shutil.rmtree(path_of(run, 6))
    chaos.check(run)
    assert run.wrong == ["step 6 was acknowledged; there are [0, 2, 4]"]


def test_what_a_fault_damaged_is_not_owed(run: Run) -> None:
    """The save before it is, from then on; and `gpt runs verify` is to find the damage."""
    chaos_faults.undisturbed(run)
    chaos.check(run)
    assert chaos_faults.FAULTS["remove"](run)
    assert run.damaged == {6}
    chaos.check(run)
    chaos_faults.verified(run)
    assert run.wrong == []
    shutil.rmtree(path_of(run, 4))
    chaos.check(run)
    assert run.wrong == ["step 4 was acknowledged; there are [0, 2]"]


def test_damage_that_nobody_meant(run: Run) -> None:
    chaos_faults.undisturbed(run)
    chaos.check(run)
    os.truncate(path_of(run, 4) / "model.safetensors", 9)
    chaos.check(run)
    chaos_faults.verified(run)
    unreadable, verify = run.wrong
    assert "step-00000004" in unreadable
    assert verify.startswith("exit code 4, not in [0]: ")


def test_a_kill_that_comes_too_late_does_not_count(run: Run) -> None:
    """Bug: kills of processes that had ended were counted as survived."""
    run.seconds = 0.0
    assert chaos_faults.ended_by(signal.SIGKILL, -signal.SIGKILL)(run)
    run.seconds = 1e6
    assert not chaos_faults.ended_by(signal.SIGKILL, -signal.SIGKILL)(run)
    assert run.wrong == []
