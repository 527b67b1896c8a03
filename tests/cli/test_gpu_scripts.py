"""The scripts for GPU boxes on a CPU: three steps of the recipe, of a small model on a local text;
the check of a box that has no GPU; the speed of a run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mfu import main as speed_of

from gptcli.config.load import load_config
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment of its own for the script that looks installed, with this interpreter."""
    binaries = tmp_path / "environment" / "bin"
    binaries.mkdir(parents=True)
    for name, arguments in (("python", ""), ("gpt", "-m gptcli ")):
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        (binaries / name).chmod(0o755)
    line = f'. scripts/setup.sh; fingerprint "{binaries}/python"'
    found = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True, timeout=50
    )
    (tmp_path / "environment" / "gptcli-setup").write_text(found.stdout + "test tables\n")
    own = {"GPT_VENV": str(tmp_path / "environment"), "GPT_RUNS": str(tmp_path / "runs")}
    return {**os.environ, **own, "HF_HUB_OFFLINE": "1", "PIP_INDEX_URL": "file:///nowhere"}


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


def test_a_restart_goes_on(gpt, tmp_path: Path, environment: dict[str, str]) -> None:
    """The recipe fails after an hour of setting up a rented box, or begins again from nothing when
    the box was restarted. The run until then is of this process, which has loaded everything."""
    text = tmp_path / "text.txt"
    text.write_text("A fine web page, for those who want to learn.\n" * 400)
    small = [
        f"data.train={text}",
        "data.val_fraction=0.05",
        "tokenizer={kind: bytes}",
        "model.n_layer=2",
        "model.n_head=2",
        "model.n_embd=16",
        "model.block_size=64",
        "schedule.warmup_steps=2",
        "training.tokens_per_step=256",
        "training.log_every=1",
        "training.precision=fp32",
        "samples.max_new_tokens=4",
    ]

    run_dir = tmp_path / "runs" / "gpt2-124m"
    changes = [part for change in small for part in ("--set", change)]
    flags = ("--run-dir", str(run_dir), "--auto-resume", *changes)
    code, _, err = gpt("pretrain", "gpt2-124m", *flags, "--set", "training.max_steps=3")
    assert code == 0, err
    done = run(["bash", "scripts/gpt2_124m.sh", *small, "training.max_steps=5"], environment)
    assert done.returncode == 0, done.stderr
    assert f"report: {run_dir}/report.html" in done.stdout.splitlines()
    assert (run_dir / "report.html").is_file()
    logged = [line["step"] for line in read_metrics(run_dir) if line["event"] == "train"]
    assert logged == [1, 2, 3, 4, 5]
    about = read_run_json(run_dir)
    resumed = [entry["step"] for entry in about["history"] if entry["event"] == "resume"]
    assert resumed == [3]
    assert about["status"] == "finished"
    assert re.fullmatch(
        r".*, fp32, compile \w+, \d+ rows at once: [\d,]+ tokens/s, [\d.]+ TFLOP/s,"
        r" no published peak known",
        speed_of(run_dir),
    )


def test_a_wrong_argument_is_named(environment: dict[str, str]) -> None:
    """A misspelt key that is dropped costs a night on a rented box."""
    wrong = "optimizer.learning_rate=0.001"
    done = run(["bash", "scripts/gpt2_124m.sh", wrong], environment)
    assert done.returncode == 2
    assert "did you mean 'lr'" in done.stderr
    assert "report:" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_check_needs_a_gpu(environment: dict[str, str]) -> None:
    """Skipped tests must not read as passed checks."""
    done = run(["bash", "scripts/gpu_check.sh"], environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: torch finds no CUDA GPU here")
    assert "passed" not in done.stdout


def test_the_recipe_is_what_its_sources_ran() -> None:
    """Another batch or length of run makes the expected loss meaningless."""
    config = load_config("gpt2-124m").config
    training = config.training
    assert training.max_steps is not None
    assert training.max_steps * training.tokens_per_step == pytest.approx(10e9, rel=1e-3)
    assert training.tokens_per_step == 2**19
    assert (config.model.n_layer, config.model.n_embd, config.model.block_size) == (12, 768, 1024)
    assert config.optimizer.lr == 6e-4
