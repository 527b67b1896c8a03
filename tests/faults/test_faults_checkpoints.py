"""Checkpoints that are damaged, foreign or in the way: the K rows of the fault matrix but for those
of resumes, which are in test_faults_resume.py.

Each test names its row and says what the row owes: exit code, message, hint, and what is kept.
"""

import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from interrupting import interrupted
from outcome import errors, hints, warnings
from safetensors.torch import load_file, save_file
from sealing import reseal
from small import working_in

from gptcli.cli.main import main
from gptcli.data.rows import Prefetch
from gptcli.errors import GptError, ResourceError
from gptcli.evaluation.perplexity import Scores
from gptcli.model.gpt import GPT
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.load import load_model
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json
from gptcli.training.validation import Validation

Gpt = Callable[..., tuple[int, str, str]]

SAVES = ("--set=training.max_steps=6", "--set=training.save_every=2", "--set=training.keep_last=9")
RESUME = ("pretrain", "tiny.yaml", "--run-dir=r", "--resume", *SAVES)
TEXT = ("--prompt=On", "--max-new-tokens=4", "--seed=1")
NEWEST, OLDER = 5, 4
OPTIMIZER = f"r/checkpoints/step-{NEWEST:08d}/optimizer.safetensors"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 5 of 6 and has checkpoints before it; to be copied."""
    with working_in(tmp_path_factory.mktemp("stopped")) as place, interrupted(NEWEST):
        assert main(["pretrain", "tiny.yaml", "--run-dir=r", "--quiet", *SAVES]) == 143
    assert steps(place / "r")[-2:] == [OLDER, NEWEST]
    return place / "r"


@pytest.fixture
def run(stopped: Path, folder: Path) -> Path:
    """A copy of that run, as `r` in the user's folder."""
    shutil.copytree(stopped, folder / "r")
    return folder / "r"


@pytest.fixture
def newest(run: Path) -> Path:
    """Its last checkpoint."""
    return checkpoint.checkpoint_dir(run, NEWEST)


@pytest.fixture(scope="module")
def contents(stopped: Path) -> Contents:
    """What a checkpoint holds."""
    return checkpoint.read(checkpoint.checkpoint_dir(stopped, NEWEST), with_optimizer=True)


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.list_checkpoints(run_dir)]


def told_steps(run_dir: Path) -> list[int]:
    return [r["step"] for r in read_metrics(run_dir) if r["event"] == "train"]


def leftovers(run_dir: Path) -> list[str]:
    return [p.name for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]


def in_child(work: Callable[[], object]) -> int:
    """Process id of a child that runs `work` and exits with 0, a GptError's code, or 1."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except GptError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def kill_after(child: int, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def killed_saves(run_dir: Path, contents: Contents, kills: Callable[[int, int], bool]) -> int:
    """Kill a process that saves again and again, while `kills` (so far; of them in the middle of a
    save) says so. After each: all that is there is whole, and nothing that was acknowledged is
    lost. Returns the last acknowledged step."""
    acknowledged = run_dir / "acknowledged"
    acknowledged.write_text("0")

    def save_for_ever() -> None:
        checkpoint.clean_leftovers(run_dir)
        paths = checkpoint.list_checkpoints(run_dir)
        step = checkpoint.verify(paths[-1])["step"] if paths else 0
        descriptor = os.open(acknowledged, os.O_WRONLY)
        while True:
            step += 1
            checkpoint.publish(run_dir, step, contents)
            os.pwrite(descriptor, b"%d" % step, 0)
            checkpoint.prune(run_dir, 2, ())

    moments, done, inside = random.Random(0), 0, 0
    while kills(done, inside):
        kill_after(in_child(save_for_ever), moments.uniform(0.01, 0.1))
        done += 1
        paths = checkpoint.list_checkpoints(run_dir)
        found = [checkpoint.verify(path)["step"] for path in paths]  # CheckpointError: unreadable
        assert max(found, default=0) >= int(acknowledged.read_text())
        inside += (run_dir / "checkpoints").exists() and any(
            name.startswith(".tmp-") for name in leftovers(run_dir)
        )
    checkpoint.clean_leftovers(run_dir)
    assert leftovers(run_dir) == []
    return int(acknowledged.read_text())


def test_k01_kills_while_saving(tmp_path: Path, contents: Contents) -> None:
    """K1: SIGKILL until 20 of them have left a half-written checkpoint: the newest published one is
    whole, none that was acknowledged is lost, and the next start removes what lies about."""
    (tmp_path / "run").mkdir()
    assert killed_saves(tmp_path / "run", contents, lambda _, inside: inside < 20) > 0


@pytest.mark.slow
def test_k01_two_hundred_kills_in_the_middle_of_a_save(tmp_path: Path, contents: Contents) -> None:
    """K1: SIGKILL until 200 of them have left a half-written checkpoint: 0 unreadable checkpoints,
    0 acknowledged saves lost."""
    (tmp_path / "run").mkdir()
    assert killed_saves(tmp_path / "run", contents, lambda _, inside: inside < 200) > 20


def test_k01_kills_while_a_step_is_saved_again(tmp_path: Path, contents: Contents) -> None:
    """K1: SIGKILL while a checkpoint is replaced by another of its step: one of the two is there,
    whole."""
    (tmp_path / "run").mkdir()
    versions = [replace(contents, state={"version": number}) for number in (1, 2)]
    checkpoint.publish(tmp_path / "run", 7, versions[0])

    def replace_for_ever() -> None:
        while True:
            for version in versions:
                checkpoint.publish(tmp_path / "run", 7, version)

    moments = random.Random(1)
    for _ in range(8):
        kill_after(in_child(replace_for_ever), moments.uniform(0.01, 0.1))
        checkpoint.clean_leftovers(tmp_path / "run")
        (path,) = checkpoint.list_checkpoints(tmp_path / "run")
        assert checkpoint.read(path, with_optimizer=True).state["version"] in (1, 2)


def test_k01_leftovers_of_a_kill_go_at_the_next_start(gpt: Gpt, run: Path, newest: Path) -> None:
    """K1: what a kill left of a save or of a deletion is removed when the run is resumed."""
    shutil.copytree(newest, newest.with_name(".tmp-step-00000006-99"))
    (newest.with_name(".tmp-step-00000006-99") / "manifest.json").unlink()
    shutil.copytree(newest, newest.with_name(".del-step-00000001-99"))
    (newest.with_name(".del-step-00000001-99") / "manifest.json").unlink()
    code, _, err = gpt(*RESUME)
    assert (code, warnings(err)) == (0, "")
    assert leftovers(run) == []


def flip(path: Path) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 100), "model.safetensors has 100"),
    "empty": (lambda d: os.truncate(d / "state.json", 0), "state.json has 0 bytes instead of"),
    "missing": (lambda d: (d / "config.yaml").unlink(), "config.yaml is missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "cut manifest": (lambda d: os.truncate(d / "manifest.json", 80), "manifest.json cannot be rea"),
    "no tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer/meta.json is missing"),
    "stray file": (lambda d: (d / "tokenizer/a.json").touch(), "tokenizer/a.json is not in"),
}


def assert_stepped_over(gpt: Gpt, run: Path, newest: Path, problem: str) -> None:
    """What K2 and K3 owe for a newest checkpoint that is damaged."""
    code, out, err = gpt("eval", f"--model={newest}", "--json")
    assert (code, out) == (4, "")
    (line,) = errors(err)
    assert problem.split()[0] in line
    assert newest.name in line
    assert hints(err) == f"which checkpoints of the run are whole: gpt runs verify {run}"
    code, _, err = gpt(*RESUME)
    assert code == 0, err
    (line,) = warnings(err).splitlines()
    assert line.startswith("checkpoint skipped: ")
    assert problem in line
    assert newest.name in line
    assert line.endswith(f"; using step {OLDER} instead: {NEWEST - OLDER} steps lost")
    assert told_steps(run) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damage", DAMAGES)
def test_k02_damaged_newest(damage: str, gpt: Gpt, run: Path, newest: Path) -> None:
    """K2: a resume goes on from the checkpoint before, and says which file is wrong and how many
    steps are lost; where the checkpoint is named, exit 4 and the command that says which are
    whole."""
    hurt, problem = DAMAGES[damage]
    hurt(newest)
    assert_stepped_over(gpt, run, newest, problem)


@pytest.mark.parametrize("damage", ["truncated", "no manifest"])
def test_k02_all_damaged(damage: str, gpt: Gpt, run: Path) -> None:
    """K2: with no whole checkpoint left, exit 4, with --auto-resume too; each is told, and none is
    deleted. Without a flag for it the run is not touched: exit 2."""
    spoil, told = DAMAGES[damage]
    for path in checkpoint.list_checkpoints(run):
        spoil(path)
    before, kept = steps(run), (run / "metrics.jsonl").read_bytes()
    for flag in ("--resume", "--auto-resume"):
        code, _, err = gpt("pretrain", "tiny.yaml", "--run-dir=r", *SAVES, flag)
        assert code == 4
        assert errors(err) == ["r has no valid checkpoint to resume from"]
        assert hints(err) == "what is left of it: gpt runs verify r"
        assert warnings(err).count(told) == len(before)
    assert gpt("pretrain", "tiny.yaml", "--run-dir=r", *SAVES)[0] == 2
    assert steps(run) == before
    assert (run / "metrics.jsonl").read_bytes() == kept


@pytest.mark.parametrize("flag", ["--resume", "--auto-resume"])
def test_k01_a_kill_between_two_names(flag: str, gpt: Gpt, run: Path, newest: Path) -> None:
    """K1: killed while the only checkpoint of a run was being replaced, it goes on from there."""
    for path in checkpoint.list_checkpoints(run):
        if path != newest:
            shutil.rmtree(path)
    newest.rename(newest.with_name(f".del-{newest.name}-77"))
    code, _, err = gpt("pretrain", "tiny.yaml", "--run-dir=r", *SAVES, flag)
    assert code == 0, err
    assert [entry["event"] for entry in read_run_json(run)["history"]][-2:] == [
        "resume",
        "finished",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_k03_a_flipped_bit(name: str, gpt: Gpt, run: Path, newest: Path) -> None:
    """K3: one flipped bit, which no library notices, is found by the hash; then as K2. To generate,
    the optimizer is not read, so its damage is none."""
    flip(newest / name)
    if name == "optimizer.safetensors":
        assert gpt("generate", f"--model={newest}", *TEXT)[0] == 0
        code, _, err = gpt(*RESUME)
        assert (code, "optimizer.safetensors is damaged" in warnings(err)) == (0, True)
        assert told_steps(run) == [1, 2, 3, 4, 5, 6]
    else:
        assert_stepped_over(gpt, run, newest, f"{name} is damaged (its sha256 differs)")


def edit(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a checkpoint's file (None: leave out), and give them out as its own."""
    tensors = {**load_file(path), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, path)
    reseal(path.parent)


def test_k04_tensors_that_do_not_fit(gpt: Gpt, newest: Path) -> None:
    """K4: missing, unexpected and misshapen tensors are listed, all at once, with exit 4; nothing
    is loaded loosely, to generate or to resume."""
    few = torch.ones(9, 16)
    changes = {"norm.weight": None, "extra": torch.ones(1), "head.weight": few}
    edit(newest / "model.safetensors", **changes)
    for command in (("generate", f"--model={newest}", *TEXT), RESUME):
        code, _, err = gpt(*command)
        assert code == 4
        (line,) = errors(err)
        assert f"checkpoints/{newest.name}" in line
        assert "missing: norm.weight" in line
        assert "unexpected: extra" in line
        assert "wrong shape: head.weight [9, 16] instead of [257, 16]" in line


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_k04_prefixes_of_wrappers(prefix: str, gpt: Gpt, run: Path, newest: Path) -> None:
    """K4: names from a compiled or distributed model lose the wrapper's prefix; a tensor that is
    there with and without one is exit 4."""
    expected = gpt("generate", f"--model={newest}", *TEXT)
    assert expected[0] == 0, expected[2]
    weights = newest / "model.safetensors"
    plain = load_file(weights)
    save_file({prefix + name: tensor for name, tensor in plain.items()}, weights)
    reseal(newest)
    assert gpt("generate", f"--model={newest}", *TEXT)[:2] == expected[:2]
    edit(weights, **{"norm.weight": torch.ones(16)})
    code, _, err = gpt("generate", f"--model={newest}", *TEXT)
    assert code == 4
    assert "holds tensors twice, with and without a wrapper's prefix" in errors(err)[0]


def test_k05_parameters_in_another_order(
    gpt: Gpt, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K5: the optimizer is saved by parameter name: where the model's parameters come in another
    order, as after a change of its code, each gets its own moments."""
    shutil.copytree(run, "straight")
    assert gpt(*RESUME, "--run-dir=straight")[0] == 0
    named = GPT.named_parameters

    def reversed_(self: GPT, *args: Any, **keys: Any) -> Iterator[tuple[str, Any]]:
        return reversed(list(named(self, *args, **keys)))

    monkeypatch.setattr(GPT, "named_parameters", reversed_)
    code, _, err = gpt(*RESUME)
    assert code == 0, err
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(f"{r}/checkpoints/step-00000006/{name}") for r in ("r", "straight"))
        assert one.keys() == other.keys()
        for key, tensor in one.items():  # a sum in another order has other last bits
            torch.testing.assert_close(tensor, other[key], rtol=1e-4, atol=1e-6, msg=key)


def test_k05_moments_of_another_parameter(gpt: Gpt, newest: Path) -> None:
    """K5: moments that do not have their parameter's shape, or belong to none, are exit 4 with the
    name; torch would take them without a word."""
    moments = load_file(newest / "optimizer.safetensors")
    one, other = "wte.weight.exp_avg", "blocks.0.mlp.up.weight.momentum"
    swapped = {one: moments[other].clone(), other: moments[one].clone()}
    edit(newest / "optimizer.safetensors", **swapped)
    code, _, err = gpt(*RESUME)
    assert code == 4
    assert errors(err) == [f"{OPTIMIZER}: optimizer state {other} is missing or misshapen"]
    edit(newest / "optimizer.safetensors", **{**moments, "blocks.7.momentum": torch.ones(3)})
    code, _, err = gpt(*RESUME)
    assert code == 4
    assert errors(err) == [f"{OPTIMIZER}: optimizer state of unknown parameters: blocks.7.momentum"]


def test_k07_a_newer_format(gpt: Gpt, run: Path, newest: Path) -> None:
    """K7: a checkpoint of a newer gpt is exit 4 with the version that reads it: it is neither taken
    for damage, which would lose its steps, nor deleted."""
    reseal(newest, format=2, gptcli="9.0")
    for command in (RESUME, ("generate", f"--model={newest}", *TEXT)):
        code, _, err = gpt(*command)
        assert code == 4
        assert f"{newest.name} is in format 2: it needs gpt >= 9.0" in errors(err)[0]
        assert hints(err) == "in a clone of its newer version: git pull && pip install ."
    checkpoint.prune(run, 1, ())
    assert NEWEST in steps(run)


def test_k07_an_older_format(gpt: Gpt, run: Path) -> None:
    """K7: checkpoints of early versions, whose manifest has no hash of itself and whose choices are
    fewer, are read as they are."""
    for path in checkpoint.list_checkpoints(run):
        state = json.loads((path / "state.json").read_text())
        state["choices"] = dict(list(state["choices"].items())[:6])
        (path / "state.json").write_text(json.dumps(state))
        reseal(path)
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["sha256"]
        (path / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = gpt(*RESUME)
    assert (code, warnings(err)) == (0, "")
    assert told_steps(run) == [1, 2, 3, 4, 5, 6]


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.bin"])
def test_k08_a_pickle_is_not_opened(name: str, gpt: Gpt, folder: Path) -> None:
    """K8: a pickle can run any code when it is read, so it is not: exit 4, and what to do."""
    (folder / name).write_bytes(pickle.dumps(Evil(folder / "canary")))
    code, out, err = gpt("generate", f"--model=./{name}", *TEXT)
    assert (code, out) == (4, "")
    assert name in errors(err)[0]
    assert "is a pickle file, which can run any code when it is read" in errors(err)[0]
    assert hints(err).endswith("gpt import FOLDER OUT --allow-pickle")
    assert not (folder / "canary").exists()


def test_k08_a_pickle_that_is_allowed(gpt: Gpt, folder: Path, gpt2: Path) -> None:
    """K8: `gpt import --allow-pickle` reads tensors out of a pickle and nothing else: code in it is
    exit 4 and does not run."""
    made = shutil.copytree(gpt2, folder / "made")
    tensors = load_file(made / "model.safetensors")
    (made / "model.safetensors").unlink()
    torch.save(tensors, made / "pytorch_model.bin")
    code, _, err = gpt("import", "./made", "out")
    assert code == 4
    assert "--allow-pickle" in errors(err)[0] + hints(err)
    code, _, err = gpt("import", "./made", "out", "--allow-pickle")
    assert code == 0, err
    torch.save({**tensors, "evil": Evil(folder / "canary")}, made / "pytorch_model.bin")
    code, _, err = gpt("import", "./made", "again", "--allow-pickle")
    assert code == 4
    assert "pytorch_model.bin" in errors(err)[0]
    assert not (folder / "canary").exists()
    assert not (folder / "again").exists()


def test_k09_the_newest_whole_one_stays(gpt: Gpt, run: Path) -> None:
    """K9: damaged checkpoints do not count as kept ones: the newest whole one outlives them, until
    enough newer ones are whole."""
    for step in (3, 4, 5):
        os.truncate(checkpoint.checkpoint_dir(run, step) / "model.safetensors", 10)
    checkpoint.prune(run, 1, ())
    assert 2 in steps(run)
    code, _, err = gpt(*RESUME, "--set=training.keep_last=2")
    assert code == 0, err
    assert f"using step 2 instead: {NEWEST - 2} steps lost" in warnings(err)
    whole = [int(p.name[5:]) for p in checkpoint.list_checkpoints(run) if checkpoint.is_whole(p)]
    best = checkpoint.read_best(run)
    assert best is not None
    assert {best[0], 6} <= set(whole)
    assert 2 not in steps(run)  # 4, which was saved again, and 6 are whole


def test_k09_bits_that_flipped(gpt: Gpt, run: Path) -> None:
    """K9: nor do checkpoints of the right size whose hashes differ: the run that goes on, and `gpt
    runs prune`, say so and keep the newest ones that are whole, before they delete a good one."""
    for step in (4, 5):
        flip(checkpoint.checkpoint_dir(run, step) / "optimizer.safetensors")
    code, _, err = gpt("runs", "prune", "r", "--yes")
    assert code == 0, err
    assert {3, 4, 5} <= set(steps(run))
    assert 2 not in steps(run)
    assert "step-00000005: optimizer.safetensors is damaged" in warnings(err)
    code, _, err = gpt(*RESUME, "--set=training.keep_last=2", "--set=training.save_every=1")
    assert code == 0, err
    assert f"using step 3 instead: {NEWEST - 3} steps lost" in warnings(err)
    for path in checkpoint.list_checkpoints(run)[-2:]:
        checkpoint.verify(path)


def test_k09_bits_that_flip_while_it_runs(run: Path, newest: Path) -> None:
    """K9: the same of a checkpoint that was whole when the run last looked."""
    checkpoint.prune(run, 3, ())
    assert steps(run) == [0, 3, 4, 5]
    flip(newest / "model.safetensors")
    flip(checkpoint.checkpoint_dir(run, OLDER) / "model.safetensors")
    checkpoint.prune(run, 1, ())
    assert steps(run) == [0, 3, 4, 5]


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_k09_a_deletion_that_fails(
    call: str, gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K9: an old checkpoint that cannot be deleted is a warning that names it; the run trains on,
    and every newer checkpoint is whole."""

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        if path.name.startswith(("step-00000002", ".del-step-00000002")):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *_, **__)

    of: Any = Path if call == "rename" else shutil
    real = getattr(of, call)
    flags = ["--set=training.max_steps=6", "--set=training.save_every=1"]
    with monkeypatch.context() as patch:
        patch.setattr(of, call, refuse)
        code, _, err = gpt("pretrain", "tiny.yaml", "--run-dir=r", *flags)
    assert code == 0, err
    old = "cannot delete the old checkpoint r/checkpoints/step-00000002: Permission denied"
    assert old in warnings(err)
    for path in checkpoint.list_checkpoints(folder / "r"):
        checkpoint.verify(path)
    assert steps(folder / "r")[-2:] == [5, 6]
    assert gpt("pretrain", "tiny.yaml", "--run-dir=r", "--resume", *flags)[0] == 0
    assert leftovers(folder / "r") == []  # the next start tries again


def test_k10_best_is_never_nan(gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K10: a validation loss that is NaN never becomes the best, and does not keep a later one from
    it; its line in the log has null."""
    score, calls = Validation.__call__, 0

    def spoilt(self: Validation) -> Scores:
        nonlocal calls
        calls += 1
        return replace(score(self), **({"loss": math.nan} if calls == 2 else {}))

    monkeypatch.setattr(Validation, "__call__", spoilt)
    flags = (*SAVES, "--set=training.eval_every=2")
    code, _, err = gpt("pretrain", "tiny.yaml", "--run-dir=r", *flags)
    assert code == 0, err
    evals = {r["step"]: r["loss"] for r in read_metrics(folder / "r") if r["event"] == "eval"}
    assert evals.pop(2) is None
    best = min(evals, key=lambda step: evals[step])
    assert best > 2
    assert checkpoint.read_best(folder / "r") == (best, evals[best])


def test_k10_a_damaged_best(gpt: Gpt, run: Path) -> None:
    """K10: a best.json that says NaN, or nothing, is a warning; the newest checkpoint is taken."""
    best = run / "checkpoints" / "best.json"
    for text, told in (('{"step": 0, "loss": NaN}', "no finite loss"), ('{"step": ', "is damaged")):
        best.write_text(text)
        code, _, err = gpt("eval", "--model=r", "--data=text.txt", "--max-tokens=64")
        assert code == 0, err
        assert f"best.json {told}" in warnings(err).replace("has no", "no")
        assert f"step {NEWEST}" in err or f"step-{NEWEST:08d}" in err


def test_k14_a_clock_that_went_back(gpt: Gpt, run: Path, newest: Path) -> None:
    """K14: what is newest goes by the step in the manifest: file times that are equal, or those of
    a clock that went back, change nothing."""
    for path in run.rglob("*"):
        os.utime(path, (10**9, 10**9))
    for path in (newest, *newest.iterdir()):
        os.utime(path, (0, 0))
    code, _, err = gpt(*RESUME)
    assert (code, warnings(err)) == (0, "")
    assert read_run_json(run)["history"][-2]["step"] == NEWEST
    assert told_steps(run) == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a batch ends with exit code 1."""

    def train(*_: Any) -> None:
        raise AssertionError("a batch was asked for")

    monkeypatch.setattr(Prefetch, "next", train)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("text.txt/r", "Not a directory"),
        pytest.param(
            "/proc/sys/gpt-run",
            "(Permission denied|No such file or directory|Operation not permitted|Read-only)",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc"),
        ),
    ],
)
def test_k16_nowhere_to_write(place: str, why: str, gpt: Gpt) -> None:
    """K16: a run directory that cannot be made is exit 6 with the reason, before any training."""
    code, out, err = gpt("pretrain", "tiny.yaml", f"--run-dir={place}")
    assert (code, out) == (6, "")
    (line,) = errors(err)
    assert line.startswith(f"cannot make the run directory {place}: ")
    assert re.search(why, line)


def small_files(most_bytes: int) -> Callable[[], None]:
    """For a child: no file of it can become larger."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))


@pytest.mark.usefixtures("no_training")
def test_k16_a_directory_that_takes_no_byte(folder: Path) -> None:
    """K16: a directory in which files can be made but not filled, as on a full disk, is exit 6 with
    the file that could not be written, before any training."""
    child = Forked(["pretrain", "tiny.yaml", "--run-dir=r"], before=small_files(0))
    code, err = child.wait()
    assert code == 6
    (line,) = errors(err)
    assert re.match("cannot (lock|write) r.*: File too large", line)


@pytest.mark.usefixtures("no_training")
def test_k16_no_room_for_a_checkpoint(folder: Path) -> None:
    """K16: the model is saved once at step 0, before any training: where that fails, exit 6 with
    what hinders it."""
    child = Forked(["pretrain", "tiny.yaml", "--run-dir=r"], before=small_files(20_000))
    code, err = child.wait()
    assert code == 6
    (line,) = errors(err)
    assert line.startswith("checkpoint of step 0 is not saved: a file of it is larger than this")
    assert hints(err) == "ulimit -f unlimited"
    assert steps(folder / "r") == []
    assert leftovers(folder / "r") == []
    assert read_run_json(folder / "r")["status"] == "failed"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 as transformers saves it: Conv1D weights, tied embeddings, no tokenizer."""
    import transformers

    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": 257}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    place = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(config).save_pretrained(place)
    return place


@pytest.fixture
def hf(gpt2: Path, folder: Path) -> Path:
    """A copy of it in the user's folder."""
    return Path(shutil.copytree(gpt2, folder / "hf"))


PROMPT = ("--prompt-tokens=1,2,3", "--max-new-tokens=4", "--seed=1")


def test_k17_computes_as_transformers(hf: Path) -> None:
    """K17: a GPT-2 folder is read with its turned Conv1D weights and tied embeddings: the logits
    are those of transformers."""
    import transformers

    twin = transformers.AutoModelForCausalLM.from_pretrained(hf).eval()
    ours = load_model(str(hf), torch.device("cpu")).model
    tokens = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), twin(tokens).logits, rtol=0.0, atol=1e-5)


def remove_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors")


def turn_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    weights[name] = weights[name].T.contiguous()
    save_file(weights, folder / "model.safetensors")


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


HURTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors"),
    "a tensor is missing": (remove_tensor, "h.1.mlp.c_fc.weight"),
    "a tensor is not turned": (turn_tensor, "h.1.mlp.c_fc.weight"),
    "another architecture": (lambda f: set_config(f, model_type="bert"), "bert"),
    "more layers": (lambda f: set_config(f, n_layer=3), "3 layers, but the weights have 2"),
    "other attention": (lambda f: set_config(f, scale_attn_weights=False), "scale_attn_weights"),
}


@pytest.mark.parametrize("what", HURTS)
def test_k17_what_is_wrong_is_named(what: str, gpt: Gpt, hf: Path) -> None:
    """K17: an incomplete folder, another architecture, tensors that are missing or turned are exit
    4 with the file, the key or the tensor as it is called there."""
    code, _, err = gpt("generate", "--model=./hf", *PROMPT)
    assert code == 0, err
    hurt, named = HURTS[what]
    hurt(hf)
    code, out, err = gpt("generate", "--model=./hf", *PROMPT)
    assert (code, out) == (4, "")
    assert named in errors(err)[0], err


@pytest.mark.usefixtures("no_training")
def test_k19_checkpoints_of_another_run(gpt: Gpt, run: Path, folder: Path) -> None:
    """K19: a run whose `checkpoints` is a link would delete another run's as its own: exit 6 to
    resume and to verify, left alone by `gpt runs prune`; nothing of the other is touched.
    Without the link, as the hint says, there is nothing to resume."""
    shutil.copytree(run, folder / "other")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to("../other/checkpoints")
    kept = steps(folder / "other")
    code, _, err = gpt("runs", "prune", "r", "--yes")
    assert (code, "left alone: r/checkpoints is a symbolic link" in warnings(err)) == (0, True)
    for command in (
        RESUME,
        ("pretrain", "tiny.yaml", "--run-dir=r", "--auto-resume"),
        ("runs", "verify", "r"),
    ):
        code, _, err = gpt(*command)
        assert code == 6, err
        (line,) = errors(err)
        assert "checkpoints is a symbolic link to " in line
        assert steps(folder / "other") == kept
    with pytest.raises(ResourceError):
        checkpoint.prune(run, 1, ())
    assert steps(folder / "other") == kept
    assert "rm r/checkpoints" in hints(err)
    (run / "checkpoints").unlink()
    assert gpt(*RESUME)[0] == 4
