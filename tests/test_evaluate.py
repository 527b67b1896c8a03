"""Evaluation of a run on its own validation part and on other text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.data.scan import Document
from gptcli.device import resolve_device
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.evaluate import evaluate
from gptcli.evaluate_lm_eval import evaluate_lm_eval
from gptcli.evaluate_memorization import evaluate_memorization
from gptcli.evaluate_pairs import evaluate_pairs
from gptcli.evaluate_task import evaluate_task
from gptcli.evaluation.perplexity import encode_documents, perplexity
from gptcli.finetune import finetune
from gptcli.pretrain import pretrain
from gptcli.runs import checkpoint
from gptcli.runs.load import load_model
from gptcli.runs.metrics import read_metrics

TEXT = "Ein anderer Text, größer als ein Block: 漢字 und 🙂.\nZweite Zeile.\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best checkpoint is not its last: the rate at the end is far too large."""
    folder = tmp_path_factory.mktemp("run")
    book = folder / "book.txt"
    book.write_text("".join(f"{i} lines of a book\n" for i in range(40)))
    config = Config.model_validate(
        {
            "name": "trained",
            "tokenizer": {"kind": "bytes"},
            "data": {"train": str(book), "val_fraction": 0.1},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
            "optimizer": {"kind": "adamw", "lr": 2.0},
            "schedule": {"kind": "constant", "warmup_steps": 20},
            "training": {
                "max_steps": 20,
                "tokens_per_step": 64,
                "eval_every": 5,
                "precision": "fp32",
            },
            "samples": {"n": 1, "max_new_tokens": 2},
            "eval": {"stride": 4},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)
        pretrain(config, run_dir=folder / "run")
    return folder / "run"


def settings(**values: Any) -> Config:
    return Config.model_validate({"eval": values})


def test_own_validation_part(trained: Path) -> None:
    """Bug: gpt eval scores other text, or another checkpoint, than the run reported."""
    best = checkpoint.read_best(trained)
    assert best is not None
    assert best[0] < 20
    result = evaluate(settings(stride=4), model=str(trained))
    assert result.scores.loss == pytest.approx(best[1], abs=1e-9)
    assert result.report["model"]["step"] == best[0]
    line = next(r for r in read_metrics(trained) if (r["event"], r["step"]) == ("eval", best[0]))
    assert result.scores.bits_per_byte == pytest.approx(line["bits_per_byte"], abs=1e-9)
    assert result.directory is not None
    assert result.directory.parent == trained / "evals"
    assert result.directory.name.startswith("validation")
    written = json.loads((result.directory / "report.json").read_text())
    assert written["scores"]["loss"] == result.scores.loss
    assert written["scores"]["stride"] == 4
    last = evaluate(settings(stride=4), model=str(checkpoint.checkpoint_dir(trained, 20)))
    assert last.scores.loss > best[1]


@pytest.mark.parametrize("stride", [None, 3])
def test_file(trained: Path, stride: int | None, tmp_path: Path) -> None:
    """Bug: the job scores a text otherwise than the function that defines perplexity."""
    path = tmp_path / "anderer text.txt"
    path.write_text(TEXT)
    result = evaluate(settings(stride=stride), model=str(trained), data=[str(path)])
    loaded = load_model(str(trained), torch.device("cpu"))
    encoded = encode_documents([Document("", TEXT)], loaded.tokenizer)
    direct = perplexity(loaded.model, encoded, resolve_device("cpu"), stride=stride)
    assert result.scores.loss == pytest.approx(direct.loss, abs=1e-9)
    assert result.scores.bits_per_byte == pytest.approx(direct.bits_per_byte, abs=1e-9)
    assert result.scores.tokens == result.scores.bytes == len(TEXT.encode())
    assert result.report["scores"]["documents"] == 1
    assert result.directory is not None
    assert result.directory.name.startswith("anderer-text.txt")


def test_sources_of_the_config(trained: Path, tmp_path: Path) -> None:
    """Bug: eval.data or eval.model of the YAML is ignored, or wins over the flags."""
    (tmp_path / "a.txt").write_text(TEXT)
    rows = tmp_path / "b.jsonl"
    rows.write_text(json.dumps({"body": "one"}) + "\n" + json.dumps({"body": "two"}) + "\n")
    source = {"path": str(rows), "text_field": "body"}
    config = settings(model=str(trained), data=[source, str(tmp_path / "a.txt")])
    result = evaluate(config, run_dir=tmp_path / "out")
    assert (result.scores.documents, result.scores.tokens) == (3, 6 + len(TEXT.encode()))
    assert result.directory == tmp_path / "out"
    assert (tmp_path / "out" / "report.html").exists()
    other = evaluate(config, data=[str(tmp_path / "a.txt")], run_dir=tmp_path / "out")
    assert other.scores.documents == 1
    few = evaluate(settings(max_tokens=7), model=str(trained), data=[str(tmp_path / "a.txt")])
    assert few.scores.tokens == 7


def test_reports_of_two_texts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: files of one name in two directories, or read in two ways, share a report."""
    folders = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("text.txt").write_text(TEXT)
        Path("pairs.jsonl").write_text('{"a": "abc", "b": "abd"}\n')
        folders.append(evaluate(settings(), model=str(trained), data=["text.txt"]).directory)
        pairs = evaluate_pairs(settings(), Path("pairs.jsonl"), model=str(trained))
        folders.append(pairs.directory)
    by_line = settings(data=[{"path": "text.txt", "document": "line"}])
    folders.append(evaluate(by_line, model=str(trained)).directory)
    assert len(set(folders)) == 5


def test_a_run_keeps_its_own_report(trained: Path, tmp_path: Path) -> None:
    """Bug: --run-dir RUN replaces the report of the training, or a file there loses the scores."""
    for job in (
        lambda out: evaluate(settings(), model=str(trained), run_dir=out),
        lambda out: evaluate_pairs(settings(), tmp_path / "p", model=str(trained), run_dir=out),
        lambda out: evaluate_memorization(settings(), model=str(trained), run_dir=out),
        lambda out: evaluate_task(settings(), model=str(trained), run_dir=out),
        lambda out: evaluate_lm_eval(settings(), ["x"], model=str(trained), run_dir=out),
    ):
        with pytest.raises(ConfigError, match="is a training run"):
            job(trained)
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="is not a directory"):
            job(tmp_path / "file")


def test_keys_of_eval_that_a_way_does_not_take(trained: Path, tmp_path: Path, gpt: Any) -> None:
    """Bug: eval.data or eval.quantize of CONFIG is ignored without a word beside --pairs."""
    (tmp_path / "p.jsonl").write_text('{"a": "abc", "b": "abd"}\n')
    config = tmp_path / "c.yaml"
    flags = ["eval", str(config), "--model", str(trained)]
    pairs = ["--pairs", str(tmp_path / "p.jsonl")]
    for key, value in (("data", "a.txt"), ("quantize", "int8")):
        config.write_text(f"eval: {{{key}: {value}}}\n")
        code, _, err = gpt(*flags, *pairs)
        assert (code, f"eval.{key} is not for --pairs, but for text" in err) == (2, True)
    config.write_text("eval: {stride: 4, max_tokens: 9}\n")  # a training's too
    code, _, err = gpt(*flags, *pairs)
    assert code == 0
    assert "eval.stride is not for --pairs, but for text: it changes nothing here" in err
    assert "eval.max_tokens is not for --pairs" in err
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 9)
    config.write_text(f"eval: {{data: {text}}}\n")
    code, out, _ = gpt(*flags, "--memorization", "--json")
    assert (code, json.loads(out)["memorization"]["text"]) == (0, str(text))


def test_copied_checkpoint(trained: Path, tmp_path: Path) -> None:
    """Bug: a checkpoint that was copied elsewhere cannot be scored, or writes beside itself."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.checkpoint_dir(trained, 20), copy)
    (tmp_path / "a.txt").write_text(TEXT)
    result = evaluate(settings(), model=str(copy), data=[str(tmp_path / "a.txt")])
    assert result.directory is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "copy"]
    assert evaluate(settings(), model=str(copy)).report["data"]["eval"]["source"] == "validation"


def test_changed_data(trained: Path) -> None:
    """Bug: after an edit of the corpus, training text is scored as if it were held out."""
    book = trained.parent / "book.txt"
    before = book.read_text()
    try:
        book.write_text(before + "another line\n")
        with pytest.raises(CheckpointError, match="have changed since training") as caught:
            evaluate(settings(), model=str(trained))
        assert caught.value.exit_code == 4
        book.unlink()
        with pytest.raises(DataError, match="no such file"):
            evaluate(settings(), model=str(trained))
    finally:
        book.write_text(before)


def test_what_cannot_be_evaluated(trained: Path, tmp_path: Path) -> None:
    """Bug: an impossible wish ends in a traceback, or with a report of nothing."""
    with pytest.raises(ConfigError, match="17 is above the model's block_size 16"):
        evaluate(settings(stride=17), model=str(trained))
    with pytest.raises(DataError, match="no such file"):
        evaluate(settings(), model=str(trained), data=[str(tmp_path / "none.txt")])
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no text in"):
        evaluate(settings(), model=str(trained), data=[str(tmp_path / "blank.txt")])
    with pytest.raises(ConfigError, match="is not a directory"):
        evaluate(settings(), model=str(trained), run_dir=tmp_path / "blank.txt" / "below")
    stop.request(2)
    with pytest.raises(stop.Stopped):
        evaluate(settings(), model=str(trained))


def test_finetuned_model(trained: Path, tmp_path: Path) -> None:
    """Bug: rows of pairs are read as text, and the user sees an error about fields."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": str(i), "response": "x"}) + "\n" for i in range(30))
    )
    config = Config.model_validate(
        {
            "name": "tuned",
            "data": {"train": str(rows), "val_fraction": 0.2},
            "schedule": {"warmup_steps": 0},
            "training": {"max_steps": 1, "tokens_per_step": 128},
            "samples": {"n": 1, "max_new_tokens": 1},
        }
    )
    finetune(config, model=str(trained), run_dir=tmp_path / "run")
    best = checkpoint.read_best(tmp_path / "run")
    assert best is not None
    own = evaluate(settings(), model=str(tmp_path / "run"))
    assert own.scores.loss == pytest.approx(best[1], abs=1e-9)
    with pytest.raises(ConfigError, match="finetuned on rows"):
        evaluate(settings(max_tokens=3), model=str(tmp_path / "run"))
    (tmp_path / "a.txt").write_text(TEXT)
    assert evaluate(settings(), model=str(tmp_path / "run"), data=[str(tmp_path / "a.txt")])
