"""Any mutation of a valid checkpoint, with its hashes made anew more often than not."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from guard import Gpt, came_to, case, fuzzed, well
from hypothesis import given
from mutations import mutations

from gptcli.runs import checkpoint
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import update_run_json

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"]
FILES += ["manifest.json", "tokenizer/*"]
SAVED, LAST = 2, 3  # the step of the checkpoint that is mutated, and the last one of the run
KEYS = (
    f"--set=training.max_steps={LAST}",
    "--set=training.save_every=1",
    "--set=training.keep_last=9",
    "--set=schedule.kind=constant",  # else a resume would go back to before the decay
)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run that has one step left to do."""
    from gptcli.cli.main import main

    assert main(["pretrain", "tiny.yaml", "--run-dir", "r", "--quiet", *KEYS]) == 0
    shutil.rmtree(checkpoint.checkpoint_dir(folder / "r", LAST))
    update_run_json(folder / "r", status="stopped")
    return folder / "r"


@partial(fuzzed, few=8)
@given(mutate=mutations(FILES))
def test_checkpoints(mutate: Callable[[Path], None], run: Path, gpt: Gpt, folder: Path) -> None:
    """A checkpoint is loaded, verified and trained on from, or what is wrong with it is named."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    path = checkpoint.checkpoint_dir(copy, SAVED)
    mutate(path)
    with case("checkpoints"):
        prompt = ["--prompt", "a", "--max-new-tokens", "1"]
        well(gpt, ["generate", "--model", str(path), *prompt], {0, 4, 5, 6})
        well(gpt, ["runs", "verify", str(copy)], {0, 4})
        resume = ["pretrain", "tiny.yaml", "--run-dir", str(copy), "--resume", *KEYS]
        code, _, err = well(gpt, resume, {0, 4, 5, 6})
        came_to("checkpoints", went_on(copy, err) if code == 0 else "refused")


def went_on(run: Path, err: str) -> str:
    """Where the resume went on: from the mutated checkpoint, or, which it must say, from one
    before; and it trained from there to the end."""
    about = json.loads((run / "run.json").read_text())
    (resume,) = [entry for entry in about["history"] if entry["event"] == "resume"]
    if resume["step"] != SAVED:
        assert resume["step"] < SAVED, resume
        assert "checkpoint skipped: " in err, err
    trained = [r["step"] for r in read_metrics(run) if r["event"] == "train"]
    assert trained == list(range(1, LAST + 1)), (trained, err)
    assert checkpoint.list_checkpoints(run)[-1].name == f"step-{LAST:08d}"
    checkpoint.verify(checkpoint.checkpoint_dir(run, LAST))
    assert about["status"] == "finished"
    return "taken up" if resume["step"] == SAVED else "passed over"
