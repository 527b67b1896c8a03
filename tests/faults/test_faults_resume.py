"""Resumes, and where they could go wrong: rows K6, K11, K12, K13 and K15 of the fault matrix.

A run that was stopped or killed must end with the bits of one that was not: weights, optimizer,
state, logs without times.
"""

import json
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from interrupting import (
    STEPS,
    interrupted,
    json_rows,
    killed,
    killing,
    many_pieces,
    one_file,
    outcome,
    tiny,
    with_cuts,
)
from outcome import warnings
from safetensors.torch import load_file
from small import PROSE, working_in

from gptcli import stop
from gptcli.cli.main import main
from gptcli.config.schema import Config
from gptcli.data import stream
from gptcli.data.rows import Prefetch
from gptcli.pretrain import pretrain
from gptcli.runs import checkpoint
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json
from gptcli.training.choices import Choices

Gpt = Callable[..., tuple[int, str, str]]
Straight = Callable[[str], tuple[Config, dict[str, Any]]]

RESUME = ("pretrain", "tiny.yaml", "--run-dir=r", "--resume")
SAVED = 2


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in the middle; to be copied."""
    with working_in(tmp_path_factory.mktemp("stopped")) as place, interrupted(SAVED):
        assert main(["pretrain", "tiny.yaml", "--run-dir=r", "--quiet"]) == 143
    return place / "r"


@pytest.fixture
def run(stopped: Path, folder: Path) -> Path:
    """A copy of that run, as `r` in the user's folder."""
    shutil.copytree(stopped, folder / "r")
    return folder / "r"


@pytest.fixture
def pieces() -> Iterator[None]:
    with many_pieces():
        yield


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.list_checkpoints(run_dir)[-1] / "model.safetensors")


RATES = {"muon": ("lr", "adamw_lr", "embedding_lr"), "adamw": ("lr",)}


@pytest.mark.parametrize("kind", RATES)
def test_k06_the_rate_is_that_of_the_config(kind: str, gpt: Gpt, folder: Path) -> None:
    """K6: the rate of every step comes from the config, never from the saved optimizer: with next
    to none, the weights stay where they were. Old and new rate are told."""
    optimizer = f"--set=optimizer.kind={kind}"
    with interrupted(SAVED):
        assert gpt("pretrain", "tiny.yaml", "--run-dir=r", optimizer)[0] == 143
    before = weights(folder / "r")
    next_to_none = [f"--set=optimizer.{rate}=1e-30" for rate in RATES[kind]]
    code, _, err = gpt(*RESUME, optimizer, *next_to_none)
    assert code == 0, err
    for name, tensor in weights(folder / "r").items():
        torch.testing.assert_close(tensor, before[name], rtol=0.0, atol=1e-25, msg=name)
    was = {"muon": 0.02, "adamw": 0.015}[kind]
    assert f"changed since the run began: optimizer.lr: {was} -> 1e-30" in warnings(err)
    assert f"the learning rate at step {SAVED} was {was} and is now 1e-30" in warnings(err)


def other_threads(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)


MACHINES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "threads": (other_threads, "threads 1 -> 2"),
    "torch": (
        lambda patch: patch.setattr(torch, "__version__", "9.9.9"),
        f"torch {torch.__version__} -> 9.9.9",
    ),
    "processor": (
        lambda patch: patch.setattr("gptcli.device._processor", lambda: "another processor"),
        " -> another processor with ",
    ),
    "instructions": (
        lambda patch: patch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "VSX"),
        " with VSX",
    ),
}


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("what", MACHINES)
def test_k11_another_machine(what: str, gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """K11: on other threads, another torch or another processor the run goes on, and one warning
    withdraws the promise of equal bits and names the reason. Asked again, nothing is new."""
    change, reason = MACHINES[what]
    change(monkeypatch)
    with interrupted(1):
        code, _, err = gpt(*RESUME)
    assert code == 143, err
    (line,) = warnings(err).splitlines()
    assert line.startswith("not bit-exact with the run so far: ")
    assert reason in line
    code, _, err = gpt(*RESUME)
    assert code == 0, err
    assert warnings(err) == ""


def test_k11_another_device(gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K11: a run of a GPU goes on on a processor, with a warning that names both."""
    with interrupted(SAVED), monkeypatch.context() as patch:
        patch.setattr(Choices, "to_json", lambda self: {**asdict(self), "device": "cuda:0"})
        assert gpt("pretrain", "tiny.yaml", "--run-dir=r")[0] == 143
    code, _, err = gpt(*RESUME)
    assert code == 0, err
    assert warnings(err) == "not bit-exact with the run so far: device cuda:0 -> cpu"
    assert read_run_json(folder / "r")["choices"]["device"] == "cpu"


@pytest.mark.usefixtures("run")
def test_k11_the_same_machine(gpt: Gpt) -> None:
    """K11: on the machine that the run began on nothing is withdrawn."""
    code, _, err = gpt(*RESUME)
    assert code == 0, err
    assert warnings(err) == ""


CORPORA: dict[str, Callable[[Path], Config]] = {
    "one file, muon": lambda folder: tiny(one_file(folder)),
    "rows, adamw": lambda folder: tiny(
        json_rows(folder),
        optimizer={"kind": "adamw", "lr": 0.003},
        schedule__kind="cosine",
        training__micro_batch_size=1,
    ),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Name in CORPORA -> its config, and the outcome of that run without interruption."""
    made: dict[str, tuple[Config, dict[str, Any]]] = {}

    def run(name: str) -> tuple[Config, dict[str, Any]]:
        if name not in made:
            folder = tmp_path_factory.mktemp("straight")
            config = CORPORA[name](folder)
            assert pretrain(config, run_dir=folder / "run").status == "finished"
            made[name] = config, outcome(folder / "run")
            assert made[name][1]["state"]["epochs"] > 2.1  # two epoch borders lie inside
        return made[name]

    return run


# The epochs of one file end inside updates 7 and 14; 0, 5, 10, 15 and 17 are evaluated.
CUTS = ["0", "0e", "0a", "1", "4", "5e", "5a", "6", "7", "8", "14", "17", "17e"]
CUTS += ["4 1 1", "5e 0e 5", "1 5 0"]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("cuts", CUTS)
def test_k12_awkward_places(cuts: str, tmp_path: Path, straight: Straight) -> None:
    """K12: stopped before the first step, at step 1, inside an epoch's last step, in or just after
    an evaluation, at the last step, once to three times: the run ends with the same bytes."""
    config, expected = straight("one file, muon")
    assert with_cuts(config, tmp_path / "run", cuts.split()).status == "finished"
    assert outcome(tmp_path / "run") == expected


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("cuts", ["0", "3", "3m", "7", "8", "5e 9", "1m 1m 7m"])
def test_k12_between_micro_batches(cuts: str, tmp_path: Path, straight: Straight) -> None:
    """K12: a stop between two micro batches waits for the whole step; inside rows of JSON and
    between the pieces of long documents too, the run ends with the same bytes."""
    config, expected = straight("rows, adamw")
    assert with_cuts(config, tmp_path / "run", cuts.split()).status == "finished"
    assert outcome(tmp_path / "run") == expected


@pytest.mark.usefixtures("pieces")
def test_k12_kills(tmp_path: Path, straight: Straight) -> None:
    """K12: killed twice between two saves, the run ends with the same bytes."""
    (config, expected), run_dir = straight("one file, muon"), tmp_path / "run"
    killed(config, run_dir, 7, resume=False)
    assert read_run_json(run_dir)["status"] == "running"
    killed(config, run_dir, 3, resume=True)
    assert pretrain(config, run_dir=run_dir, resume="resume").status == "finished"
    assert outcome(run_dir) == expected
    history = [entry["event"] for entry in read_run_json(run_dir)["history"]]
    assert history == ["start", "resume", "resume", "finished"]  # the killed leave none


@pytest.mark.usefixtures("pieces")
def test_k12_a_kill_before_best_is_written(tmp_path: Path, straight: Straight) -> None:
    """K12: killed between a save and best.json, which names the best checkpoint, the resume names
    it."""
    (config, expected), run_dir = straight("one file, muon"), tmp_path / "run"
    with interrupted(11):
        pretrain(config, run_dir=run_dir)
    checkpoint.write_best(run_dir, 0, 9.0)
    with interrupted(0):
        pretrain(config, run_dir=run_dir, resume="resume")
    best = checkpoint.read_best(run_dir)
    assert best is not None
    assert best[0] == 10
    pretrain(config, run_dir=run_dir, resume="resume")
    assert outcome(run_dir) == expected


@pytest.mark.usefixtures("pieces")
def test_k12_a_kill_behind_an_evaluation(tmp_path: Path) -> None:
    """K12: an evaluation that the checkpoint does not know is done again, and logged once."""
    still = {"kind": "adamw", "lr": 1e-30}  # no evaluation is an improvement that would be saved
    config, run_dir = tiny(one_file(tmp_path), optimizer=still), tmp_path / "run"
    with interrupted(5, "evaluation"):
        pretrain(config, run_dir=run_dir)
    killed(config, run_dir, 1, resume=True)
    pretrain(config, run_dir=run_dir, resume="resume")
    pretrain(config, run_dir=tmp_path / "straight")
    assert outcome(run_dir) == outcome(tmp_path / "straight")


@pytest.mark.usefixtures("pieces")
def test_k12_a_stop_that_the_reader_sees_first(
    tmp_path: Path, straight: Straight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K12: a stop while the run waits for text saves too, and the run ends with the same bytes."""
    (config, expected), run_dir = straight("one file, muon"), tmp_path / "run"
    read, main_thread, windows = stream.RecordStream._read_window, threading.main_thread(), 0

    def read_and_stop(self: stream.RecordStream) -> None:
        nonlocal windows
        assert threading.current_thread() is not main_thread
        windows += 1
        if windows == 4:
            time.sleep(0.5)  # the loop has used up what was prefetched and waits
            stop.request(signal.SIGINT)
        read(self)

    with monkeypatch.context() as patch:
        patch.setattr(stream.RecordStream, "_read_window", read_and_stop)
        patch.setattr(Prefetch, "_DEPTH", 1)
        result = pretrain(config, run_dir=run_dir)
    assert (result.status, result.signal) == ("stopped", signal.SIGINT)
    assert 0 < result.step < STEPS
    assert checkpoint.list_checkpoints(run_dir)[-1].name == f"step-{result.step:08d}"
    stop.reset()
    pretrain(config, run_dir=run_dir, resume="resume")
    assert outcome(run_dir) == expected


LONGER = ("training.max_steps=60", "training.save_every=7", "training.eval_every=20")
MORE = tuple(f"--set={key}" for key in (*LONGER, "model.dropout=0.1", "samples.n=2"))


@pytest.mark.slow
def test_k12_a_hundred_kills(folder: Path) -> None:
    """K12: SIGKILL a hundred times at random moments, over as many runs as that takes: each ends
    with the same bytes, and is finished by the one command line that began it."""
    train = ["pretrain", "tiny.yaml", "--auto-resume", "--quiet", *MORE]
    began = time.monotonic()
    assert Forked([*train, "--run-dir=straight"]).wait() == (0, "")
    seconds, expected = time.monotonic() - began, outcome(folder / "straight")
    chosen, kills, runs = random.Random(0), 0, 0
    while kills < 100:
        runs += 1
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            child = Forked([*train, f"--run-dir=run-{runs}"])
            time.sleep(chosen.uniform(0.0, 0.6 * seconds))
            child.send(signal.SIGKILL)
            code, err = child.wait()
            kills += code == -signal.SIGKILL
        assert code == 0, err
        assert outcome(folder / f"run-{runs}") == expected


def test_k13_lines_behind_the_checkpoint(gpt: Gpt, folder: Path) -> None:
    """K13: what a killed run logged after its last save goes to metrics.jsonl.bak and is logged
    again by the resume: no step is there twice, none is missing."""
    flags = ("--set=training.max_steps=6", "--set=training.save_every=2")
    child = Forked(["pretrain", "tiny.yaml", "--run-dir=r", *flags], before=killing(6))
    assert child.wait()[0] == -signal.SIGKILL
    log = folder / "r" / "metrics.jsonl"
    ahead = log.read_text().splitlines()
    assert json.loads(ahead[-1])["step"] == 5
    with log.open("a") as file:
        file.write('{"event": "train", "step": 6, "lo')  # as a crash of the machine cuts a line
    code, _, err = gpt(*RESUME, *flags)
    assert code == 0, err
    steps = [r["step"] for r in read_metrics(folder / "r") if r["event"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert log.with_name("metrics.jsonl.bak").read_text().splitlines()[0] == ahead[-1]


def test_k15_a_moved_run(gpt: Gpt, run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """K15: a run directory holds no path to itself: copied to another folder, beside a copy of its
    text, it goes on and generates there, and ends as it would have ended here."""
    there = tmp_path_factory.mktemp("there")
    for path in run.rglob("*"):
        assert not path.is_file() or str(run.parent).encode() not in path.read_bytes(), path
    shutil.copytree(run, there / "runs" / "mine")
    (there / "text.txt").write_text(PROSE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(there)
        moved = "runs/mine/config.yaml", "--run-dir=runs/mine", "--resume"
        code, _, err = gpt("pretrain", *moved)
        assert code == 0, err
        assert warnings(err) == ""
        text = ("--model=runs/mine", "--prompt=On", "--max-new-tokens=4", "--seed=1")
        assert gpt("generate", *text)[0] == 0
    assert gpt(*RESUME)[0] == 0
    assert outcome(there / "runs" / "mine") == outcome(run)


def test_k15_a_checkpoint_alone(gpt: Gpt, run: Path, folder: Path) -> None:
    """K15: a checkpoint directory stands alone: without its run it generates the same text."""
    text = ("--prompt=On", "--max-new-tokens=8", "--seed=1")
    expected = gpt("generate", f"--model={run}", *text)
    assert expected[0] == 0, expected[2]
    best = checkpoint.read_best(run)
    assert best is not None
    shutil.move(checkpoint.checkpoint_dir(run, best[0]), folder / "alone")
    shutil.rmtree(run)
    assert gpt("generate", "--model=./alone", *text)[:2] == expected[:2]
