"""What a report shows of a task: scores, labels, the worst rows, what became of rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.reports.report import write_eval_report, write_report
from gptcli.reports.task_tables import headline, row_counts, score_table, task_parts, worst_rows

TASKS: dict[str, Any] = {
    "accuracy": {
        "before": 0.5,
        "before_ci95": [0.4, 0.6],
        "after": 0.75,
        "after_ci95": [0.7, 0.8],
        "baseline": 0.625,
        "rows": 80,
    },
    "reference_perplexity": {"before": 20.0, "after": 24.5, "rows": 1},
}
TASK: dict[str, Any] = {
    "headline": "accuracy",
    "labels": ["bad", "good"],
    "confusion": [[20, 10], [10, 40]],
    "per_label": [
        {
            "label": "bad",
            "precision": 2 / 3,
            "recall": 0.5,
            "f1": 4 / 7,
            "rows": 30,
            "predicted": 30,
        }
    ],
    "worst": [
        {
            "where": "a.jsonl:3",
            "prompt": "<b>x</b>\n" + "y" * 300,
            "label": "bad",
            "predicted": "good",
            "probabilities": {"bad": 0.01, "good": 0.99},
        }
    ],
}
TASK_DATA = {
    "train": {"rows": 300, "skipped_empty": 2, "shortened": 0, "labels": {"bad": 100, "good": 198}},
    "held_out": {"rows": 80, "skipped_empty": 0, "shortened": 0, "labels": {"bad": 30, "good": 50}},
    "overlap": 4,
    "labels": ["bad", "good"],
    "class_weights": None,
}


def test_scores_before_and_after() -> None:
    """Bug: the interval is that of before, or a score is shown without what it is compared with."""
    table = score_table(TASKS)
    assert table is not None
    assert table.columns == [
        "task",
        "before",
        "after",
        "change",
        "95 % interval",
        "baseline",
        "rows",
    ]
    assert table.rows[0] == ["accuracy", "0.500", "0.750", "+0.250", "0.700 – 0.800", "0.625", "80"]
    assert table.rows[1] == ["reference_perplexity", "20.000", "24.500", "+4.500", "–", "–", "1"]
    assert score_table({}) is None


def test_scores_of_an_evaluation() -> None:
    """Bug: a model that was only evaluated is shown with empty columns before and after."""
    table = score_table({"accuracy": {"value": 0.5, "value_ci95": [0.4, 0.6], "rows": 9}})
    assert table is not None
    assert table.columns == ["task", "value", "95 % interval", "rows"]
    assert table.rows == [["accuracy", "0.500", "0.400 – 0.600", "9"]]


def test_headline() -> None:
    """Bug: the large figure is that of before the training."""
    assert headline(TASKS, TASK) == (
        "Task: accuracy",
        "0.750",
        "0.500 before, baseline 0.625, 95 % interval 0.700 – 0.800",
    )
    killed = {"accuracy": {"before": 0.5, "rows": 80}}
    assert headline(killed, TASK) == ("Task: accuracy", "0.500", "before training")
    assert headline({}, TASK) is None
    assert headline(TASKS, {}) is None


def test_worst_rows_of_each_kind() -> None:
    """Bug: the wanted answer and the given one are exchanged, or a column is empty."""
    answers = {"where": "a:1", "prompt": "p", "references": ["x", "y"], "answer": "z", "bleu": 7.25}
    table = worst_rows({"headline": "bleu", "worst": [answers]})
    assert table is not None
    assert table.columns == ["row", "prompt", "expected", "answered", "bleu"]
    assert table.rows == [["a:1", "p", "x | y", "z", "7.250"]]
    choice = {"where": "1", "prompt": "p", "label": 1, "predicted": 0, "probabilities": [0.9, 0.1]}
    table = worst_rows({"headline": "accuracy", "worst": [choice]})
    assert table is not None
    assert table.rows == [["1", "p", "1", "0", "0.100"]]
    pair = {"where": "1", "prompt": "p", "chosen": "c", "rejected": "r", "margin_nats": -1.5}
    table = worst_rows({"headline": "preference_accuracy", "worst": [pair]})
    assert table is not None
    assert table.columns[2:] == ["chosen", "rejected", "margin in nats"]
    assert table.rows == [["1", "p", "c", "r", "-1.500"]]


def test_row_counts() -> None:
    """Bug: what was skipped, and rows that are in both parts, are nowhere to be seen."""
    table = row_counts(TASK_DATA)
    assert table is not None
    assert table.columns == ["", "to train on", "held out"]
    assert ["skipped empty", "2", "0"] in table.rows
    assert ["labels", "bad 100, good 198", "bad 30, good 50"] in table.rows
    assert ["held-out rows that are also trained on", "4", ""] in table.rows
    assert all(row[0] != "shortened" for row in table.rows)


@pytest.mark.parametrize(
    "damaged",
    [
        {"headline": 3, "labels": 5, "confusion": [1], "per_label": [7], "worst": {"a": 1}},
        {"labels": ["a"], "confusion": [[1, 2]], "worst": [{"prompt": None}], "per_label": None},
        {"labels": ["a"], "confusion": [["x"]], "worst": [{"prompt": 1, "label": 9}]},
        {"worst": [{"prompt": "p", "label": 9, "probabilities": [1]}]},
    ],
)
def test_damaged_files(damaged: dict[str, Any]) -> None:
    """Bug: a run.json of another version ends in a traceback instead of a report."""
    task_parts(damaged)
    headline({"3": 3}, damaged)
    row_counts({"train": 3, "held_out": {"rows": None}, "overlap": "x"})
    score_table({"x": 3, "y": {"after": "z", "after_ci95": [1]}})


def test_pages_have_it_all(tmp_path: Path) -> None:
    """Bug: HTML or Markdown lacks a part, or takes a row's text for markup."""
    run = {"job": "finetune", "tasks": TASKS, "task": TASK, "task_data": TASK_DATA, "training": {}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    write_report(tmp_path / "run")
    write_eval_report(tmp_path / "eval", {"model": {}, "tasks": TASKS, "task": TASK})
    for directory in ("run", "eval"):
        html = (tmp_path / directory / "report.html").read_text()
        markdown = (tmp_path / directory / "report.md").read_text()
        for text in (html, markdown):
            for part in ("Confusion matrix", "Worst rows", "a.jsonl:3", "0.700 – 0.800", "forgets"):
                assert part in text, (directory, part)
        assert "<b>x" not in html
        assert "| bad | 20 | 10 |" in markdown
        assert ("held-out rows that are also trained on" in html) == (directory == "run")
        report = json.loads((tmp_path / directory / "report.json").read_text())
        assert report["tasks"] == TASKS
        assert report["task"]["confusion"] == TASK["confusion"]
