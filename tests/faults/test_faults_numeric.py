"""Numbers that are not finite, too large or unequal: the N rows of the fault matrix.

Each test names its row and says what the row owes: exit code, message, hint, and what is kept.
"""

import json
import math
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interrupting import interrupted
from outcome import errors, hints, warnings
from safetensors.torch import load_file, save_file
from sealing import reseal
from small import PROSE, working_in
from torch.nn.modules.module import register_module_forward_hook
from update_hook import UpdateHook

from gptcli.cli.main import main
from gptcli.config.schema import Config
from gptcli.data.rows import Prefetch
from gptcli.evaluation import perplexity
from gptcli.reports.report import build_report, read_run
from gptcli.runs import checkpoint
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json
from gptcli.training import choices, recovery, stability
from gptcli.training.adamw import AdamW
from gptcli.training.choices import Choices
from gptcli.training.readings import Reading
from gptcli.training.recovery import settle
from gptcli.training.stability import Limits
from gptcli.training.state import TrainState

Gpt = Callable[..., tuple[int, str, str]]
Poison = Callable[[torch.Tensor], torch.Tensor]

TRAIN = ("pretrain", "tiny.yaml", "--run-dir=r", "--set=schedule.kind=constant")
SAVE_ALL = "--set=training.save_every=1"
FP16 = "--set=training.precision=fp16"
RESUME = (*TRAIN, "--resume")
TEXT = ("--prompt=On", "--max-new-tokens=4", "--seed=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has finished; to be copied."""
    with working_in(tmp_path_factory.mktemp("finished")) as place:
        assert main([*TRAIN, "--quiet"]) == 0
    return place / "r"


@pytest.fixture
def run(finished: Path, folder: Path) -> Path:
    """A copy of that run, as `r` in the user's folder."""
    shutil.copytree(finished, folder / "r")
    return folder / "r"


@contextmanager
def poisoned(forwards: set[int], change: Poison) -> Iterator[dict[int, list[list[int]]]]:
    """`change` what enters the blocks in the training passes whose numbers are given (from 1), of
    which a step has one. Gives the tokens of each pass."""
    seen: dict[int, list[list[int]]] = {}

    def hook(
        module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor | None:
        if not isinstance(module, torch.nn.Embedding) or not module.training:
            return None
        number = len(seen) + 1
        seen[number] = inputs[0].tolist()
        return change(output) if number in forwards else None

    handle = register_module_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def nan_loss(x: torch.Tensor) -> torch.Tensor:
    return x * float("nan")


def infinite_gradient(x: torch.Tensor) -> torch.Tensor:
    """The loss stays finite; one gradient does not."""
    x.register_hook(lambda grad: grad * float("inf"))
    return x


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.list_checkpoints(run_dir)]


def learned(run_dir: Path) -> list[bytes]:
    """Weights and optimizer of the last checkpoint."""
    last = checkpoint.list_checkpoints(run_dir)[-1]
    return [(last / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def state(run_dir: Path) -> dict[str, Any]:
    """Where the run stands, by its last checkpoint."""
    found: dict[str, Any] = checkpoint.read_state(checkpoint.list_checkpoints(run_dir)[-1])
    return found["train"]  # type: ignore[no-any-return]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run_dir) if record["event"] == kind]


def assert_one_step_left_out(poison: Poison, gpt: Gpt, folder: Path) -> dict[str, Any]:
    """What N1 and N2 owe for one bad step. Returns its line in the log."""
    flags = ("pretrain", "tiny.yaml", "--set=schedule.kind=constant", SAVE_ALL)
    assert gpt(*flags, "--run-dir=good", "--set=training.max_steps=3")[0] == 0
    with poisoned({4}, poison):
        code, _, err = gpt(*flags, "--run-dir=bad", "--set=training.max_steps=4")
    assert code == 0, err
    assert learned(folder / "bad") == learned(folder / "good")
    assert "step 4: loss " in warnings(err)
    assert warnings(err).endswith("; update not applied")
    (line,) = events(folder / "bad", "bad_step")
    assert line["step"] == 4
    saved = state(folder / "bad")
    assert (saved["step"], saved["skipped_steps"]) == (4, 1)
    return line


def test_n01_one_step(gpt: Gpt, folder: Path) -> None:
    """N1: the update of a step whose loss is not finite is not applied: weights and optimizer stay
    as they were; its line in metrics.jsonl says where in the data its batch begins, and whether it
    was nan or inf, and so do the warning and the report."""
    line = assert_one_step_left_out(nan_loss, gpt, folder)
    assert (line["loss"], line["grad_norm"]) == (None, None)
    assert line["not_finite"] == {"loss": "nan", "grad_norm": "nan"}
    assert "step 4: loss nan, gradient norm nan; " in (folder / "bad" / "log.txt").read_text()
    report = build_report(folder / "bad", read_run(folder / "bad"))
    assert "1 update was not applied: 1 with loss nan, grad_norm nan." in report["notes"]
    before = checkpoint.read_state(checkpoint.checkpoint_dir(folder / "bad", 3))
    assert line["position"] == before["train"]["position"]


def test_n01_three_in_a_row(gpt: Gpt, folder: Path) -> None:
    """N1: after training.max_bad_steps (3) in a row, exit 5; nothing is saved after the last good
    step, from which a resume goes on. The hint shows the last one's batch."""
    flags = ("--set=training.max_steps=9", SAVE_ALL)
    with poisoned({3, 5, 6, 7}, nan_loss) as seen:
        code, out, err = gpt(*TRAIN, *flags)
    assert (code, out) == (5, "")
    (line,) = errors(err)
    assert line.startswith("3 non-finite steps in a row, the last at step 7: loss nan")
    lower, show = hints(err).splitlines()
    assert "lower optimizer.lr" in lower
    assert steps(folder / "r")[-1] == 4
    for path in checkpoint.list_checkpoints(folder / "r"):
        checkpoint.verify(path)
    assert read_run_json(folder / "r")["status"] == "failed"
    assert [r["step"] for r in events(folder / "r", "bad_step")] == [3, 5, 6, 7]
    command = shlex.split(show.removeprefix("its batch: "))
    code, shown, _ = gpt(*command[1:], "--json")
    assert (code, command[:3]) == (0, ["gpt", "data", "show"])
    rows = [[token["id"] for token in row["tokens"]] for row in json.loads(shown)["rows"]]
    assert [row[: len(seen[7][0])] for row in rows[: len(seen[7])]] == seen[7]
    assert gpt(*RESUME, *flags)[0] == 0


def test_n02_a_gradient(gpt: Gpt, folder: Path) -> None:
    """N2: a gradient that is not finite behind a finite loss is no update either: clipping would
    make NaN of every weight. The loss is in the log, the norm is null there, for JSON has no inf,
    and its name stands beside it."""
    line = assert_one_step_left_out(infinite_gradient, gpt, folder)
    assert line["grad_norm"] is None
    assert line["not_finite"] in ({"grad_norm": "inf"}, {"grad_norm": "nan"})
    assert math.isfinite(line["loss"])


def test_n03_weights(gpt: Gpt, folder: Path) -> None:
    """N3: weights with NaN are never saved: exit 5 with the step and the tensor; the checkpoint
    before is whole and newest."""
    updates = 0

    def spoil(optimizer: AdamW) -> None:
        nonlocal updates
        updates += 1
        if updates == 2:
            optimizer.groups[0].params[0].data[0, 0] = math.nan

    handle = UpdateHook(spoil)
    try:
        code, out, err = gpt(*TRAIN, SAVE_ALL)
    finally:
        handle.remove()
    assert (code, out) == (5, "")
    (line,) = errors(err)
    assert line == "step 2: weights that are not finite are never saved: wte.weight"
    assert "lower optimizer.lr, then resume" in hints(err)
    assert steps(folder / "r")[-1] == 1
    checkpoint.verify(checkpoint.list_checkpoints(folder / "r")[-1])
    assert gpt(*RESUME)[0] == 0


SPIKY = ["training.max_steps=12", "training.spike=warn", "training.spike_zscore=1.5"]
SPIKY += ["optimizer.lr=0.02", "optimizer.adamw_lr=0.02", "optimizer.embedding_lr=0.02"]


def steep(loss: torch.Tensor) -> torch.Tensor:
    """The same loss with a gradient that is far too large."""
    loss.register_hook(lambda grad: grad * 1e4)
    return loss


def high(x: torch.Tensor) -> torch.Tensor:
    """A loss that is far too large: every position is taken for the one with the first token."""
    return x[:, :1].expand_as(x) * -9


@pytest.mark.parametrize(("spike", "told"), [(steep, "gradient norm "), (high, "loss 6.")])
def test_n04_a_spike(
    spike: Poison, told: str, gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N4: a loss or gradient far above the recent ones (training.spike_zscore) is a warning and a
    line in the log; what is usual comes from finite steps only and outlives a resume."""
    monkeypatch.setattr(stability, "_RECENT_STEPS", 4)
    flags = tuple(f"--set={given}" for given in SPIKY)

    with poisoned({5}, nan_loss), interrupted(6):
        assert gpt(*TRAIN, *flags)[0] == 143
    saved = state(folder / "r")
    assert saved["watch"]["loss"]["count"] == 6
    with poisoned({2}, spike):
        code, _, err = gpt(*RESUME, *flags)
    assert code == 0, err
    step = saved["step"] + 2
    assert f"step {step}: loss " in warnings(err)
    assert told in warnings(err)
    assert warnings(err).endswith("; a spike")
    assert [r["step"] for r in events(folder / "r", "spike")] == [step]


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16, which trains on GPUs only, on this machine's processor."""
    monkeypatch.setattr(choices, "choose_precision", lambda wanted, device: "fp16")


@pytest.mark.usefixtures("fp16")
def test_n05_overflows(gpt: Gpt, folder: Path) -> None:
    """N5: in fp16 an overflow halves the loss scale and leaves the step out, which is no fault of
    the run; the scale is saved and a resume goes on with it."""
    with interrupted(1):
        assert gpt(*TRAIN, FP16)[0] == 143
    before = state(folder / "r")
    with poisoned({1, 2}, infinite_gradient):
        code, _, err = gpt(*RESUME, FP16)
    assert (code, warnings(err)) == (0, "")
    after = state(folder / "r")
    assert after["loss_scale"] == before["loss_scale"] / 4
    assert (after["step"], after["skipped_steps"]) == (4, 0)


@pytest.mark.usefixtures("fp16")
def test_n05_again_and_again(gpt: Gpt, folder: Path) -> None:
    """N5: gradients that overflow even at a scale of 1 are bad steps: after three of them exit 5,
    with fp32 among the ways out, and the last good checkpoint stays."""
    with poisoned(set(range(1, 30)), infinite_gradient):
        code, _, err = gpt(*TRAIN, FP16, "--set=training.max_steps=40")
    assert code == 5
    assert errors(err)[0].startswith("3 non-finite steps in a row, the last at step 19: ")
    assert "training.precision=fp32" in hints(err)
    assert steps(folder / "r") == [0]


def scaled(precision: str) -> Any:
    """What `settle` needs of a run."""
    return SimpleNamespace(
        config=Config(),
        choices=Choices("cuda:0", 1, precision, False, 1, "2.0"),
        state=TrainState(loss_scale=4.0),
        metrics=SimpleNamespace(write=lambda record: None),
    )


def reading(step: int, grad_norm: float = 1.0) -> Reading:
    return Reading(step, 1.0, Limits(), 3.0, grad_norm, math.isfinite(grad_norm), None)


def test_n05_the_scale_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """N5: after many steps in a row without an overflow the scale doubles."""
    monkeypatch.setattr(recovery, "_STEPS_TO_GROW", 3)
    run, scales = scaled("fp16"), []
    for step, norm in enumerate([1.0, 1.0, 1.0, 1.0, math.inf, 1.0, 1.0, 1.0, math.inf, math.inf]):
        settle(run, reading(step, norm))
        scales.append(run.state.loss_scale)
    assert scales == [4.0, 4.0, 8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 4.0, 2.0]
    assert (run.state.bad_steps, run.state.skipped_steps) == (0, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_n05_other_precisions_have_no_scale(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """N5: fp32 and bf16 have no loss scale that could grow or fall: an overflow there is a bad
    step."""
    monkeypatch.setattr(recovery, "_STEPS_TO_GROW", 3)
    run = scaled(precision)
    for step in range(9):
        settle(run, reading(step))
    settle(run, reading(9, math.inf))
    assert (run.state.loss_scale, run.state.good_steps) == (4.0, 0)
    assert run.state.skipped_steps == 1


def remade(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights of a checkpoint, and give them out as its own."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    reseal(path)


def test_n06_a_perplexity_too_large(gpt: Gpt, run: Path) -> None:
    """N6: a loss of thousands of nats is kept; its perplexity is shown as inf, and is null in JSON,
    which knows no infinity."""
    last = checkpoint.list_checkpoints(run)[-1]
    remade(last, lambda tensors: tensors["head.weight"].mul_(1e5))
    score = ("eval", f"--model={last}", "--data=text.txt", "--max-tokens=64")
    code, out, err = gpt(*score, "--json")
    assert code == 0, err
    scores = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))["scores"]
    assert scores["loss"] > 1000
    assert scores["perplexity"] is None
    code, out, err = gpt(*score)
    assert code == 0, err
    assert ["perplexity", "inf"] in [line.split() for line in out.splitlines()]


def test_n06_a_loss_that_is_none(gpt: Gpt, run: Path) -> None:
    """N6: a model whose loss is no number has no scores: exit 4 with the checkpoint."""
    last = checkpoint.list_checkpoints(run)[-1]
    remade(last, lambda tensors: tensors["head.weight"].fill_(math.nan))
    code, out, err = gpt("eval", f"--model={last}", "--data=text.txt", "--max-tokens=64", "--json")
    assert (code, out) == (4, "")
    assert errors(err) == [f"{last}: its loss on text.txt is not a number"]
    assert "take an earlier checkpoint" in hints(err)


@pytest.mark.parametrize("rows", [1, 7])
def test_n07_batches_of_any_size(
    rows: int, gpt: Gpt, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N7: scores are means over tokens: those of one row at a time, of seven, and of all are the
    same, though documents and last batches have unequal lengths."""
    texts = [PROSE[: 7 * i + 1] for i in range(9)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "rows.jsonl").write_text(lines)
    score = ("eval", "--model=r", "--data=rows.jsonl", "--json")
    expected = json.loads(gpt(*score)[1])["scores"]
    assert expected["tokens"] == sum(map(len, texts))
    monkeypatch.setattr(perplexity, "MOST_LOGITS", rows * 32 * 257)
    found = json.loads(gpt(*score)[1])["scores"]
    for name in ("loss", "bits_per_byte", "accuracy", "tokens", "documents"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("flags", [(), ("--temperature=0",), ("-n3", "--json")])
def test_n08_logits(number: float, flags: tuple[str, ...], gpt: Gpt, run: Path) -> None:
    """N8: a checkpoint whose logits are not finite generates no text: exit 4 with its path."""
    last = checkpoint.list_checkpoints(run)[-1]
    remade(last, lambda tensors: tensors["head.weight"].fill_(number))
    code, out, err = gpt("generate", f"--model={last}", *TEXT, "--no-prompt", *flags)
    assert (code, out) == (4, "")
    assert errors(err) == [f"{last}: the checkpoint produces non-finite logits"]
    assert "take an earlier checkpoint" in hints(err)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a batch ends with exit code 1."""

    def train(*_: Any) -> None:
        raise AssertionError("a batch was asked for")

    monkeypatch.setattr(Prefetch, "next", train)


@pytest.mark.usefixtures("no_training")
def test_n09_a_finished_run(gpt: Gpt, run: Path) -> None:
    """N9: to resume a finished run is exit 0 and "nothing to do"; no step is trained and nothing is
    saved again."""
    before = learned(run), steps(run), read_metrics(run)
    code, out, err = gpt(*RESUME)
    assert code == 0, err
    assert "nothing to do: r is at its limit, step 4" in err
    assert out.splitlines()[0] == "r"
    assert (learned(run), steps(run), read_metrics(run)) == before


@pytest.mark.usefixtures("no_training")
def test_n09_no_steps(gpt: Gpt, folder: Path) -> None:
    """N9: a limit of no steps is exit 2; where time is over before the first step, the run says so,
    is evaluated and saved as it is, and ends with 0."""
    code, _, err = gpt(*TRAIN, "--set=training.max_steps=0")
    assert code == 2
    assert errors(err) == ["--set training.max_steps=0: must be above 0, got 0"]
    code, _, err = gpt(*TRAIN, "--max-time=0.001s")
    assert code == 0, err
    assert "no time left for a step" in warnings(err)
    assert steps(folder / "r") == [0]
    assert [r["step"] for r in events(folder / "r", "eval")] == [0]
    assert read_run_json(folder / "r")["status"] == "finished"
