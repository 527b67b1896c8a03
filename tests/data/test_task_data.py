"""What is known of a task's rows before training: labels, limits, weights, overlap, errors."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.schema import Config
from gptcli.data.corpus import open_corpus
from gptcli.data.examples import HeadExample, PreferencePair
from gptcli.data.task_data import TaskData, open_task
from gptcli.data.task_formats import row_fields
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError

BYTES = Tokenizer.of_bytes()


def opened(
    folder: Path,
    train: list[dict[str, Any]],
    val: list[dict[str, Any]] | None = None,
    labels: list[str] | None = None,
    block_size: int = 64,
    **finetune: Any,
) -> TaskData:
    """The task of these rows, in files of `folder`."""
    for name, rows in (("train", train), ("val", val if val is not None else train[:2])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    data = {
        "train": str(folder / "train.jsonl"),
        "val": str(folder / "val.jsonl"),
        "cache": "off",
    }
    config = Config.model_validate({"data": data, "finetune": finetune})
    corpus = open_corpus(config.data, row_fields(config.finetune))
    return open_task(config, BYTES, corpus, block_size=block_size, labels=labels)


def labelled(counts: dict[Any, int]) -> list[dict[str, Any]]:
    return [
        {"text": f"{label} {i}", "label": label}
        for label, count in counts.items()
        for i in range(count)
    ]


def trained_texts(task: TaskData) -> list[str]:
    """The texts of one epoch of a task with a head."""
    rows = task.rows(1, 1000).take(task.counts.rows)
    assert rows.ends is not None
    ends = rows.ends[:, 0].tolist()
    texts = zip(rows.inputs[:, 0].tolist(), ends, strict=True)
    return [bytes(line[1:end]).decode() for line, end in texts]


def test_labels_are_those_of_the_training_rows_in_order(tmp_path: Path):
    """Guards against label numbers that depend on the order of rows, sort 10 before 9, or change
    when a run goes on."""
    task = opened(tmp_path, labelled({10: 3, 9: 2, "b": 1, "a": 1}), task="classification")
    assert task.labels == ["9", "10", "a", "b"]
    assert task.counts.labels == {"9": 2, "10": 3, "a": 1, "b": 1}
    held_out = task.held_out[0]
    assert isinstance(held_out, HeadExample)
    assert task.labels[held_out.label] == "10"
    kept = opened(tmp_path, labelled({"a": 2, "b": 1}), labels=["b", "a"], task="classification")
    assert kept.labels == ["b", "a"]


def test_labels_of_the_parts_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Guards against a held-out label that nothing was learned of, and one that no score tells
    anything about."""
    val = labelled({"a": 1, "c": 1})
    with pytest.raises(DataError, match=r"val\.jsonl:2: unknown label 'c' \(known: a, b\)"):
        opened(tmp_path, labelled({"a": 2, "b": 2}), val, task="classification")
    with caplog.at_level(logging.WARNING, "gptcli"):
        opened(tmp_path, labelled({"a": 2, "b": 2}), val[:1], task="classification")
        given = ["a", "b", "c"]
        opened(tmp_path, labelled({"a": 2, "b": 2}), val, labels=given, task="classification")
    assert "no held-out row has the label 'b'" in caplog.messages
    assert "no training row has the label 'c'" in caplog.messages
    known = ["a", "x"]
    with pytest.raises(DataError, match=r"train\.jsonl:3: unknown label 'b' \(known: a, x\)"):
        opened(tmp_path, labelled({"a": 2, "b": 2}), val[:1], labels=known, task="classification")
    with pytest.raises(DataError, match="all training rows have the label 'a'"):
        opened(tmp_path, labelled({"a": 3}), task="classification")


@pytest.mark.parametrize("most", [1, 3, 50])
def test_rows_per_label_are_limited_alike_in_every_run(tmp_path: Path, most: int):
    """Guards against a limit by the order of the file, rows that change at a resume, and counts
    that do not tell."""
    rows = labelled({"a": 40, "b": 5})
    config: dict[str, Any] = {"task": "classification", "max_train_rows_per_label": most}
    task = opened(tmp_path, rows, **config)
    assert task.counts.labels == {"a": min(most, 40), "b": min(most, 5)}
    assert task.counts.capped == 45 - sum(task.counts.labels.values())
    texts = trained_texts(task)
    assert len(set(texts)) == len(texts) == task.counts.rows
    assert sum(text.startswith("a") for text in texts) == min(most, 40)
    turned = opened(tmp_path, rows[::-1], **config)
    assert sorted(trained_texts(turned)) == sorted(texts)
    source = task.rows(1, 1000)
    source.take(len(texts))
    assert 0.99 < source.epochs <= 1.0
    if most == 3:
        assert sorted(texts)[:3] != ["a 0", "a 1", "a 2"]


def test_class_weights_balance(tmp_path: Path):
    """Guards against weights that favour the larger class. Oracle: scikit-learn's rule
    n / (k n_label)."""
    task = opened(
        tmp_path, labelled({"a": 6, "b": 2}), task="classification", class_weights="balanced"
    )
    assert task.class_weights == pytest.approx([8 / (2 * 6), 8 / (2 * 2)])
    assert opened(tmp_path, labelled({"a": 6, "b": 2}), task="classification").class_weights is None


def test_overlap_is_found_whatever_the_case_and_blanks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Guards against scores on rows that were trained on, without a word."""
    train = [{"prompt": f"p {i}", "response": f"R{i}"} for i in range(9)]
    val = [
        {"prompt": " P  3", "response": "r3"},
        {"prompt": "p 3", "response": "another answer"},
        {"prompt": "p 4\n", "response": "R4"},
        {"prompt": "new", "response": "R4"},
    ]
    with caplog.at_level(logging.WARNING, "gptcli"):
        assert opened(tmp_path, train, val).overlap == 2
    assert any(
        line.startswith("2 of 4 held-out rows are training rows") for line in caplog.messages
    )
    texts = labelled({"a": 3, "b": 3})
    turned = [{"text": "A 1", "label": "b"}, {"text": "a 9", "label": "a"}]
    assert opened(tmp_path, texts, turned, task="classification").overlap == 1
    assert opened(tmp_path, train, val[3:]).overlap == 0


def test_what_is_left_out_is_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Guards against rows that vanish without a word, and facts that JSON cannot hold."""
    rows = [
        {"prompt": "p", "response": response}
        for response in ("fine", "", "x" * 99, "fine", "  ", "fine too")
    ] + [{"prompt": "long" * 30, "response": "cut"}]
    with caplog.at_level(logging.WARNING, "gptcli"):
        task = opened(tmp_path, rows, rows[:1])
    facts = json.loads(json.dumps(task.facts()))
    assert facts["train"]["rows"] == 7
    assert (facts["train"]["skipped_empty"], facts["train"]["skipped_long"]) == (2, 1)
    assert facts["train"]["shortened"] == 1
    assert facts["held_out"]["rows"] == 1
    (line,) = [line for line in caplog.messages if "training rows" in line and "cut" in line]
    assert line == (
        "of 7 training rows, 2 with an empty text or response and 1 that do not fit are left out;"
        " 1 are cut"
    )


@pytest.mark.parametrize("part", ["training", "held-out"])
def test_nothing_that_fits_is_refused(tmp_path: Path, part: str):
    """Guards against a run without a row, and scores of no rows, which are not numbers."""
    good, bad = [{"prompt": "p", "response": "r"}], [{"prompt": "p", "response": "x" * 99}]
    train, val = (bad, good) if part == "training" else (good, bad)
    with pytest.raises(
        DataError, match=f"no {part} row fits: of 1, 0 have an empty text"
    ) as caught:
        opened(tmp_path, train, val)
    assert "1 are longer than block_size 64" in caught.value.message


def test_a_row_that_fills_no_template_is_named_by_line(tmp_path: Path):
    """Guards against a byte offset where people count lines."""
    rows: list[dict[str, Any]] = [{"prompt": "p", "response": "r", "topic": "t"}] * 3
    rows.append({"prompt": "p", "response": "r"})
    with pytest.raises(DataError, match=r"train\.jsonl:4: finetune\.template: 'topic' is undef"):
        opened(tmp_path, rows, rows[:1], template="{{ topic }}: {{ prompt }}")
    with pytest.raises(DataError, match=r"val\.jsonl:4: finetune\.template: 'topic' is undef"):
        opened(tmp_path, rows[:3], rows, template="{{ topic }}: {{ prompt }}")


def test_all_training_pairs_come_in_file_order(tmp_path: Path):
    """Guards against a pair whose reference probabilities are never computed."""
    rows = [{"prompt": str(i), "chosen": "good", "rejected": "bad"} for i in range(7)]
    rows.insert(3, {"prompt": "x", "chosen": "good", "rejected": ""})
    task = opened(tmp_path, rows, task="preference")
    pairs = list(task.examples())
    assert [pair.chosen.prompt_text for pair in pairs] == [str(i) for i in range(7)]
    rows_of = task.rows(1, 100).take(7)
    assert rows_of.labels is not None
    assert sorted(rows_of.labels.tolist()) == sorted(pair.key for pair in pairs)
    assert isinstance(task.held_out[0], PreferencePair)
    assert task.counts.skipped_empty == 1


def test_bad_rows_may_be_skipped(tmp_path: Path):
    """Guards against structures that `on_bad_row: skip` does not reach."""
    rows: list[dict[str, Any]] = [{"messages": ["a", f"b{i}"]} for i in range(300)]
    rows[5] = {"messages": [{"speaker": "a", "text": "b"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for on_bad_row in ("error", "skip"):
        source = {"path": str(path), "on_bad_row": on_bad_row}
        config = Config.model_validate(
            {"data": {"train": source, "cache": "off"}, "finetune": {"task": "chat"}}
        )
        if on_bad_row == "error":
            with pytest.raises(DataError, match=r"rows\.jsonl:6: field 'messages' is no convers"):
                open_corpus(config.data, row_fields(config.finetune))
            continue
        corpus = open_corpus(config.data, row_fields(config.finetune))
        assert corpus.problems.skipped_rows == {str(path): 1}
        task = open_task(config, BYTES, corpus, block_size=64)
        assert task.counts.rows + len(task.held_out) == 299
