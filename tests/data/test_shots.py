"""Examples before the rows that are scored: which, how many, and as what text."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.data_schema import DataConfig
from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.data.corpus import open_corpus
from gptcli.data.examples import Example, PreferencePair
from gptcli.data.shots import ShotEncoder, shots_of
from gptcli.data.task_formats import row_fields
from gptcli.data.tokenizer import Tokenizer

BYTES = Tokenizer.of_bytes()


def encoder(
    folder: Path,
    rows: list[dict[str, Any]],
    block_size: int = 200,
    seed: int = 0,
    labels: tuple[str, ...] = (),
    **settings: Any,
) -> ShotEncoder:
    """With the training rows `rows`, and one that is held out."""
    train, val = folder / "train.jsonl", folder / "val.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    val.write_text(json.dumps(rows[0]) + "\n")
    config = FinetuneConfig.model_validate({"max_new_tokens": 1, "shots": 2, **settings})
    data = DataConfig.model_validate({"train": str(train), "val": str(val)})
    corpus = open_corpus(data, row_fields(config))
    return ShotEncoder(config, BYTES, block_size, labels, corpus, seed)


def prompt(made: Any) -> str:
    example = made.chosen if isinstance(made, PreferencePair) else made
    assert isinstance(example, Example)
    return BYTES.decode(example.tokens[1 : example.prompt])


ROWS = [{"prompt": f"q{i}: ", "response": f"r{i}"} for i in range(9)]


def test_which(tmp_path: Path) -> None:
    """Bug: a row is an example for itself, examples change from run to run or with the order of the
    rows, or all rows have the same ones."""
    made = encoder(tmp_path, ROWS)
    again, other = encoder(tmp_path, ROWS), encoder(tmp_path, ROWS, seed=1)
    prompts = [prompt(made.encode(row, "w")) for row in ROWS]
    assert [prompt(again.encode(row, "w")) for row in ROWS[::-1]] == prompts[::-1]
    assert [prompt(other.encode(row, "w")) for row in ROWS] != prompts
    for row, text in zip(ROWS, prompts, strict=True):
        *shots, own = text.split("\n\n")
        assert own == row["prompt"]
        assert len(set(shots)) == 2
        assert all(
            shot in {r["prompt"] + r["response"] for r in ROWS if r != row} for shot in shots
        )
    assert len({text[:-4] for text in prompts}) > 3
    # Case and blanks aside, and with another answer, it is still the same question.
    few = encoder(tmp_path, [*ROWS[:2], {"prompt": " Q0:", "response": "other"}], shots=3)
    example = few.encode(ROWS[0], "w")
    assert (shots_of(example), prompt(example)) == (1, "q1: r1\n\nq0: ")  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", [5, 8, 16, 17, 24, 25, 33, 60])
def test_as_many_as_fit(tmp_path: Path, block_size: int) -> None:
    """Bug: examples push out the row's own prompt, leave no room for an answer, or fewer are taken
    than fit."""
    made = encoder(tmp_path, ROWS, block_size, shots=5, max_new_tokens=2)
    example = made.encode(ROWS[3], "w")
    if block_size == 5:  # cut, as without examples
        assert prompt(example) == ": "
        return
    fits = [n for n in range(6) if 1 + 8 * n + 4 + 2 + 2 <= block_size]  # start, shots, row, room
    assert shots_of(example) == max(fits, default=0)  # type: ignore[arg-type]
    assert prompt(example).endswith("q3: ")


CHAT = [
    {"messages": [{"role": "system", "content": f"S{i}"}, *({"role": r, "content": f"{r[0]}{i}"}
     for r in ("user", "assistant"))]}
    for i in range(3)
]  # fmt: skip
PAIRS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"x{i}"} for i in range(2)]
SPOKEN = [
    {"prompt": [{"role": "user", "content": f"p{i}"}], "chosen": {"role": "assistant", "content":
     f"c{i}"}, "rejected": {"role": "assistant", "content": f"x{i}"}}
    for i in range(2)
]  # fmt: skip
CHOICES = [{"prompt": f"p{i}", "choices": ["a", "b"], "label": i} for i in range(2)]
LABELS = [{"text": f"t{i}", "label": f"l{i}"} for i in range(2)]


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        (PAIRS, {"task": "preference"}, "p1c1\n\np0"),
        (
            SPOKEN,
            {"task": "preference"},
            "User:\np1\n\nAssistant:\nc1\n\nUser:\np0\n\nAssistant:\n",
        ),
        (CHOICES, {"task": "multiple_choice", "head": False}, "p1\n- a\n- b\n\nAnswer:\nb\n\np0\n"),
        (CHOICES, {"task": "continuation"}, "p1 b\n\np0"),
        (LABELS, {"task": "classification", "head": False}, "t1\n\nLabel:\nl1\n\nt0\n\nLabel:\n"),
        ([{"text": f"x{i} word"} for i in range(2)], {"task": "last_word"}, "x1 word\n\nx0"),
        ([{"text": f"t{i}"} for i in range(2)], {"task": "text"}, "t1\n\n"),
        (CHAT[:2], {"task": "chat"}, "System:\nS0\n\nUser:\nu1\n\nAssistant:\na1"),
    ],
)
def test_every_task(
    tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], expected: str
) -> None:
    """Bug: an example is shown without its answer, with the wrong choice, or as another's turn."""
    labels = ("l0", "l1") if settings["task"] == "classification" else ()
    made = encoder(tmp_path, rows, labels=labels, **settings)
    example = made.encode(rows[0], "w")
    assert prompt(example).startswith(expected)
    assert shots_of(example) == 1  # type: ignore[arg-type]
    if isinstance(example, Example) and example.choices:
        assert all(BYTES.eot not in ids for ids in example.choice_tokens)
    if settings["task"] == "text":
        assert isinstance(example, Example)
        assert example.references == ["t0"]
