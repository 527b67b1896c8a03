"""max_time under a clock that the test moves: what ends when, and how the rate falls until then."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptcli import pretrain as pretrain_module
from gptcli import stop
from gptcli.config.schema import Config, TrainingConfig
from gptcli.errors import ResourceError
from gptcli.pretrain import pretrain
from gptcli.runs import checkpoint
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json
from gptcli.training.state import TrainState, evaluation_fits, progress, reserve_seconds

LIMIT = 60.0
LIMITS = TrainingConfig(max_time="60s")


def test_reserve() -> None:
    """Bug: the last evaluation, save and report come on top of the limit."""
    state = TrainState(
        step=10,
        seconds=4.0,
        evaluation_seconds=3.0,
        save_seconds=0.5,
        finish_seconds=1.0,
        elapsed_seconds=40.0,
    )
    kept = 3.0 + 0.5 + 1.0 + 1.0 + 0.2  # the report's and half a step last
    assert reserve_seconds(state, LIMITS) == pytest.approx(kept)
    assert progress(state, LIMITS) == pytest.approx(40.0 / (60.0 - kept))
    assert progress(state, TrainingConfig(max_time="5s")) == 1.0
    short = TrainingConfig(max_time="10s")  # a report is no great part of it
    assert reserve_seconds(TrainState(), short) == pytest.approx(0.5)


def test_progress_never_falls() -> None:
    """Bug: a fast evaluation behind a slow one turns the schedule back."""
    state = TrainState(evaluation_seconds=20.0, elapsed_seconds=20.0)
    state.reached = progress(state, LIMITS)
    state.evaluation_seconds = 1.0
    assert progress(state, LIMITS) == state.reached == pytest.approx(20.0 / 39.0)


def test_evaluation_fits() -> None:
    """Bug: evaluations take the time from the training, or none is made at all."""
    state = TrainState(evaluation_seconds=5.9, elapsed_seconds=9.0)
    assert evaluation_fits(state, LIMITS)  # the one of step 0 may have been slow
    state.evaluation_seconds = 6.1
    assert not evaluation_fits(state, LIMITS)
    state.evaluated_seconds = state.evaluation_seconds = 1.0
    assert not evaluation_fits(state, LIMITS)
    state.elapsed_seconds = 20.0
    assert evaluation_fits(state, LIMITS)
    assert evaluation_fits(TrainState(evaluation_seconds=99.0), TrainingConfig(max_steps=100))
    state.evaluated_seconds, state.elapsed_seconds = 0.0, 57.0  # the last one is soon to come
    assert not evaluation_fits(state, LIMITS)


class Clock:
    """Stands for time.monotonic: moves by what work is said to take."""

    def __init__(self) -> None:
        self.now, self.began = 1000.0, 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def clocked(
    *, step: float, evaluation: float, save: float, report: float, stop_at: float | None = None
) -> Iterator[Clock]:
    """Seconds that work takes inside the block; starting takes 2. A stop is asked for once
    `stop_at` have gone by."""
    from gptcli.training import loop, validation

    clock = Clock()

    def slow(work: Any, seconds: float) -> Any:
        def run(*arguments: Any, **keys: Any) -> Any:
            clock.now += seconds
            if stop_at is not None and clock.now - clock.began >= stop_at:
                stop.request(signal.SIGINT)
            return work(*arguments, **keys)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", clock)
        patch.setattr("gptcli.pretrain.read_corpus", slow(_read_corpus(), 2.0))
        patch.setattr(loop, "forward_backward", slow(loop.forward_backward, step))
        scored = slow(validation.score_documents, evaluation)
        patch.setattr(validation, "score_documents", scored)
        patch.setattr(checkpoint, "publish", slow(checkpoint.publish, save))
        patch.setattr("gptcli.pretrain.write_report", slow(lambda run_dir: None, report))
        yield clock
    stop.reset()


def _read_corpus() -> Any:
    from gptcli.pretrain import read_corpus

    return read_corpus


def timed(folder: Path, **training: Any) -> Config:
    book = folder / "book.txt"
    book.write_text("the sun and the moon sing of a river\n" * 40)
    return Config.model_validate(
        {
            "name": "timed",
            "tokenizer": {"kind": "bytes"},
            "data": {"train": str(book), "val_fraction": 0.1},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
            "schedule": {"warmup_steps": 0},
            "training": {
                "max_time": f"{LIMIT:.0f}s",
                "tokens_per_step": 64,
                "log_every": 1,
                "eval_every": 10,
                "save_every": 20,
                "precision": "fp32",
                "compile": "off",
                **training,
            },
            "samples": {"prompts": []},
        }
    )


def check_decayed(run_dir: Path, peak: float) -> None:
    """The rate falls from its peak to (nearly) nothing, without a rise, and the end is scored."""
    records = read_metrics(run_dir)
    rates = [r["lr"] for r in records if r["event"] == "train"]
    assert rates[0] == peak
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 * peak
    assert records[-1]["event"] == "eval"
    assert records[-1]["step"] == records[-2]["step"]
    assert checkpoint.list_checkpoints(run_dir)[-1].name.endswith(f"{records[-1]['step']:08d}")
    assert read_run_json(run_dir)["status"] == "finished"


@pytest.mark.parametrize(
    "takes",
    [
        {"step": 0.2, "evaluation": 0.5, "save": 0.1, "report": 0.9},
        {"step": 0.3, "evaluation": 6.0, "save": 1.5, "report": 0.9},
        {"step": 1.2, "evaluation": 0.2, "save": 3.0, "report": 0.7},
    ],
)
def test_ends_in_time(tmp_path: Path, takes: dict[str, float]) -> None:
    """Bug: start-up, evaluation, saving or the report are not counted, so the run is late; or so
    much is kept back for them that it is early."""
    config = timed(tmp_path)
    with clocked(**takes) as clock:
        result = pretrain(config, run_dir=tmp_path / "run")
    assert result.status == "finished"
    assert clock.now - clock.began == pytest.approx(LIMIT, rel=0.03)
    check_decayed(tmp_path / "run", config.optimizer.lr)
    evaluations = [r["step"] for r in read_metrics(tmp_path / "run") if r["event"] == "eval"]
    assert (len(evaluations) - 2) * takes["evaluation"] <= 0.1 * LIMIT


@pytest.mark.parametrize("stops", [[2.4], [31.0], [20.0, 15.0], [50.0]])
def test_ends_in_time_over_resumes(tmp_path: Path, stops: list[float]) -> None:
    """Bug: what the first process did, or the start of the second, is not counted."""
    config, spent = timed(tmp_path), 0.0
    takes = {"step": 0.2, "evaluation": 0.5, "save": 0.1, "report": 0.9}
    for number, moment in enumerate(stops):
        with clocked(**takes, stop_at=moment) as clock:
            resume: Any = "resume" if number else "no"
            assert pretrain(config, run_dir=tmp_path / "run", resume=resume).status == "stopped"
            spent += clock.now - clock.began
    with clocked(**takes) as clock:
        result = pretrain(config, run_dir=tmp_path / "run", resume="resume")
        spent += clock.now - clock.began
    assert result.status == "finished"
    assert spent == pytest.approx(LIMIT, rel=0.03)
    check_decayed(tmp_path / "run", config.optimizer.lr)


def test_starts_without_a_step_count(tmp_path: Path) -> None:
    """Bug: a job that is preempted again and again before its first step goes on beyond its limit;
    or a save of nothing but the time ends the run on a full disk."""
    config, spent = timed(tmp_path), 0.0
    takes = {"step": 0.2, "evaluation": 0.5, "save": 0.1, "report": 0.9}
    with clocked(**takes, stop_at=20.0) as clock:
        pretrain(config, run_dir=tmp_path / "run")
        spent += clock.now - clock.began
    for full in (False, False, True):
        with clocked(**takes) as clock, pytest.MonkeyPatch.context() as patch:
            begin = pretrain_module.training_rows

            def preempted(*arguments: Any, clock: Clock = clock, begin: Any = begin) -> Any:
                rows = begin(*arguments)
                clock.now += 5.0
                stop.request(signal.SIGTERM)
                return rows

            def no_space(*arguments: Any) -> None:
                raise ResourceError("the disk is full")

            patch.setattr(pretrain_module, "training_rows", preempted)
            if full:
                patch.setattr(checkpoint, "publish", no_space)
            result = pretrain(config, run_dir=tmp_path / "run", resume="resume")
            assert result.status == "stopped"
            spent += 0.0 if full else clock.now - clock.began
    with clocked(**takes) as clock:
        result = pretrain(config, run_dir=tmp_path / "run", resume="resume")
        spent += clock.now - clock.began
    assert result.status == "finished"
    assert spent == pytest.approx(LIMIT, rel=0.03)


def test_the_caller_may_have_begun_before(tmp_path: Path) -> None:
    """Bug: what happened before the call (imports, measuring) comes on top of the limit."""
    with clocked(step=0.2, evaluation=0.5, save=0.1, report=0.9) as clock:
        clock.now += 10.0
        pretrain(timed(tmp_path), run_dir=tmp_path / "run", began=clock.began)
    assert clock.now - clock.began == pytest.approx(LIMIT, rel=0.03)


def test_no_time_for_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a run that never trains ends without a word, or trains beyond its limit."""
    with clocked(step=0.2, evaluation=29.5, save=0.1, report=0.9):
        result = pretrain(timed(tmp_path), run_dir=tmp_path / "run")
    assert (result.status, result.step) == ("finished", 0)
    assert "no time left for a step: 31.6 s have gone by" in caplog.text


def test_a_longer_limit(tmp_path: Path) -> None:
    """Bug: the progress under the old limit is taken for that under the new one."""
    config, run_dir = timed(tmp_path), tmp_path / "run"
    takes = {"step": 0.5, "evaluation": 0.5, "save": 0.1, "report": 0.9}
    with clocked(**takes):
        steps = pretrain(config, run_dir=run_dir).step
    with clocked(**takes):
        result = pretrain(timed(tmp_path, max_time="180s"), run_dir=run_dir, resume="resume")
    assert result.step > 2.5 * steps
    elapsed = read_run_json(run_dir)["training"]["elapsed_seconds"]
    assert elapsed + 0.9 == pytest.approx(180, rel=0.03)
    rates = [r["lr"] for r in read_metrics(run_dir) if r["event"] == "train"]
    assert rates[-1] < 0.05 * config.optimizer.lr
