"""Spikes against brute force, and what a run does about them."""

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.data.rows import StepBatch
from gptcli.errors import NonFiniteError
from gptcli.pretrain import pretrain
from gptcli.runs import checkpoint
from gptcli.runs.metrics import read_metrics
from gptcli.training import loop, stability
from gptcli.training.readings import Reading, Readings, reading_lag
from gptcli.training.stability import Limits, Recent, Watch, applicable
from gptcli.training.state import TrainState

STEPS = 12


def after(values: list[float]) -> Recent:
    recent = Recent()
    for value in values:
        recent = recent.having(value)
    return recent


def test_mean_and_variance() -> None:
    """Bug: the incremental variance is not the variance, or old values weigh as much as new."""
    rng = random.Random(0)
    values = [rng.gauss(3.0, 0.5) for _ in range(200)]
    first = after(values[:50])
    assert first.mean == pytest.approx(statistics.fmean(values[:50]))
    assert first.variance == pytest.approx(statistics.pvariance(values[:50]))
    # Brute force: weights of the first 50 alike, each later value takes a fiftieth.
    weights = [0.98**150 / 50] * 50 + [0.98 ** (199 - i) / 50 for i in range(50, 200)]
    mean = sum(w * v for w, v in zip(weights, values, strict=True))
    variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
    every = after(values)
    assert sum(weights) == pytest.approx(1.0)
    assert (every.mean, every.variance) == (pytest.approx(mean), pytest.approx(variance))


def test_limit() -> None:
    """Bug: a verdict over three values, or one over values that do not differ at all."""
    assert after([3.0] * 49).limit(6.0) == math.inf
    assert after([3.0] * 50).limit(6.0) == pytest.approx(3.0 + 6.0 * 0.03)
    spread = after([2.0, 4.0] * 25)
    assert spread.limit(6.0) == pytest.approx(3.0 + 6.0 * 1.0)


def test_a_loss_near_zero() -> None:
    """Bug: where a text is learned by heart, a thousandth of a nat more is a spike."""
    watch, _ = watch_over([0.0011, 0.0009] * 30)
    limits = watch.limits(6.0)
    assert limits.loss == pytest.approx(0.001 + 6.0 * 0.01, rel=1e-3)
    assert limits.grad_norm == pytest.approx(1.0 + 6.0 * 0.01)  # of no unit, so of its mean


def watch_over(losses: list[float]) -> tuple[Watch, list[bool]]:
    """The watch after `losses` (norm 1 each), and which of them were spikes."""
    watch, spikes = Watch(), []
    for loss in losses:
        limits = watch.before
        spikes.append(limits.spike(loss, 1.0))
        watch = watch.having(loss, 1.0, limits, 6.0)
    return watch, spikes


def test_watch() -> None:
    """Bug: one spike hides the next one, a falling loss fires, a new level fires for ever."""
    rng = random.Random(1)
    falling = [4.0 * 0.999**i + rng.gauss(0.0, 0.05) for i in range(300)]
    assert not any(watch_over(falling)[1])
    spiked = falling.copy()
    for i in (200, 210):
        spiked[i] += 3.0
    assert [i for i, spike in enumerate(watch_over(spiked)[1]) if spike] == [200, 210]
    stepped = falling[:200] + [v + 3.0 for v in falling[200:]]
    fired = [i for i, spike in enumerate(watch_over(stepped)[1]) if spike]
    assert fired[0] == 200
    assert 1 < len(fired) < 20


def test_watch_is_late_by_a_step() -> None:
    """Bug: a figure that is read early decides otherwise than one that is read late."""
    values = [3.0 + 0.1 * (i % 3) for i in range(60)]
    watches = [watch_over(values[:n])[0] for n in range(60)]
    for n in range(2, 60):
        assert watches[n].before == watches[n - 1].limits(6.0)


def test_not_finite_figures_are_no_spikes() -> None:
    """Bug: one NaN makes mean and limit NaN, after which nothing is a spike."""
    watch, _ = watch_over([3.0, 3.1] * 30)
    bad = watch.having(math.nan, 1.0, watch.before, 6.0).having(3.0, math.inf, watch.before, 6.0)
    assert (bad.loss, bad.grad_norm) == (watch.loss, watch.grad_norm)
    assert not Limits().spike(1e9, 1e9)


@pytest.mark.parametrize(
    ("loss", "norm", "limits", "expected"),
    [
        (3.0, 1.0, Limits(), True),
        (math.nan, 1.0, Limits(), False),
        (3.0, math.inf, Limits(), False),
        (3.0, 1.0, Limits(2.9, 9.0), False),
        (3.0, 1.0, Limits(9.0, 0.9), False),
        (3.0, 1.0, Limits(3.0, 1.0), True),
    ],
)
def test_applicable(loss: float, norm: float, limits: Limits, expected: bool) -> None:
    """Bug: an infinite norm passes because infinity is not above infinity."""
    assert bool(applicable(torch.tensor(loss), torch.tensor(norm), limits)) is expected


def test_state_comes_back() -> None:
    """Bug: a resume forgets the figures, or an old checkpoint without them cannot be read."""
    watch, _ = watch_over([3.0, 3.2] * 30)
    state = TrainState(step=60, watch=watch, reached=0.25)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
    fresh = json.loads(json.dumps(TrainState().to_json()))  # its limits are infinite
    assert TrainState.from_json(fresh) == TrainState()
    old = {k: v for k, v in state.to_json().items() if k != "watch"}
    assert TrainState.from_json(old) == dataclasses.replace(state, watch=Watch())


def test_lag() -> None:
    """Bug: the step waits for a GPU, or does not where the next one needs the figures."""
    assert reading_lag("cuda", "bf16", "warn") == reading_lag("cuda", "fp32", "skip") == 1
    assert reading_lag("cuda", "fp16", "warn") == reading_lag("cuda", "bf16", "rollback") == 0
    assert reading_lag("cpu", "fp32", "warn") == reading_lag("mps", "fp32", "warn") == 0


def test_readings() -> None:
    """Bug: figures are lost, come twice or belong to another step."""
    readings, seen = Readings(lag=1), []
    for step in (1, 2, 3):
        value = torch.tensor(float(step))
        yes = torch.tensor(step != 2)
        readings.add(step, 0.5, Limits(), value, value / 2, yes, value if step == 3 else None)
        seen.append([r.step for r in readings.arrived()])
    assert seen == [[], [1], [2]]
    assert readings.waiting
    (last,) = readings.arrived(lag=0)
    assert (last.step, last.loss, last.grad_norm, last.update_ratio) == (3, 3.0, 1.5, 3.0)
    assert readings.last is last
    assert not readings.waiting
    assert readings.arrived(lag=0) == []
    assert readings.last is last


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)
    yield
    stop.reset()


@pytest.fixture
def judged_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps are enough to judge a step by."""
    monkeypatch.setattr(stability, "_RECENT_STEPS", 4)
    monkeypatch.setattr(stability, "_LEAST_DEVIATION", 0.1)


def config(folder: Path, **training: Any) -> Config:
    book = folder / "book.txt"
    book.write_text("the sun and the moon sing of a river\n" * 40)
    return Config.model_validate(
        {
            "name": "tiny",
            "tokenizer": {"kind": "bytes"},
            "data": {"train": str(book), "val_fraction": 0.1},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.1},
            "schedule": {"kind": "constant", "warmup_steps": 0},
            "optimizer": {"kind": "adamw", "lr": 1e-4},
            "training": {
                "max_steps": STEPS,
                "tokens_per_step": 64,
                "log_every": 3,
                "eval_every": 100,
                "save_every": 4,
                "precision": "fp32",
                "compile": "off",
                **training,
            },
            "samples": {"prompts": []},
        }
    )


@contextmanager
def changed(calls: dict[int, float], batches: list[float] | None = None) -> Iterator[None]:
    """Multiply loss and gradients of the calls of forward_backward whose numbers are given, and
    note the data positions of all. Works where the figures are made, as an overflow would."""
    real, count = loop.forward_backward, 0

    def run(session: Any, batch: StepBatch) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        if batches is not None:
            batches.append(batch.epochs)
        loss, norm = real(session, batch)
        factor = calls.get(count, 1.0)
        for parameter in session.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor
        return loss * factor, norm * factor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "forward_backward", run)
        yield


def files(run_dir: Path, step: int | None = None) -> dict[str, bytes]:
    """Weights and optimizer state of the newest checkpoint, or that of `step`."""
    newest = checkpoint.list_checkpoints(run_dir)[-1]
    path = newest if step is None else checkpoint.checkpoint_dir(run_dir, step)
    return {n: (path / n).read_bytes() for n in ("model.safetensors", "optimizer.safetensors")}


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run_dir) if r["event"] == kind]


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_nothing_changes_by_a_step_that_is_not_finite(tmp_path: Path, factor: float) -> None:
    """Bug: the moments or the weights take something of a step that was refused."""
    pretrain(config(tmp_path, max_steps=6), run_dir=tmp_path / "good")
    with changed({7: factor}):
        pretrain(config(tmp_path, max_steps=7), run_dir=tmp_path / "bad")
    assert files(tmp_path / "good") == files(tmp_path / "bad")


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if "second" not in k and k != "memory_bytes"}
        for record in read_metrics(run_dir)
    ]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("spike", ["off", "warn", "skip"])
def test_late_figures_change_nothing(
    tmp_path: Path, spike: str, kind: str, judged_soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: what is trained or logged depends on whether figures are read a step late."""
    given = config(tmp_path, spike=spike, save_every=5)
    optimizer = given.optimizer.model_copy(update={"kind": kind})
    given = given.model_copy(update={"optimizer": optimizer})
    with changed({8: 5.0, 10: math.nan}):
        pretrain(given, run_dir=tmp_path / "now")
    monkeypatch.setattr(loop, "reading_lag", lambda *_: 1)
    with changed({8: 5.0, 10: math.nan}):
        pretrain(given, run_dir=tmp_path / "late")
    assert files(tmp_path / "now") == files(tmp_path / "late")
    assert sorted(map(str, without_times(tmp_path / "now"))) == sorted(
        map(str, without_times(tmp_path / "late"))
    )
    spikes = [
        (r["event"], r["step"]) for r in read_metrics(tmp_path / "now") if r["step"] in (8, 10)
    ]
    assert spikes == ([("spike", 8)] if spike != "off" else []) + [("bad_step", 10)]


def test_a_line_of_the_log_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a GPU idles after every logged step: its figures are read before the next begins."""
    waited: list[int | None] = []
    real = Readings.arrived

    def arrived(self: Readings, lag: int | None = None) -> list[Reading]:
        if lag == 0 and self.waiting:
            waited.append(lag)
        return real(self, lag)

    monkeypatch.setattr(loop, "reading_lag", lambda *_: 1)
    monkeypatch.setattr(Readings, "arrived", arrived)
    given = config(tmp_path, log_every=1, save_every=5, max_steps=12)
    pretrain(given, run_dir=tmp_path / "run")
    assert [r["step"] for r in events(tmp_path / "run", "train")] == list(range(1, 13))
    assert len(waited) == 3  # at 5, 10 and the end, where the step is saved


def test_skip(tmp_path: Path, judged_soon: None) -> None:
    """Bug: a spike is applied although it is to be left out, or leaves more than itself out."""
    pretrain(config(tmp_path, max_steps=8), run_dir=tmp_path / "good")
    with changed({9: 5.0}):
        pretrain(config(tmp_path, max_steps=9, spike="skip"), run_dir=tmp_path / "skip")
    assert files(tmp_path / "good") == files(tmp_path / "skip")
    assert [r["step"] for r in events(tmp_path / "skip", "spike")] == [9]
    with changed({9: 5.0}):
        pretrain(config(tmp_path, max_steps=9, spike="warn"), run_dir=tmp_path / "warn")
    assert files(tmp_path / "good") != files(tmp_path / "warn")
    assert [r["step"] for r in events(tmp_path / "warn", "spike")] == [9]


def test_skips_come_to_an_end(tmp_path: Path, judged_soon: None) -> None:
    """Bug: a run that diverged skips every step for ever."""
    with changed(dict.fromkeys((9, 10, 11), 5e3)), pytest.raises(NonFiniteError) as caught:
        pretrain(config(tmp_path, spike="skip"), run_dir=tmp_path / "run")
    assert "3 spikes in a row, the last at step 11" in caught.value.message
    assert "training.spike=warn" in (caught.value.hint or "")


def test_rollback(tmp_path: Path, judged_soon: None) -> None:
    """Bug: weights, moments or step stay where the spike was, or the same data come again."""
    positions: list[float] = []
    with changed({11: 5.0}, positions):
        result = pretrain(config(tmp_path, spike="rollback"), run_dir=tmp_path / "run")
    assert (result.status, result.step) == ("finished", STEPS)
    assert positions == sorted(set(positions))  # eleven batches, then four from step 8 on
    assert len(positions) == 11 + STEPS - 8
    (line,) = events(tmp_path / "run", "rollback")
    assert (line["step"], line["from_step"]) == (8, 11)
    assert [r["step"] for r in events(tmp_path / "run", "train")] == [3, 6, 9, 12]
    # Oracle: the weights of step 8, and data from behind the spike, as a plain run would see them.
    pretrain(config(tmp_path, max_steps=8), run_dir=tmp_path / "plain")
    assert files(tmp_path / "plain", 8) == files(tmp_path / "run", 8)
    state = checkpoint.read_state(checkpoint.checkpoint_dir(tmp_path / "run", 8))["train"]
    assert (state["step"], state["epochs"]) == (8, positions[10])


@pytest.mark.parametrize("cut", [1, 3])
def test_resume_after_a_rollback(tmp_path: Path, judged_soon: None, cut: int) -> None:
    """Bug: a resume reads the data that made the spike again."""
    given = config(tmp_path, spike="rollback")
    with changed({11: 5.0}):
        pretrain(given, run_dir=tmp_path / "straight")
    with changed({11: 5.0}), _stopped_at_call(11 + cut):
        assert pretrain(given, run_dir=tmp_path / "run").status == "stopped"
    stop.reset()
    assert pretrain(given, run_dir=tmp_path / "run", resume="resume").status == "finished"
    assert files(tmp_path / "run") == files(tmp_path / "straight")
    assert without_times(tmp_path / "run") == without_times(tmp_path / "straight")


@contextmanager
def _stopped_at_call(number: int) -> Iterator[None]:
    """Ask for a stop in call `number` of forward_backward."""
    import signal

    real, count = loop.forward_backward, 0

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        if count == number:
            stop.request(signal.SIGTERM)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "forward_backward", run)
        yield


def test_rollbacks_come_to_an_end(tmp_path: Path, judged_soon: None) -> None:
    """Bug: a run goes back to the same checkpoint for ever."""
    bad: Callable[[int], float] = lambda n: 10.0 ** (n // 4)  # noqa: E731
    calls = {n: bad(n) for n in range(11, 200)}
    with changed(calls), pytest.raises(NonFiniteError) as caught:
        pretrain(config(tmp_path, spike="rollback"), run_dir=tmp_path / "run")
    assert "3 returns from spikes in a row" in caught.value.message
