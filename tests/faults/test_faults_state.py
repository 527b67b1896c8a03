"""Checkpoints that agree with their own hashes and yet are such as no run writes: row K18.

Somebody edited them, another program made them, or a disk lost what was in memory before the hash
was made. The place in the data is followed into the readers of text, of rows and of packed rows.
"""

import json
import math
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupting import interrupted
from outcome import errors, hints
from safetensors.torch import load_file, save_file
from sealing import reseal
from small import working_in

from gptcli.cli.main import main
from gptcli.runs import checkpoint
from gptcli.verify import verify_run

Gpt = Callable[..., tuple[int, str, str]]

NEWEST = 2
TUNED = """\
name: tuned
init: r
data: {train: rows.jsonl, val_fraction: 0.2}
finetune: {packing: true, fields: {prompt: q, response: a}, template: "{{ prompt }}:"}
training: {max_steps: 4, tokens_per_step: 64, log_every: 9, eval_every: 100, save_every: 100,
           micro_batch_size: 2, precision: fp32, compile: off, device: cpu}
schedule: {warmup_steps: 1}
samples: {n: 1, max_new_tokens: 2}
"""
TEXT = "{path: text.txt, weight: 2}"
ROWS = "{path: rows.jsonl, text_field: a, weight: 1}"
JOBS = {
    "text": ("pretrain", "tiny.yaml", "--set=training.log_every=9"),
    "rows": ("pretrain", "tiny.yaml", "--set=data.train=[{path: rows.jsonl, text_field: a}]"),
    "mixture": ("pretrain", "tiny.yaml", f"--set=data.train=[{TEXT}, {ROWS}]"),
    "packed": ("finetune", "tuned.yaml"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each job, stopped in the middle; to be copied."""
    with working_in(tmp_path_factory.mktemp("stopped")) as place:
        rows = [{"q": f"what of {i}?", "a": f"of {i} nothing is known to me"} for i in range(60)]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (place / "tuned.yaml").write_text(TUNED)
        assert main(["pretrain", "tiny.yaml", "--run-dir=r", "--quiet"]) == 0
        for name, job in JOBS.items():
            with interrupted(NEWEST):
                assert main([*job, f"--run-dir={name}", "--quiet"]) == 143
    return place


@pytest.fixture(autouse=True)
def there(stopped: Path, folder: Path) -> None:
    """A copy of it is the user's folder."""
    shutil.copytree(stopped, folder, dirs_exist_ok=True)


class Run:
    """A stopped run whose newest checkpoint is spoilt, resumed, and mended again."""

    def __init__(self, name: str, gpt: Gpt) -> None:
        self.directory = Path(name)
        self.newest = checkpoint.checkpoint_dir(self.directory, NEWEST)
        self._resume = lambda *more: gpt(*JOBS[name], f"--run-dir={name}", "--resume", *more)
        self.state = json.loads((self.newest / "state.json").read_text())

    def refuses(self, file: str, of: Any = None) -> str:
        """What a resume says of a checkpoint that it does not take; `gpt runs verify` agrees. The
        command that the hint gives takes the checkpoint out of the way."""
        reseal(self.newest)
        before = (self.directory / "run.json").read_bytes()
        code, out, err = self._resume()
        assert (code, out) == (4, ""), (of, err)
        (line,) = errors(err)
        assert line.startswith(f"{self.newest / file}")
        assert (self.directory / "run.json").read_bytes() == before
        found = [one for one in verify_run(self.directory) if one.verdict == "bad"]
        assert self.newest.name in {Path(one.what).name for one in found}
        assert hints(err) == (
            f"to go on from the checkpoint before it: mv {self.newest} {self.newest}.bad"
        )
        return line.removeprefix(f"{self.newest / file}: ")

    def refuses_place(self, *flags: str) -> str:
        """What a resume says of a place in the data that there is not."""
        reseal(self.newest)
        code, out, err = self._resume(*flags)
        assert (code, out) == (4, ""), err
        (line,) = errors(err)
        return line.removeprefix(f"{self.newest / 'state.json'}: ")

    def edit(self, place: str, value: Any) -> None:
        """Set the value at a place like train.watch.loss.count in state.json."""
        state = json.loads(json.dumps(self.state))
        *above, last = [int(key) if key.isdigit() else key for key in place.split(".")]
        reduce(lambda node, key: node[key], above, state)[last] = value
        (self.newest / "state.json").write_text(json.dumps(state))

    def goes_on(self) -> None:
        """Resume with the state as it was."""
        (self.newest / "state.json").write_text(json.dumps(self.state))
        reseal(self.newest)
        code, _, err = self._resume()
        assert code == 0, err


EDITS: list[tuple[str, Any]] = [
    *(
        (f"train.{name}", value)
        for name in ("tokens", "skipped_steps")
        for value in (-1, 2.0, None)
    ),
    *((f"train.{name}", value) for name in ("reached", "seconds") for value in (math.nan, -0.5)),
    *((f"train.{name}", math.inf) for name in ("epochs", "save_seconds", "elapsed_seconds")),
    *(("train.best_step", value) for value in (10**300, 5, "0", None)),
    *(("train.loss_scale", value) for value in (0.0, math.nan, 1e300)),
    ("train.reached", 1.5),
    ("train.step", 2.0),
    ("train.step", True),
    ("train.tokens", 10**30),
    ("train.good_steps", -3),
    ("train.evaluated_step", 3),
    ("train.spike_step", -2),
    ("train.best_loss", math.nan),
    ("train.interval", {"tokens": 64}),
    ("train.interval", {"tokens": 64, "other_seconds": 0.0}),
    ("train.interval.loss", math.nan),
    ("train.interval.steps", -1),
    ("train.interval.more", 1.0),
    ("train.watch.loss.variance", -1.0),
    ("train.watch.loss.mean", math.inf),
    ("train.watch.grad_norm.count", -1),
    ("train.watch.grad_norm.count", 1.5),
    ("train.watch.before.loss", math.nan),
    ("train.watch.before.grad_norm", -1.0),
    ("choices.threads", 0),
    ("choices.micro_batch_size", 0),
    ("decaying", "no"),
]


def test_k18_figures_that_no_run_has(gpt: Gpt) -> None:
    """K18: counters below zero, sums that are no numbers, shares above one and a best step beyond
    all numbers are exit 4 with file and key, to resume and to verify, before a text is read; the
    hint's command takes such a checkpoint out of the way."""
    run = Run("text", gpt)
    for place, value in EDITS:
        run.edit(place, value)
        told = run.refuses("state.json", (place, value))
        assert place.rpartition(".")[0] in told, (place, value)
        assert place.rpartition(".")[2] in told, (place, value)
    run.goes_on()


TENSORS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "doubles": (torch.Tensor.double, "holds F64, but runs save F32"),
    "halves": (torch.Tensor.bfloat16, "holds BF16, but runs save F32"),
    "whole numbers": (torch.Tensor.char, "holds I8, but runs save F32"),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "norm.weight"),
        ("optimizer.safetensors", "wte.weight.exp_avg"),
        ("optimizer.safetensors", "blocks.0.mlp.up.weight.momentum"),
    ],
)
def test_k18_tensors_of_another_type(kind: str, file: str, name: str, gpt: Gpt) -> None:
    """K18: weights and moments of another type than the run saved are exit 4 with the tensor's
    name; they would be taken as they are, or end in torch's own words."""
    run = Run("text", gpt)
    convert, problem = TENSORS[kind]
    whole = load_file(run.newest / file)
    save_file({**whole, name: convert(whole[name])}, run.newest / file)
    told = run.refuses(file)
    assert name in told
    assert problem in told


def test_k18_an_optimizer_that_is_empty(gpt: Gpt) -> None:
    """K18: with no moments left, or some of them, the run would go on as another one: exit 4."""
    run = Run("text", gpt)
    path = run.newest / "optimizer.safetensors"
    whole = load_file(path)
    save_file({}, path)
    assert run.refuses("optimizer.safetensors").endswith(f"holds nothing, after {NEWEST} updates")
    for lost in ("wte.weight.step", "wte.weight.exp_avg_sq", "blocks.0.mlp.up.weight.momentum"):
        save_file({name: t for name, t in whole.items() if name != lost}, path)
        assert lost in run.refuses_place()
        (found,) = (one for one in verify_run(run.directory) if "step-00000002" in one.what)
        assert (found.verdict, lost in found.text) == ("bad", True)
    save_file(whole, path)
    run.goes_on()


PLACES: dict[str, list[str]] = {
    "text": ["row", "group", "epoch", "seen.0.tokens", "seen.0.epochs"],
    "mixture": ["row", "group", "mixture.streams.1.position", "mixture.tokens.1"],
    "rows": ["row", "group", "seen.0.documents"],
    "packed": ["row", "group", "mixture.tokens.0"],
}
ALL = [f"mixture.streams.0.{key}" for key in ("epoch", "epoch_bytes", "window", "position")]
ALL += ["mixture.streams.0.cursor.0", "mixture.streams.0.cursor.1"]
TOO_MUCH = ("row", "position", "cursor.0", "cursor.1", "streams.0.epoch")


@pytest.mark.parametrize("name", JOBS)
def test_k18_a_place_in_the_data_that_there_is_not(name: str, gpt: Gpt) -> None:
    """K18: a row, a shard or an epoch below zero, between two, or behind the last one is exit 4
    with its key: text, rows, a mixture and packed rows would begin again or end in a traceback."""
    run = Run(name, gpt)
    for key in [*ALL, *PLACES[name]]:
        values: list[Any] = [-1, math.nan if key.endswith("epochs") else 1.5, 10**300, "0", None]
        if key.endswith(TOO_MUCH):
            values.append(10**9)
        for value in values:
            run.edit(f"train.position.{key}", value)
            told = run.refuses_place()
            assert "train.position" in told, (key, value)
            if value != 10**9:
                assert key.split(".")[0] in told, (key, value)
    for key, value in (("mixture.streams", []), ("mixture.tokens", [1] * 5), ("mixture", None)):
        run.edit(f"train.position.{key}", value)
        assert "train.position" in run.refuses_place()
    run.goes_on()


def test_k18_a_part_of_the_text_that_is_none(gpt: Gpt) -> None:
    """K18: tokens that the vocabulary does not have, and runs of a source that the data do not
    have, are exit 4, not an error in the reader's thread some steps later."""
    run = Run("text", gpt)
    for key, value in (
        ("rest", {"tokens": [999], "runs": [[1, 0, 1]]}),
        ("rest", {"tokens": [1], "runs": [[1, 7, 1]]}),
        ("rest", {"tokens": [1], "runs": [[1, 0, 9]]}),
        ("rest", {"tokens": [-1], "runs": [[1, 0, 1]]}),
        ("last", ["text.txt", 0, 0.5]),
        ("last", ["text.txt", -1, 0]),
        ("head", {"tokens": [1, 2], "runs": [[1, 0, 1]]}),
        ("seen", []),
        ("mixture", {"streams": 2 * run.state["train"]["position"]["mixture"]["streams"]}),
    ):
        if key == "mixture":
            value["tokens"] = [1, 1]
        run.edit(f"train.position.{key}", value)
        told = run.refuses_place()
        assert key in told or "2 streams, not 1" in told
    run.goes_on()


def test_k18_a_place_in_more_sources_over_other_data(gpt: Gpt) -> None:
    """K18: over other data too, which are allowed, a place in two sources is none in one."""
    run = Run("text", gpt)
    streams = 2 * run.state["train"]["position"]["mixture"]["streams"]
    run.edit("train.position.mixture", {"streams": streams, "tokens": [1, 1]})
    with Path("text.txt").open("a") as file:
        file.write("one more line\n")
    told = run.refuses_place("--allow-data-change")
    assert "the place is one in 2 streams, not 1" in told
