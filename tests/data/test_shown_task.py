"""Rows of finetuning tasks as `gpt data show` has them: every text, its mask, its label."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli.data_command import rows_text
from gptcli.config.schema import Config
from gptcli.data.corpus import open_corpus
from gptcli.data.shown_task import show_task_rows, task_facts
from gptcli.data.task_data import open_task
from gptcli.data.task_formats import row_fields
from gptcli.data.tokenizer import Tokenizer
from gptcli.inspect_data import DataRows
from gptcli.reports.data_page import rows_html

PAIR = {"text1": "ab", "text2": "c", "label": "yes"}
OTHER = {"text1": "d", "text2": "e", "label": "no"}
CHOICE = {"prompt": "p", "choices": ["x", "yy"], "label": 1}


def shown(folder: Path, rows: list[dict[str, Any]], **finetune: Any) -> DataRows:
    """The first row of an epoch in file order."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), "val": str(path), "cache": "off"}
    config = Config.model_validate({"data": data, "finetune": finetune})
    corpus = open_corpus(config.data, row_fields(config.finetune))
    task = open_task(config, Tokenizer.of_bytes(), corpus, block_size=16)
    return DataRows(show_task_rows(task, task.rows(1, 0).take(1)), 0, 16, task_facts(task))


def lines(rows: DataRows) -> list[str]:
    """The rows as printed: of each its heading and its tokens."""
    text = rows_text(rows, 200, False)
    return [line for line in text[text.index("row 0") :].splitlines() if line]


@pytest.mark.parametrize(
    ("rows", "finetune", "expected"),
    [
        (
            [PAIR, OTHER],
            {"task": "pairs", "pair_order": "both"},
            [
                "row 0, order 0: 5 of 16 targets with loss, 2 eot tokens, label yes",
                "[   0] ¦⟨eot⟩|a|b|\\n|",
                "[   4] |c|⟨eot⟩|",
                "row 0, order 1: 5 of 16 targets with loss, 2 eot tokens, label yes",
                "[   0] ¦⟨eot⟩|c|\\n|",
                "[   3] |a|b|⟨eot⟩|",
            ],
        ),
        (
            [CHOICE],
            {"task": "multiple_choice", "method": "head"},
            [
                "row 0, choice 0: 0 of 16 targets with loss, 2 eot tokens, 1 padding,"
                " label choice 1",
                "[   0] ¦⟨eot⟩¦p¦\\n|",
                "[   3] ¦x¦⟨eot⟩|",
                "       ⟨padding⟩ x 1",
                "row 0, choice 1: 0 of 16 targets with loss, 2 eot tokens, label choice 1",
                "[   0] ¦⟨eot⟩¦p¦\\n|",
                "[   3] ¦y¦y¦⟨eot⟩|",
            ],
        ),
        (
            [{"prompt": "ab", "chosen": "xy", "rejected": "z"}],
            {"task": "preference"},
            [
                "row 0, chosen: 3 of 16 targets with loss, 2 eot tokens",
                "[   0] ¦⟨eot⟩¦a¦b|x|y|⟨eot⟩|",
                "row 0, rejected: 2 of 16 targets with loss, 2 eot tokens, 1 padding",
                "[   0] ¦⟨eot⟩¦a¦b|z|⟨eot⟩|",
                "       ⟨padding⟩ x 1",
            ],
        ),
        (
            [{"prompt": "a", "response": "x"}, {"prompt": "b", "response": "y"}],
            {"task": "completion"},
            [
                "row 0: 4 of 16 targets with loss, 4 eot tokens, 2 segments",
                "[   0] ¦⟨eot⟩¦a|x|⟨eot⟩|",
                "[   0] ¦⟨eot⟩¦b|y|⟨eot⟩|",
            ],
        ),
    ],
    ids=["pairs", "choice", "preference", "packed"],
)
def test_masks_and_labels_are_shown(
    tmp_path: Path, rows: list[dict[str, Any]], finetune: dict[str, Any], expected: list[str]
):
    """Guards against a display that is not what is trained on, and texts of an example that cannot
    be told apart. Expectations by hand; | before a token says that it has loss."""
    found = shown(tmp_path, rows, **finetune)
    assert lines(found) == expected
    page = rows_html(found.rows, found.step, found.block_size, found.facts)
    for row in found.rows:
        assert (row.name.capitalize() or "Row 0") in page
