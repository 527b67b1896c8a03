"""Pretraining from end to end: exact resumes, limits, non-finite steps, refusals."""

import hashlib
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.data import corpus, packing, readers, scan, shards, stream
from gptcli.data.rows import Prefetch
from gptcli.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from gptcli.model.gpt import GPT
from gptcli.pretrain import describe, pretrain
from gptcli.runs import checkpoint
from gptcli.runs.load import load_model
from gptcli.runs.metrics import read_metrics, read_samples
from gptcli.runs.run_dir import read_run_json
from gptcli.training.build import RunResult
from gptcli.training.events import StepEvent

Straight = Callable[[str], tuple[Config, dict[str, Any]]]

STEPS = 17
TIMES = ("seconds", "tokens_per_second", "training_seconds", "memory_bytes")


@pytest.fixture(autouse=True, scope="module")
def _many_pieces() -> Iterator[None]:
    """A corpus of a few hundred bytes has several pieces, shards and groups, so a resume meets all
    their borders. The report is left out of runs that nobody looks at: its plots take a second."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (shards, readers, scan, corpus):
            patch.setattr(module, "PIECE_BYTES", 100)
        patch.setattr(corpus, "SHARD_PIECES", 2)
        patch.setattr(corpus, "SHARD_BYTES", 200)
        patch.setattr(packing, "GROUP_TOKENS", 128)
        patch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)
        yield


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """The library's log so far, as one text."""
    caplog.set_level(logging.INFO, logger="gptcli")
    return lambda: "\n".join(caplog.messages)


def prose(size: int, seed: int = 0) -> str:
    """Lines of made-up words."""
    rng = random.Random(seed)
    words = rng.choices(["sun", "moon", "tree", "é", "sing", "a", "of", "river"], k=size)
    lines = [" ".join(words[i : i + 7]) for i in range(0, size, 7)]
    return ("\n".join(lines) + "\n")[:size]


def one_file(folder: Path) -> Path:
    """A corpus in a single text file, a little less than seven steps long."""
    path = folder / "book.txt"
    path.write_text(prose(480))
    return path


def json_rows(folder: Path) -> Path:
    """A corpus of documents of many lengths, some longer than a piece."""
    path = folder / "rows.jsonl"
    texts = [prose(10 + 40 * (i % 5), seed=i) for i in range(6)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tiny(source: Path, **changes: Any) -> Config:
    """A tiny run over `source`; keys like training__max_steps change it."""
    values: dict[str, dict[str, Any]] = {
        "tokenizer": {"kind": "bytes"},
        "data": {"train": str(source), "val_fraction": 0.1, "shuffle_window": 2},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.2},
        "schedule": {"warmup_steps": 2},
        "training": {
            "max_steps": STEPS,
            "tokens_per_step": 64,
            "log_every": 3,
            "eval_every": 5,
            "save_every": 4,
            "precision": "fp32",
        },
        "samples": {"prompts": ["the sun"], "n": 2, "max_new_tokens": 4},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return Config.model_validate({"name": "tiny", **values})


@contextmanager
def interrupted(updates: int, *, evaluating: bool = False) -> Iterator[None]:
    """Ask for a stop during update number `updates` of this run (0: before the first), or in the
    evaluation that follows it."""
    done = 0

    def request_before() -> None:
        if updates == 0 and not evaluating:
            stop.request(signal.SIGTERM)

    def after_update(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == updates and not evaluating:
            stop.request(signal.SIGTERM)

    def before_forward(module: torch.nn.Module, _: Any) -> None:
        if evaluating and done == updates and isinstance(module, GPT) and not module.training:
            stop.request(signal.SIGTERM)

    class Begins(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "writing to" in record.getMessage():
                request_before()

    handler = Begins()
    logger = logging.getLogger("gptcli")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    hooks = [
        register_optimizer_step_post_hook(after_update),
        register_module_forward_pre_hook(before_forward),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        logger.removeHandler(handler)
        logger.setLevel(level)
        stop.reset()


def outcome(run_dir: Path) -> dict[str, Any]:
    """All of a run that must not depend on where it was interrupted."""
    last = checkpoint.list_checkpoints(run_dir)[-1]
    state = checkpoint.read_state(last)["train"]
    metrics = [
        {k: v for k, v in record.items() if k not in TIMES and not k.endswith("_seconds")}
        for record in read_metrics(run_dir)
    ]
    return {
        "files": {
            name: hashlib.sha256((last / name).read_bytes()).hexdigest()
            for name in ("model.safetensors", "optimizer.safetensors")
        },
        "state": {k: v for k, v in state.items() if not k.endswith("seconds") and k != "interval"},
        "metrics": metrics,
        "samples": read_samples(run_dir),
        "best": checkpoint.read_best(run_dir),
        "status": read_run_json(run_dir)["status"],
    }


CORPORA: dict[str, Callable[[Path], Config]] = {
    "one file, muon": lambda folder: tiny(one_file(folder)),
    "rows, adamw": lambda folder: tiny(
        json_rows(folder), optimizer={"kind": "adamw", "lr": 0.003}, schedule__kind="cosine"
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


def with_cuts(config: Config, run_dir: Path, cuts: list[str]) -> RunResult:
    """The run, stopped at each of `cuts` ("3": in its third update; "3e": in the evaluation behind
    it) and resumed."""
    for number, cut in enumerate(cuts):
        with interrupted(int(cut.rstrip("e")), evaluating=cut.endswith("e")):
            result = pretrain(config, run_dir=run_dir, resume="resume" if number else "no")
        assert (result.status, result.signal) == ("stopped", signal.SIGTERM)
    return pretrain(config, run_dir=run_dir, resume="resume")


# The epochs of one file end inside updates 7 and 14; 0, 5, 10, 15 and 17 are evaluated.
CUTS = ["0", "0e", "1", "4", "5e", "6", "7", "8", "14", "17", "17e", "4 1 1", "5e 0e 5", "1 5 0"]


@pytest.mark.parametrize("cuts", CUTS)
def test_resume_of_one_file(cuts: str, tmp_path: Path, straight: Straight) -> None:
    """Bug: a resume that loses or repeats data, moments, dropout masks or log lines somewhere."""
    config, expected = straight("one file, muon")
    assert with_cuts(config, tmp_path / "run", cuts.split()).status == "finished"
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize("cuts", ["0", "3", "7", "8", "5e 9"])
def test_resume_of_rows(cuts: str, tmp_path: Path, straight: Straight) -> None:
    """Bug: the cursor inside JSON lines, or between documents and their pieces, is off by one."""
    config, expected = straight("rows, adamw")
    assert with_cuts(config, tmp_path / "run", cuts.split()).status == "finished"
    assert outcome(tmp_path / "run") == expected


def killed(config: Config, run_dir: Path, updates: int, *, resume: bool) -> None:
    """Run in a child process that SIGKILL ends in update number `updates`."""
    child = os.fork()
    if child == 0:
        done = 0

        def kill(*_: Any) -> None:
            nonlocal done
            done += 1
            if done == updates:
                os.kill(os.getpid(), signal.SIGKILL)

        register_optimizer_step_post_hook(kill)
        try:
            pretrain(config, run_dir=run_dir, resume="resume" if resume else "no")
        finally:
            os._exit(1)  # not reached: the kill comes first
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_resume_after_kill(tmp_path: Path, straight: Straight) -> None:
    """Bug: what SIGKILL leaves behind (logs ahead of the checkpoint) is in the result twice."""
    (config, expected), run_dir = straight("one file, muon"), tmp_path / "run"
    killed(config, run_dir, 7, resume=False)
    assert read_run_json(run_dir)["status"] == "running"
    killed(config, run_dir, 3, resume=True)
    assert pretrain(config, run_dir=run_dir, resume="resume").status == "finished"
    assert outcome(run_dir) == expected
    assert (run_dir / "metrics.jsonl.bak").exists()  # step 6 was logged, step 4 was saved
    history = [entry["event"] for entry in read_run_json(run_dir)["history"]]
    assert history == ["start", "resume", "resume", "finished"]  # the killed leave none


def test_kill_between_checkpoint_and_best(tmp_path: Path, straight: Straight) -> None:
    """Bug: best.json stays behind for good when the kill came just before it was written."""
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


def test_kill_after_a_late_evaluation(tmp_path: Path) -> None:
    """Bug: an evaluation that the checkpoint does not know, done again, is logged twice."""
    still = {"kind": "adamw", "lr": 1e-30}  # no evaluation is an improvement that would be saved
    config, run_dir = tiny(one_file(tmp_path), optimizer=still), tmp_path / "run"
    with interrupted(5, evaluating=True):
        pretrain(config, run_dir=run_dir)
    killed(config, run_dir, 1, resume=True)
    pretrain(config, run_dir=run_dir, resume="resume")
    pretrain(config, run_dir=tmp_path / "straight")
    assert outcome(run_dir) == outcome(tmp_path / "straight")


def test_stop_that_the_reader_sees_first(
    tmp_path: Path, straight: Straight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the reading thread raises Stopped and the run ends without saving."""
    (config, expected), run_dir = straight("one file, muon"), tmp_path / "run"
    read, main, windows = stream.RecordStream._read_window, threading.main_thread(), 0

    def read_and_stop(self: stream.RecordStream) -> None:
        nonlocal windows
        assert threading.current_thread() is not main
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


def test_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], str]
) -> None:
    """Bug: a finished run lacks its report or last scores, or is trained on by a resume."""
    from gptcli.reports.report import write_report

    monkeypatch.setattr("gptcli.pretrain.write_report", write_report)
    config, run_dir = tiny(one_file(tmp_path)), tmp_path / "run"
    result = pretrain(config, run_dir=run_dir)
    assert result.scores is not None
    report = json.loads((run_dir / "report.json").read_text())
    assert report["scores"]["loss"] == result.scores.loss
    assert report["status"] == "finished"
    assert report["training"]["steps"] == STEPS
    evals = [r["step"] for r in read_metrics(run_dir) if r["event"] == "eval"]
    assert evals == [0, 5, 10, 15, 17]
    assert {r["step"] for r in read_samples(run_dir)} == set(evals)
    trains = [r["step"] for r in read_metrics(run_dir) if r["event"] == "train"]
    assert trains == [3, 6, 9, 12, 15, 17]
    again = pretrain(config, run_dir=run_dir, resume="resume")
    assert (again.status, again.step, again.report) == ("finished", STEPS, result.report)
    assert "nothing to do" in warnings()


def test_larger_limit_after_the_decay(tmp_path: Path, warnings: Callable[[], str]) -> None:
    """Bug: a longer run starts from weights whose decay is over, or says nothing about it."""
    book, run_dir = one_file(tmp_path), tmp_path / "run"
    pretrain(tiny(book, training__max_steps=8), run_dir=run_dir)
    longer = tiny(book, training__max_steps=20)
    result = pretrain(longer, run_dir=run_dir, resume="resume")
    assert "going on from step 4, before the decay, instead of step 8" in warnings()
    assert (result.status, result.step) == ("finished", 20)
    pretrain(longer, run_dir=tmp_path / "straight")
    assert outcome(run_dir)["files"] == outcome(tmp_path / "straight")["files"]
    steps = [r["step"] for r in read_metrics(run_dir) if r["event"] == "train"]
    assert steps == [3, 6, 9, 12, 15, 18, 20]


def test_changed_rate_is_shown(tmp_path: Path, warnings: Callable[[], str]) -> None:
    """Bug: a resume with another learning rate or limit jumps without a word."""
    book, run_dir = one_file(tmp_path), tmp_path / "run"
    with interrupted(4):
        pretrain(tiny(book, schedule__kind="linear"), run_dir=run_dir)
    faster = tiny(book, schedule__kind="linear", optimizer={"lr": 0.04})
    with interrupted(1):
        pretrain(faster, run_dir=run_dir, resume="resume")
    assert "changed since the run began: optimizer.lr: 0.02 -> 0.04" in warnings()
    assert "the learning rate at step 4 was 0.0153 and is now 0.0306" in warnings()


def test_changed_model_is_refused(tmp_path: Path) -> None:
    """Bug: weights of one shape are forced into another, or the reader must guess which key."""
    book, run_dir = one_file(tmp_path), tmp_path / "run"
    with interrupted(1):
        pretrain(tiny(book), run_dir=run_dir)
    other = tiny(book, model__n_head=1, data__val_fraction=0.2, training__max_steps=30)
    with pytest.raises(CheckpointError) as caught:
        pretrain(other, run_dir=run_dir, resume="resume")
    assert caught.value.exit_code == 4
    assert "model.n_head: 2 -> 1" in caught.value.message
    assert "data.val_fraction: 0.1 -> 0.2" in caught.value.message
    assert "max_steps" not in caught.value.message
    assert read_run_json(run_dir)["status"] == "stopped"  # still to be resumed
    assert pretrain(tiny(book), run_dir=run_dir, resume="resume").status == "finished"


def test_changed_data_is_refused(tmp_path: Path, warnings: Callable[[], str]) -> None:
    """Bug: a saved cursor is used in other text than it was made for."""
    book, run_dir = one_file(tmp_path), tmp_path / "run"
    with interrupted(2):
        pretrain(tiny(book), run_dir=run_dir)
    book.write_text(book.read_text() + "one more line\n")
    with pytest.raises(CheckpointError, match=r"book\.txt \(changed\)") as caught:
        pretrain(tiny(book), run_dir=run_dir, resume="resume")
    assert caught.value.hint is not None
    assert "--allow-data-change" in caught.value.hint
    result = pretrain(tiny(book), run_dir=run_dir, resume="resume", allow_data_change=True)
    assert result.status == "finished"
    assert "going on as told" in warnings()


def test_nothing_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: --resume quietly starts afresh, or --auto-resume does not."""
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "runs"))
    config = tiny(one_file(tmp_path), training__max_steps=2)
    for run_dir in (None, tmp_path / "run"):
        with pytest.raises(CheckpointError, match="nothing to resume") as caught:
            pretrain(config, run_dir=run_dir, resume="resume")
        assert caught.value.exit_code == 4
        assert not (tmp_path / "run").exists()
    assert pretrain(config, run_dir=tmp_path / "run", resume="auto").step == 2
    fresh = pretrain(config, resume="auto")
    assert fresh.run_dir.parent == tmp_path / "runs"
    with interrupted(1):
        stopped = pretrain(config)
    assert stopped.run_dir != fresh.run_dir
    assert pretrain(config, resume="resume").run_dir == stopped.run_dir


@contextmanager
def poisoned(forwards: set[int], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """`change` what enters the blocks in the training passes whose numbers are given (from 1)."""
    seen = 0

    def hook(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal seen
        if not isinstance(module, torch.nn.Embedding) or not module.training:
            return None
        seen += 1
        return change(output) if seen in forwards else None

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def nan_loss(x: torch.Tensor) -> torch.Tensor:
    return x * float("nan")


def infinite_gradient(x: torch.Tensor) -> torch.Tensor:
    """The loss stays finite; one gradient does not."""
    x.register_hook(lambda grad: grad * float("inf"))
    return x


@pytest.mark.parametrize("poison", [nan_loss, infinite_gradient])
def test_bad_step_changes_nothing(
    poison: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    """Bug: one infinite gradient, clipped, makes every weight NaN."""
    book = one_file(tmp_path)
    same = {"schedule__kind": "constant"}
    pretrain(tiny(book, training__max_steps=6, **same), run_dir=tmp_path / "good")
    with poisoned({7}, poison):
        pretrain(tiny(book, training__max_steps=7, **same), run_dir=tmp_path / "bad")
    good, bad = outcome(tmp_path / "good"), outcome(tmp_path / "bad")
    assert good["files"] == bad["files"]
    assert bad["state"]["skipped_steps"] == 1
    (line,) = [r for r in bad["metrics"] if r["event"] == "bad_step"]
    assert line["step"] == 7


def test_three_bad_steps_end_the_run(tmp_path: Path) -> None:
    """Bug: a run that diverged goes on, or its last good checkpoint is pruned or replaced."""
    config, run_dir = tiny(one_file(tmp_path), training__save_every=1), tmp_path / "run"
    with poisoned({3, 7, 8, 9}, nan_loss), pytest.raises(NonFiniteError) as caught:
        pretrain(config, run_dir=run_dir)
    assert caught.value.exit_code == 5
    assert "3 non-finite steps in a row, the last at step 9" in caught.value.message
    paths = checkpoint.list_checkpoints(run_dir)
    assert paths[-1].name == "step-00000006"
    for path in paths:
        checkpoint.verify(path)
    assert read_run_json(run_dir)["status"] == "failed"
    bad = [(r["step"], r["loss"]) for r in read_metrics(run_dir) if r["event"] == "bad_step"]
    assert bad == [(3, None), (7, None), (8, None), (9, None)]
    assert pretrain(config, run_dir=run_dir, resume="resume").status == "finished"


@pytest.mark.parametrize(
    ("limit", "steps"),
    [({"max_tokens": 640}, 10), ({"max_epochs": 2.0}, 14)],  # max_time: training/test_wall_clock
)
def test_limits(limit: dict[str, Any], steps: int, tmp_path: Path) -> None:
    """Bug: a run that is not limited by steps ends without decay, evaluation or checkpoint."""
    config = tiny(one_file(tmp_path), training={"tokens_per_step": 64, "log_every": 1, **limit})
    result = pretrain(config, run_dir=tmp_path / "run")
    assert result.status == "finished"
    records = read_metrics(tmp_path / "run")
    train, evaluation = records[-2:]
    assert (train["event"], evaluation["event"]) == ("train", "eval")
    assert train["step"] == evaluation["step"] == result.step
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1].name == f"step-{result.step:08d}"
    assert result.step == steps
    assert train["lr"] < 0.25 * config.optimizer.lr
    assert max(r["lr"] for r in records if r["event"] == "train") == config.optimizer.lr


def test_no_limit(tmp_path: Path) -> None:
    """Bug: a run without a limit trains for ever."""
    config = tiny(one_file(tmp_path), training={"tokens_per_step": 64})
    with pytest.raises(ConfigError, match="no limit"):
        pretrain(config, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_micro_batches(tmp_path: Path) -> None:
    """Bug: the mean over micro batches is a mean of means, or depends on their number."""
    weights = []
    for size in (1, 4):
        config = tiny(
            one_file(tmp_path),
            model__dropout=0.0,
            optimizer={"kind": "adamw", "lr": 0.003, "eps": 1e-6},
            training__max_steps=6,
            training__micro_batch_size=size,
        )
        run_dir = tmp_path / f"run-{size}"
        pretrain(config, run_dir=run_dir)
        weights.append(load_model(str(run_dir), torch.device("cpu")).model.state_dict())
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], atol=1e-5, rtol=0.0, msg=name)


def test_text_shorter_than_a_block(tmp_path: Path) -> None:
    """Bug: a corpus too small for one row loops for ever or fails deep inside."""
    path = tmp_path / "short.txt"
    path.write_text("twelve bytes")
    for call in (
        lambda: pretrain(tiny(path), run_dir=tmp_path / "run"),
        lambda: describe(tiny(path)),
    ):
        with pytest.raises(DataError, match="has 11 tokens, less than one block of 16") as caught:
            call()
        assert caught.value.hint is not None
        assert "set model.block_size below 11" in caught.value.hint
    assert read_run_json(tmp_path / "run")["status"] == "failed"


def test_describe(tmp_path: Path) -> None:
    """Bug: --dry-run counts other data than the run would use, or leaves files behind."""
    text = describe(tiny(one_file(tmp_path)))
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line[0] in "vl")
    assert lines["vocabulary"] == "257 tokens (bytes)"
    assert "1 documents" in lines["validation"]
    assert "(tail split)" in lines["validation"]
    assert lines["limits"] == "max_steps 17"
    assert [p.name for p in tmp_path.iterdir()] == ["book.txt"]


def test_init(tmp_path: Path) -> None:
    """Bug: a run that starts from a model starts from noise, or cannot be resumed without it."""
    book, first = one_file(tmp_path), tmp_path / "first"
    source = pretrain(tiny(book, model__n_layer=2), run_dir=first)
    assert source.scores is not None
    config = tiny(book, init=str(first), model={"dropout": 0.1}, training__max_steps=6)
    with interrupted(3):
        pretrain(config, run_dir=tmp_path / "second")
    start = read_metrics(tmp_path / "second")[0]
    best = checkpoint.read_best(first)
    assert best is not None
    assert (start["step"], start["loss"]) == (0, pytest.approx(best[1], abs=1e-6))
    first.rename(tmp_path / "elsewhere")
    assert pretrain(config, run_dir=tmp_path / "second", resume="resume").status == "finished"
    model = load_model(str(tmp_path / "second"), torch.device("cpu")).model
    assert (model.config.n_layer, model.config.dropout) == (2, 0.1)
    unfit = {"max_steps": 2, "tokens_per_step": 24}
    config = tiny(book, init=str(tmp_path / "elsewhere"), model={}, training=unfit)
    with pytest.raises(ConfigError, match=r"24 is not a multiple of model\.block_size 16"):
        pretrain(config, run_dir=tmp_path / "third")


def test_steps_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: the display gets no events, or other numbers than the metrics file."""
    caplog.set_level(logging.INFO, logger="gptcli")
    pretrain(tiny(one_file(tmp_path)), run_dir=tmp_path / "run")
    events = [getattr(record, "event", None) for record in caplog.records]
    told = [(e.step, e.loss, e.lr) for e in events if isinstance(e, StepEvent)]
    written = [
        (r["step"], r["loss"], r["lr"])
        for r in read_metrics(tmp_path / "run")
        if r["event"] == "train"
    ]
    assert told == written
    assert f"step {STEPS}/{STEPS}" in (tmp_path / "run" / "log.txt").read_text()


def test_killed_after_its_last_checkpoint(tmp_path: Path) -> None:
    """Bug: a run killed between its last checkpoint and run.json ended without any scores, and a
    finished run whose report was lost never got one again."""
    config = tiny(one_file(tmp_path))
    straight = pretrain(config, run_dir=tmp_path / "run")
    about = read_run_json(tmp_path / "run")
    del about["scores"]
    (tmp_path / "run" / "run.json").write_text(json.dumps({**about, "status": "running"}))
    resumed = pretrain(config, run_dir=tmp_path / "run", resume="resume")
    assert resumed.scores == straight.scores is not None
    assert read_run_json(tmp_path / "run")["status"] == "finished"
    assert read_run_json(tmp_path / "run")["scores"]["loss"] == straight.scores.loss

    again = pretrain(config, run_dir=tmp_path / "run", resume="resume")  # nothing to do
    assert again.scores == straight.scores
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_file_that_goes_away_loses_no_step(tmp_path: Path) -> None:
    """Bug: a source deleted under a run threw away what was trained since the last checkpoint."""
    source = one_file(tmp_path)
    config = tiny(
        source,
        data__shuffle_window=0,
        data__cache="off",
        training__max_steps=200,
        training__save_every=1000,
        training__eval_every=1000,
    )

    class Deletes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(getattr(record, "event", None), StepEvent):
                source.unlink(missing_ok=True)

    handler, logger = Deletes(), logging.getLogger("gptcli")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with pytest.raises(DataError):
            pretrain(config, run_dir=tmp_path / "run")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    last = checkpoint.list_checkpoints(tmp_path / "run")[-1]
    assert checkpoint.read_state(last)["train"]["step"] >= 3
    assert read_run_json(tmp_path / "run")["status"] == "failed"
