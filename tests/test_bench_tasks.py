"""scripts/bench_tasks.py: its split, its baseline, its lines."""

import hashlib
import importlib
import json
from types import ModuleType

import pytest

from gptcli.config.finetune_schema import FinetuneConfig


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("bench_tasks")


def rows() -> list[dict[str, str]]:
    """Each text twice, the second time with the other label; three of four are good."""
    kinds = [("good", "positive")] * 3 + [("bad", "negative")]
    once = [{"text": f"{kinds[i % 4][0]} number {i}", "label": kinds[i % 4][1]} for i in range(80)]
    return [row for first in once for row in (first, {**first, "label": "other"})]


def test_split(script) -> None:
    """Bug: a text is both learned and asked, or the test rows depend on the shuffle."""
    found = script.split(rows(), FinetuneConfig(task="classification"))
    assert [row["text"].split()[-1] for row in found.test] == [str(n) for n in range(9, 80, 10)]
    texts = [row["text"] for row in [*found.train, *found.test]]
    assert len(texts) == len(set(texts)) == 80
    assert "other" not in {row["label"] for row in found.train}
    numbers = [int(row["text"].split()[-1]) for row in found.train]
    assert numbers != sorted(numbers)


@pytest.mark.parametrize("chinese", [False, True])
def test_baseline(script, chinese: bool) -> None:
    """Bug: the baseline is learned from the test rows' labels, or is no better than guessing."""
    pytest.importorskip("sklearn")
    settings = FinetuneConfig(task="classification")
    found = script.split(rows(), settings)
    base = script.baseline(found, settings, chinese=chinese)
    assert base.regression == 1.0
    good = sum(row["label"] == "positive" for row in found.test)
    assert base.majority == good / len(found.test)
    assert script.baseline(found, FinetuneConfig(task="text"), chinese=False) is None


def test_a_run_that_has_ended_is_read(script, tmp_path) -> None:
    """Bug: scores of an hour's run are computed again, or shown in each other's columns."""
    pytest.importorskip("sklearn")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    run = {"before": 0.5, "after": 0.7, "before_ci95": [0.4, 0.6], "after_ci95": [0.6, 0.8]}
    test = {"value": 0.9, "value_ci95": [0.8, 1.0]}
    for name, entry in (("", run), ("-test", test)):
        about = json.dumps([str(data), "runs/model", []]).encode()
        key = hashlib.sha256(about).hexdigest()[:8]
        ended = tmp_path / f"sentiment-en-model-full-{key}{name}"
        ended.mkdir()
        (ended / "report.json").write_text(json.dumps({"tasks": {"accuracy": entry, "f1": entry}}))
    lines = script.case("sentiment-en", data, "runs/model", tmp_path, [])
    told = ["0.500 (0.400 to 0.600)", "0.900 (0.800 to 1.000)"]
    about = ["sentiment-en", "data.jsonl", "model", "full"]
    assert lines[0] == [*about, "accuracy", *told, "1.000", "0.500"]
    assert lines[1] == [*about, "f1", *told, "", ""]
    assert len(lines[0]) == len(script.HEAD)
