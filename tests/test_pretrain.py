"""Pretraining from end to end: limits, refusals, what a run leaves."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupting import STEPS, interrupted, many_pieces, one_file, outcome, tiny

from gptcli.errors import ConfigError, DataError
from gptcli.pretrain import describe, pretrain
from gptcli.runs import checkpoint
from gptcli.runs.load import load_model
from gptcli.runs.metrics import read_metrics, read_samples
from gptcli.runs.run_dir import read_run_json
from gptcli.training.events import StepEvent


@pytest.fixture(autouse=True, scope="module")
def _many_pieces() -> Iterator[None]:
    with many_pieces():
        yield


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """The library's log so far, as one text."""
    caplog.set_level(logging.INFO, logger="gptcli")
    return lambda: "\n".join(caplog.messages)


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
        assert "--set model.block_size=8" in caught.value.hint
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
