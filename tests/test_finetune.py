"""Finetuning from end to end: scores before and after, exact resumes, rows that do not fit."""

import hashlib
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import stopping_at

from gptcli import stop
from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.config.schema import Config
from gptcli.data.corpus import open_corpus
from gptcli.data.task_formats import row_fields
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.finetune import describe, finetune
from gptcli.pretrain import pretrain
from gptcli.runs import checkpoint
from gptcli.runs.load import load_model
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json
from gptcli.training import features

SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pretrained run. Reports are left out of runs that nobody looks at."""
    folder = tmp_path_factory.mktemp("base")
    book = folder / "book.txt"
    book.write_text("".join(f"the {a} says {s}\n" for a, s in SOUNDS.items()) * 5)
    config = Config.model_validate(
        {
            "name": "base",
            "tokenizer": {"kind": "bytes"},
            "data": {"train": str(book), "val_fraction": 0.1},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32},
            "schedule": {"warmup_steps": 0},
            "training": {"max_steps": 5, "tokens_per_step": 64, "precision": "fp32"},
            "samples": {"n": 1, "max_new_tokens": 2},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        for job in ("pretrain", "finetune"):
            patch.setattr(f"gptcli.{job}.write_report", lambda run_dir: None)
        pretrain(config, run_dir=folder / "run")
        yield folder / "run"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Pairs whose answer depends on the animal alone."""
    path = tmp_path / "rows.jsonl"
    animals = list(SOUNDS)
    lines = [{"id": i, "q": animals[i % 4], "a": SOUNDS[animals[i % 4]]} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(rows: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "name": "tuned",
        "data": {"train": str(rows), "val_fraction": 0.2, "shuffle_window": 7},
        "model": {"dropout": 0.1},
        "finetune": {
            "fields": {"prompt": "q", "response": "a"},
            "template": "{{ prompt }} {{ id }}:",
        },
        "optimizer": {"kind": "adamw", "lr": 0.003},
        "schedule": {"kind": "linear", "warmup_steps": 2},
        "training": {
            "max_steps": 12,
            "tokens_per_step": 128,
            "precision": "fp32",
            "log_every": 2,
            "eval_every": 6,
            "save_every": 5,
        },
        "samples": {"prompts": ["cat:"], "n": 1, "max_new_tokens": 2},
    }
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return Config.model_validate(values)


def outcome(run_dir: Path) -> dict[str, Any]:
    last = checkpoint.list_checkpoints(run_dir)[-1]
    metrics = [(r["event"], r["step"], r["loss"]) for r in read_metrics(run_dir)]
    run = read_run_json(run_dir)
    weights = hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()
    return {"weights": weights, "metrics": metrics, "tasks": run["tasks"], "status": run["status"]}


def test_before_and_after(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: finetuning learns nothing, or its scores are not those of before and after."""
    from gptcli.reports.report import write_report

    monkeypatch.setattr("gptcli.finetune.write_report", write_report)
    config = settings(rows, training={"max_steps": 150, "eval_every": 75, "save_every": 75})
    result = finetune(config, model=str(base), run_dir=tmp_path / "run")
    assert (result.status, result.step) == ("finished", 150)
    match, perplexity = result.tasks["exact_match"], result.tasks["response_perplexity"]
    assert match["before"] == 0.0
    assert match["after"] > 0.9
    assert perplexity["before"] > 5 * perplexity["after"]
    assert 2 < match["rows"] < 30
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["tasks"] == result.tasks
    evals = [r for r in read_metrics(tmp_path / "run") if r["event"] == "eval"]
    assert evals[0]["perplexity"] == pytest.approx(perplexity["before"], rel=1e-9)
    assert evals[-1]["perplexity"] == pytest.approx(perplexity["after"], rel=1e-9)


@pytest.mark.parametrize("task", ["classification", "multiple_choice"])
def test_a_head_alone_is_resumed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Bug: a head that learns alone goes on with other numbers than those that it began with."""
    animals, path = list(SOUNDS), tmp_path / "rows.jsonl"
    choices = [[*SOUNDS.values()][: 2 + i % 3] for i in range(40)]
    lines = [
        {"text": animals[i % 4], "label": "ab"[i % 2]}
        if task == "classification"
        else {"prompt": animals[i % 4], "choices": choices[i], "label": i % 2}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = settings(path, samples={"prompts": []}).model_copy(update={"init": str(base)})
    config = config.model_copy(update={"finetune": FinetuneConfig(task=task, method="head")})
    finetune(config, run_dir=tmp_path / "whole")
    with stopping_at("step 8"):
        assert finetune(config, run_dir=tmp_path / "parts").status == "stopped"
    monkeypatch.setattr(features, "_computed", None)  # they are in the run
    assert finetune(config, run_dir=tmp_path / "parts", resume="resume").status == "finished"
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_patience_after_a_resume(base: Path, rows: Path, tmp_path: Path) -> None:
    """Bug: a run that patience ended and that gets more steps ends at its next evaluation."""
    changes: dict[str, Any] = {
        "optimizer": {"lr": 1e-20},  # nothing gets better
        "finetune": {"patience": 2, "score_rows": 1, "max_new_tokens": 1},
        "samples": {"prompts": []},
    }
    for steps, end in ((12, 4), (20, 8)):
        config = settings(rows, **changes, training={"max_steps": steps, "eval_every": 2})
        config = config.model_copy(update={"init": str(base)})
        result = finetune(config, run_dir=tmp_path / "run", resume="auto")
        assert (result.status, result.step) == ("finished", end)
    run = read_run_json(tmp_path / "run")
    assert run["scores"]["perplexity"] == run["tasks"]["response_perplexity"]["after"]


def test_score_is_of_the_response(base: Path, rows: Path, tmp_path: Path) -> None:
    """Bug: the prompt or eot is scored, or held-out rows are trained on."""
    result = finetune(settings(rows), model=str(base), run_dir=tmp_path / "run")
    model = load_model(str(base), torch.device("cpu")).model
    held_out = result.tasks["response_perplexity"]["rows"]
    nats: dict[int, list[float]] = {}
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        prompt = [256, *f"{line['q']} {line['id']}:".encode()]
        ids = [*prompt, *line["a"].encode()]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        places = range(len(prompt), len(ids))
        nats[line["id"]] = [-logprobs[t - 1, ids[t]].item() for t in places]
    corpus = open_corpus(
        settings(rows).data, row_fields(settings(rows).finetune)
    )  # tells which rows are held out
    assert len(corpus.val_rows) == held_out
    scored = [n for _, row in corpus.val_rows for n in nats[row["id"]]]
    expected = math.exp(sum(scored) / len(scored))
    assert result.tasks["response_perplexity"]["before"] == pytest.approx(expected, rel=1e-6)


def test_resume(base: Path, rows: Path, tmp_path: Path) -> None:
    """Bug: a resumed finetuning sees other rows, or loses the scores of before."""
    config = settings(rows)
    finetune(config, model=str(base), run_dir=tmp_path / "straight")
    run_dir = tmp_path / "run"
    for number, place in enumerate(("step 4/12", "step 6/12", "saved", "step 10/12")):
        with stopping_at(place):
            result = finetune(
                config, model=str(base), run_dir=run_dir, resume="resume" if number else "no"
            )
        assert result.status == "stopped", place
        assert "after" not in result.tasks["exact_match"]
    result = finetune(config, model=str(base), run_dir=run_dir, resume="resume")
    assert result.status == "finished"
    assert outcome(run_dir) == outcome(tmp_path / "straight")


def test_stop_while_scoring(base: Path, rows: Path, tmp_path: Path) -> None:
    """Bug: a stop during the last scoring leaves a run that counts as finished without it."""
    config, run_dir = settings(rows), tmp_path / "run"
    with stopping_at("rows before finetuning"), pytest.raises(stop.Stopped):
        finetune(config, model=str(base), run_dir=tmp_path / "early")
    assert read_run_json(tmp_path / "early")["status"] == "stopped"
    with stopping_at("rows after finetuning"):
        result = finetune(config, model=str(base), run_dir=run_dir)
    assert (result.status, result.signal, result.step) == ("stopped", signal.SIGTERM, 12)
    assert "after" not in result.tasks["exact_match"]
    result = finetune(config, model=str(base), run_dir=run_dir, resume="resume")
    assert (result.status, result.step) == ("finished", 12)
    finetune(config, model=str(base), run_dir=tmp_path / "straight")
    assert outcome(run_dir) == outcome(tmp_path / "straight")
    again = finetune(config, model=str(base), run_dir=run_dir, resume="resume")
    assert (again.status, again.step) == ("finished", 12)


def test_changed_data(base: Path, rows: Path, tmp_path: Path) -> None:
    """Bug: a resume goes on over other rows."""
    with stopping_at("step 4/12"):
        finetune(settings(rows), model=str(base), run_dir=tmp_path / "run")
    with rows.open("a") as f:
        f.write('{"id": 99, "q": "cat", "a": "meow"}\n')
    with pytest.raises(CheckpointError, match=r"rows\.jsonl \(changed\)"):
        finetune(settings(rows), model=str(base), run_dir=tmp_path / "run", resume="resume")


def test_no_model(rows: Path, tmp_path: Path) -> None:
    """Bug: without a model, finetuning starts from noise."""
    for call in (
        lambda: finetune(settings(rows), run_dir=tmp_path / "run"),
        lambda: describe(settings(rows)),
    ):
        with pytest.raises(ConfigError, match="finetuning starts from a model"):
            call()
    assert not (tmp_path / "run").exists()
    with pytest.raises(CheckpointError, match="no run, checkpoint or folder at"):
        finetune(settings(rows), model=str(tmp_path / "none"), run_dir=tmp_path / "run")


def test_describe(base: Path, rows: Path) -> None:
    """Bug: --dry-run of a finetuning fails, or counts other rows than the run uses."""
    text = describe(settings(rows).model_copy(update={"init": str(base)}))
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines["rows"] == "60 (0 to train on are left out, 0 are cut)"
    assert "max_steps 12" in lines["limits"]
    wrong = settings(rows, finetune={"fields": {"prompt": "q", "response": "answer"}})
    with pytest.raises(DataError, match="no field 'answer'"):
        describe(wrong.model_copy(update={"init": str(base)}))


def test_rows_that_do_not_fit(
    base: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a row whose response is cut away gives a loss over no target, NaN."""
    long = [
        {"id": 100 + i, "q": "a question " * (1 + 9 * (i % 2)), "a": "x" * (5 + 60 * (i % 3))}
        for i in range(30)
    ]
    with rows.open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in long)
    result = finetune(settings(rows), model=str(base), run_dir=tmp_path / "run")
    assert result.status == "finished"
    assert all(r["loss"] is not None for r in read_metrics(tmp_path / "run"))
    (line,) = [line for line in caplog.messages if "training rows" in line and "cut" in line]
    config = settings(rows)
    corpus = open_corpus(config.data, fields=row_fields(config.finetune))
    kept = [record["row"] for record in corpus.train_records()]
    assert f" {sum(len(row['a']) > 60 for row in kept)} that do not fit" in line
    rows.write_text("".join(json.dumps({**row, "a": "x" * 99}) + "\n" for row in long))
    with pytest.raises(DataError, match="no training row fits"):
        finetune(settings(rows), model=str(base), run_dir=tmp_path / "none")


def test_no_row_to_train_on_fits(base: Path, rows: Path, tmp_path: Path) -> None:
    """Bug: the search for a row that fits never ends."""
    val = tmp_path / "val.jsonl"
    val.write_text(rows.read_text())
    rows.write_text('{"id": 1, "q": "cat", "a": "much longer than a block of thirty-two"}\n')
    config = settings(rows, data={"val": str(val)})
    with pytest.raises(DataError, match="no training row fits"):
        finetune(config, model=str(base), run_dir=tmp_path / "run")
    assert read_run_json(tmp_path / "run")["status"] == "failed"


BROKEN: dict[str, tuple[dict[str, Any], str, type[Exception]]] = {
    "field": (
        {"fields": {"prompt": "q", "response": "answer"}},
        r":1: no field 'answer'",
        DataError,
    ),
    "variable": ({"template": "{{ nothing }}"}, "'nothing' is undefined", DataError),
    "syntax": ({"template": "{{ prompt"}, r"finetune\.template: unexpected end", ConfigError),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rows_and_template(name: str, base: Path, rows: Path, tmp_path: Path) -> None:
    """Bug: a wrong field or template is found in the middle of training."""
    changes, message, kind = BROKEN[name]
    with pytest.raises(kind, match=message):
        finetune(settings(rows, finetune=changes), model=str(base), run_dir=tmp_path / "run")
    assert not checkpoint.list_checkpoints(tmp_path / "run")


def test_shape_comes_from_the_model(base: Path, rows: Path, tmp_path: Path) -> None:
    """Bug: the config's default shape replaces the model's, or its dropout is lost."""
    finetune(settings(rows), model=str(base), run_dir=tmp_path / "run")
    loaded = load_model(str(tmp_path / "run"), torch.device("cpu"))
    assert loaded.config.init == str(base)
    assert (loaded.config.model.n_embd, loaded.config.model.dropout) == (32, 0.1)
    assert loaded.tokenizer.kind == "bytes"
    values = settings(rows).model_dump(exclude={"model", "tokenizer"})
    values["training"]["tokens_per_step"] = 100
    config = Config.model_validate({**values, "init": str(base)})
    with pytest.raises(ConfigError, match=r"100 is not a multiple of model\.block_size 32"):
        finetune(config, run_dir=tmp_path / "unfit")
