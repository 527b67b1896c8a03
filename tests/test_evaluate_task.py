"""`gpt eval --task`: scores of a finetuned model on its task, of any model on that of a config."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.schema import Config, EvalConfig
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.evaluate_task import evaluate_task
from gptcli.finetune import finetune
from gptcli.pretrain import pretrain
from gptcli.runs.run_dir import read_run_json

pytest.importorskip("sklearn")

WORDS = {"good": "positive", "fine": "positive", "bad": "negative", "sad": "negative"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pretrained run, rows, and runs finetuned on them with a head and to answer.
    Reports are left out of runs that nobody looks at."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text("".join(f"a {w} film is {s}\n" for w, s in WORDS.items()) * 9)
    lines = [
        {"text": f"a {word} film {i}", "label": label, "id": f"{word}{i}"}
        for i, (word, label) in enumerate(list(WORDS.items()) * 15)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = {
        "name": "base",
        "tokenizer": {"kind": "bytes"},
        "data": {"train": str(folder / "book.txt"), "val_fraction": 0.1},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64},
        "schedule": {"warmup_steps": 0},
        "training": {"max_steps": 3, "tokens_per_step": 64, "precision": "fp32"},
        "samples": {"n": 1, "max_new_tokens": 2},
    }
    with pytest.MonkeyPatch.context() as patch:
        for job in ("pretrain", "finetune"):
            patch.setattr(f"gptcli.{job}.write_report", lambda run_dir: None)
        pretrain(Config.model_validate(base), run_dir=folder / "base")
        for name, task in (("head", HEAD), ("answers", ANSWERS)):
            config = task_config(folder, task)
            finetune(config, model=str(folder / "base"), run_dir=folder / name)
    return folder


HEAD = {"task": "classification"}
ANSWERS = {
    "task": "completion",
    "fields": {"prompt": "text", "response": "label"},
    "template": "{{ prompt }}: ",
    "max_new_tokens": 10,
    "score_rows": 5,
}


def task_config(folder: Path, task: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "name": "tuned",
            "data": {"train": str(folder / "rows.jsonl"), "val_fraction": 0.3},
            "finetune": task,
            "optimizer": {"kind": "adamw", "lr": 0.003},
            "schedule": {"warmup_steps": 0},
            "training": {"max_steps": 4, "tokens_per_step": 128, "precision": "fp32"},
            "samples": {"n": 1, "max_new_tokens": 2},
        }
    )


@pytest.mark.parametrize("name", ["head", "answers"])
def test_own_task(runs: Path, name: str) -> None:
    """Bug: other rows, labels in another order or another checkpoint are scored than the run's."""
    found = evaluate_task(None, model=str(runs / name))
    run = read_run_json(runs / name)
    for score, entry in found.report["tasks"].items():
        own = run["tasks"][score]
        assert (entry["value"], entry["rows"]) == (pytest.approx(own["after"]), own["rows"])
        assert entry["value_ci95"] == pytest.approx(own["after_ci95"])
    assert json.loads(json.dumps(found.report["task"])) == run["task"]
    assert found.directory is not None
    assert found.directory.parent == runs / name / "evals"
    lines = (found.directory / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == run["tasks"][found.report["task"]["headline"]]["rows"]
    assert json.loads((found.directory / "report.json").read_text())["tasks"]


def test_named_rows(runs: Path, tmp_path: Path) -> None:
    """Bug: --data is split, so that only some of its rows are scored."""
    rows = tmp_path / "new.jsonl"
    rows.write_text('{"text": "a fine day", "label": "positive"}\n' * 7)
    found = evaluate_task(None, model=str(runs / "head"), data=[str(rows)])
    assert found.report["tasks"]["accuracy"]["rows"] == 7
    assert found.report["task"]["labels"] == ["negative", "positive"]
    rows.write_text('{"text": "a fine day", "label": "neutral"}\n')
    with pytest.raises(DataError, match="unknown label 'neutral'"):
        evaluate_task(None, model=str(runs / "head"), data=[str(rows)])
    rows.write_text(json.dumps({"text": "x", "label": "y" * 99}) + "\n")
    with pytest.raises(DataError, match="fits the model's block_size"):
        evaluate_task(None, model=str(runs / "answers"), data=[str(rows)])


def test_rows_of_the_config(runs: Path, tmp_path: Path) -> None:
    """Bug: eval.data of CONFIG is ignored with --task, or two CONFIGs of a task share a report."""
    rows = tmp_path / "new.jsonl"
    rows.write_text('{"text": "a fine day", "label": "positive"}\n' * 7)
    config = task_config(runs, HEAD)
    model = str(runs / "head")
    section = EvalConfig.model_validate({"data": str(rows)})
    found = evaluate_task(config.model_copy(update={"eval": section}), model=model)
    assert found.report["tasks"]["accuracy"]["rows"] == 7
    fewer = evaluate_task(task_config(runs, HEAD | {"score_rows": 2}), model=model)
    assert fewer.directory != evaluate_task(config, model=model).directory


def test_a_model_that_was_not_finetuned(runs: Path) -> None:
    """Bug: nobody can tell what a model could do before it was finetuned."""
    config = task_config(runs, HEAD | {"head": False})
    found = evaluate_task(config, model=str(runs / "base"), run_dir=runs / "zero")
    assert 0 <= found.report["tasks"]["accuracy"]["value"] <= 1
    assert sum(map(sum, found.report["task"]["confusion"])) == found.report["task"]["rows"]
    with pytest.raises(ConfigError, match="was not finetuned"):
        evaluate_task(None, model=str(runs / "base"))
    with pytest.raises(ConfigError, match="no task head"):
        evaluate_task(task_config(runs, HEAD), model=str(runs / "base"))
    data = [str(runs / "rows.jsonl")]
    with pytest.raises(ConfigError, match="labels are not known"):
        evaluate_task(config, model=str(runs / "base"), data=data)


def test_shots(runs: Path, gpt: Any) -> None:
    """Bug: examples are not read, not told of, or given to a head; or training ignores them."""
    base, config = str(runs / "base"), runs / "shots.yaml"
    data = {"train": str(runs / "rows.jsonl"), "val_fraction": 0.3}
    config.write_text(json.dumps({"data": data, "finetune": {**ANSWERS, "max_new_tokens": 2}}))
    flags = ["eval", str(config), "--task", "--model", base, "--json"]
    code, out, _ = gpt(*flags, "--run-dir", str(runs / "none"), "--shots", "0")
    assert (code, "shots" in json.loads(out)["data"]["eval"]) == (0, False)
    alone = json.loads(out)["scores"]
    code, out, err = gpt(*flags, "--run-dir", str(runs / "two"), "--shots", "2")
    told = json.loads(out)["data"]["eval"]
    assert (code, told["shots"], told["rows_with_fewer_shots"]) == (0, 2, 5)  # one fits 64 bytes
    assert told["mean_shots"] == 1.0
    assert "5 of 5 rows have fewer than 2 examples" in err
    scores = json.loads(out)["scores"]
    assert scores["tokens"] == alone["tokens"]  # of the responses alone
    assert scores["loss"] != pytest.approx(alone["loss"], abs=1e-6)
    rows = ["--data", str(runs / "rows.jsonl"), "--run-dir", str(runs / "named")]
    code, out, _ = gpt(*flags, *rows, "--shots", "1")
    assert (code, json.loads(out)["data"]["eval"]["mean_shots"]) == (0, 1.0)
    code, _, err = gpt("eval", "--task", "--model", str(runs / "head"), "--shots", "2")
    assert (code, "a task head reads one row" in err) == (2, True)
    with pytest.raises(ConfigError, match=r"finetune\.shots is for gpt eval"):
        finetune(task_config(runs, {**ANSWERS, "shots": 1}), model=base, run_dir=runs / "no")


def test_changed_data(runs: Path, tmp_path: Path) -> None:
    """Bug: rows that were trained on are scored as held out, after the file has changed."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((runs / "rows.jsonl").read_text())
    config = task_config(tmp_path, ANSWERS | {"score_rows": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptcli.finetune.write_report", lambda run_dir: None)
        finetune(config, model=str(runs / "base"), run_dir=tmp_path / "run")
    rows.write_text(rows.read_text() + '{"text": "new", "label": "positive"}\n')
    with pytest.raises(CheckpointError, match="changed since training"):
        evaluate_task(None, model=str(tmp_path / "run"))


def test_command(runs: Path, gpt: Any) -> None:
    """Bug: the command shows no scores, or takes flags that do nothing."""
    model = str(runs / "head")
    code, out, _ = gpt("eval", "--task", "--model", model)
    assert code == 0
    assert out.splitlines()[1].split()[0] == "accuracy"
    assert "label, predicted as:" in out
    code, out, _ = gpt("eval", "--task", "--model", model, "--json")
    assert code == 0
    assert json.loads(out)["task"]["headline"] == "accuracy"
    for flags in (["--stride", "4"], ["--max-tokens", "9"], ["--quantize", "int8"]):
        code, _, err = gpt("eval", "--task", "--model", model, *flags)
        assert (code, f"{flags[0]} is not for --task, but for text" in err) == (2, True)
    code, _, err = gpt("eval", "--allow-code-execution", "--model", model)
    assert (code, "--task" in err) == (2, True)
