"""Finetuning examples: which tokens carry loss, what is cut, skipped or refused; resuming."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.data_schema import DataConfig
from gptcli.config.schema import FinetuneConfig
from gptcli.data.corpus import open_corpus
from gptcli.data.rows import collate
from gptcli.data.shards import Shard
from gptcli.data.stream import RecordStream, ShardReader
from gptcli.data.tasks import Example, ExampleEncoder, ExampleRows, example_row
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, DataError
from gptcli.model.loss import IGNORED

EOT = 256  # of the byte tokenizer
ROW = {"prompt": "ab", "response": "xyz"}


def encoder(block_size: int = 32, **config: Any) -> ExampleEncoder:
    return ExampleEncoder(FinetuneConfig(**config), Tokenizer.of_bytes(), block_size)


def prompt_of(template: str, row: dict[str, Any] | None = None) -> str:
    example = encoder(200, template=template).encode(row or ROW, "here")
    assert example is not None
    assert example.prompt[0] == EOT
    return bytes(example.prompt[1:]).decode()


def test_loss_is_on_the_response_and_eot_and_nothing_else():
    """Guards against loss on the prompt, none on the first token of the answer, and a model that
    never learns to stop. The expectation is written by hand."""
    example = encoder().encode(ROW, "here")
    assert example == Example([EOT, *b"ab"], list(b"xyz"), "xyz")
    rows = collate([example_row(example, EOT)])
    tokens, targets = rows.inputs, rows.targets
    none = IGNORED
    #                         <eot>     a         b         x         y         z
    assert tokens.tolist() == [[EOT, ord("a"), ord("b"), ord("x"), ord("y"), ord("z")]]
    assert targets.tolist() == [[none, none, ord("x"), ord("y"), ord("z"), EOT]]


def test_an_empty_prompt_begins_with_the_start_token():
    """Guards against a first response token that has no position to be predicted from."""
    example = encoder().encode({"prompt": "", "response": "x"}, "here")
    rows = collate([example_row(example, EOT)])
    tokens, targets = rows.inputs, rows.targets
    assert tokens.tolist() == [[EOT, ord("x")]]
    assert targets.tolist() == [[ord("x"), EOT]]


@pytest.mark.parametrize("block_size", range(4, 14))
def test_a_long_prompt_loses_its_beginning(block_size: int):
    """Guards against a cut answer, a cut at the wrong end, a lost start token, and an example that
    is longer or shorter than the model's window allows."""
    subject = encoder(block_size)
    example = subject.encode({"prompt": "abcdefgh", "response": "xyz"}, "here")
    kept = max(0, min(8, block_size - 1 - 3))
    assert example.prompt == [EOT, *b"abcdefgh"[8 - kept :]]
    assert example.response == list(b"xyz")
    tokens = collate([example_row(example, EOT)]).inputs
    assert tokens.shape[1] == min(block_size, 1 + 8 + 3)
    assert subject.shortened == (kept < 8)
    assert subject.skipped == 0


def test_a_response_that_does_not_fit_is_skipped_and_counted():
    """Guards against answers cut in the middle, and rows that vanish without a word."""
    subject = encoder(4)
    rows = [{"prompt": "a", "response": r} for r in ("xyz", "wxyz", "", "x" * 100, "x")]
    examples = subject.encode_all((f"row {i}", row) for i, row in enumerate(rows))
    assert [e.text for e in examples] == ["xyz", "x"]
    assert subject.skipped == 3


def test_multi_byte_text_is_counted_in_tokens():
    """Guards against a limit in characters."""
    assert encoder(6).encode({"prompt": "", "response": "🙂é"}, "here") is None
    assert encoder(7).encode({"prompt": "", "response": "🙂é"}, "here").text == "🙂é"


def test_end_of_text_in_a_row_is_ordinary_text():
    """Guards against a row that can end its own prompt."""
    example = encoder(99).encode({"prompt": "<|endoftext|>", "response": "<|endoftext|>"}, "here")
    assert example.prompt.count(EOT) == 1
    assert EOT not in example.response


def test_the_template_makes_the_prompt_exactly():
    """Guards against escaped HTML and a lost line end at the template's end."""
    row = {"prompt": "1 < 2 & 'x'", "response": "yes", "context": ["a", "b"]}
    assert prompt_of("Q: {{ prompt }}\nA:\n", row) == "Q: 1 < 2 & 'x'\nA:\n"
    assert prompt_of("{% for c in context %}[{{ c }}]{% endfor %} {{ prompt }}", row) == (
        "[a][b] 1 < 2 & 'x'"
    )


def test_fields_rename_columns():
    """Guards against fixed column names; the row's own names stay usable beside them."""
    config = {
        "fields": {"prompt": "question", "response": "answer"},
        "template": "{{ prompt }}={{ question }}?",
    }
    example = encoder(**config).encode({"question": "1+1", "answer": "2"}, "here")
    assert bytes(example.prompt[1:]) == b"1+1=1+1?"
    assert example.text == "2"


def test_an_undefined_variable_is_named_with_the_row():
    """Guards against an empty string where a misspelt name stands in the template."""
    with pytest.raises(DataError, match="'promt' is undefined") as caught:
        encoder(template="{{ promt }}").encode({**ROW, "id": 3}, "rows.jsonl, row at byte 17")
    assert "rows.jsonl, row at byte 17" in caught.value.message
    assert "(has: prompt, response, id)" in caught.value.message


@pytest.mark.parametrize("template", ["{{ prompt", "{% if %}", "{{ prompt|nofilter }}"])
def test_a_wrong_template_is_refused_before_any_row(template: str):
    """Guards against a syntax error found after the model has been loaded and scored."""
    with pytest.raises(ConfigError, match=r"finetune\.template"):
        encoder(template=template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ prompt.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ extra.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ prompt + 1 }}",
    ],
)
def test_a_template_runs_in_a_sandbox(template: str):
    """Guards against a config from the internet that runs code or changes rows, and against its
    errors arriving as a traceback."""
    row = {**ROW, "extra": [0]}
    with pytest.raises(DataError, match=r"here: finetune\.template"):
        encoder(template=template).encode(row, "here")
    assert row["extra"] == [0]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig.model_validate({"train": str(path)})


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"prompt": "a", "answer": "b"}, r"no field 'response' \(has: prompt, answer\)"),
        ({"prompt": None, "response": "b"}, "field 'prompt' is not text but null"),
        ({"prompt": "a", "response": 4}, "field 'response' is not text but int"),
    ],
)
def test_a_row_without_its_fields_is_named_by_line(
    tmp_path: Path, bad: dict[str, Any], problem: str
):
    """Guards against a KeyError in the middle of training."""
    data = write_rows(tmp_path / "rows.jsonl", [ROW, ROW, bad, ROW])
    with pytest.raises(DataError, match=problem) as caught:
        open_corpus(data, fields=("prompt", "response"))
    assert caught.value.message.startswith(f"{tmp_path / 'rows.jsonl'}:3: ")
    assert "finetune.fields" in str(caught.value.hint)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """20 rows, 4 of them with responses that are too long for 16 tokens."""
    rows = [
        {"prompt": f"{i:02d}", "response": "long" * 9 if i % 5 == 3 else "r" * (i % 4 + 1)}
        for i in range(20)
    ]
    val = tmp_path / "val.jsonl"
    val.write_text(json.dumps(ROW) + "\n")
    data = write_rows(tmp_path / "rows.jsonl", rows).model_copy(
        update={"val": DataConfig.model_validate({"train": str(val)}).train}
    )
    return open_corpus(data, fields=("prompt", "response")).train


SIZE = 4 * 60 + 16 * 36  # bytes of an epoch, roughly


def rows_from(shards: list[Shard], window: int, state: dict[str, Any] | None) -> ExampleRows:
    saved = state["stream"] if state else None
    return ExampleRows(RecordStream(ShardReader(shards), SIZE, 7, window, saved), encoder(16))


def prompt(source: ExampleRows) -> bytes:
    """The two letters behind the start token of the next example."""
    return source.take(1).inputs[0, 1:3].astype("uint8").tobytes()


@pytest.mark.parametrize("window", [0, 6, 10000])
def test_each_epoch_gives_each_row_that_fits_once_and_resumes_anywhere(
    shards: list[Shard], window: int
):
    """Guards against rows lost or repeated by a resume, or around those that are skipped."""
    source = rows_from(shards, window, None)
    whole: list[bytes] = []
    states = []
    for i in range(2 * 16 + 3):
        states.append(json.dumps(source.state()))
        before = source.epochs
        whole.append(prompt(source))
        assert before <= source.epochs
        assert i // 16 < source.epochs <= i // 16 + 1
    expected = sorted(b"%02d" % i for i in range(20) if i % 5 != 3)
    assert sorted(whole[:16]) == sorted(whole[16:32]) == expected
    assert (whole[:16] == whole[16:32]) == (window == 0)
    for cut in range(0, len(whole), 3):
        resumed = rows_from(shards, window, json.loads(states[cut]))
        rest = [prompt(resumed) for _ in whole[cut:]]
        assert rest == whole[cut:], f"cut before row {cut}"


def test_rows_of_which_none_fits_are_refused(tmp_path: Path):
    """Guards against a training loop that searches for ever."""
    rows = [{"prompt": str(i), "response": "long" * 9} for i in range(5)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    source = rows_from(open_corpus(data, fields=("prompt", "response")).train, 0, None)
    with pytest.raises(DataError, match="every response is empty or longer than block_size 16"):
        source.take(1)


def test_a_step_of_examples_is_padded_and_counted(shards: list[Shard]):
    """Guards against tokens per second and per step that count padding, or leave out prompts."""
    rows, single = rows_from(shards, 0, None).take(8), rows_from(shards, 0, None)
    alone = [single.take(1) for _ in range(8)]
    assert rows.count == sum(row.inputs.shape[1] for row in alone)
    assert rows.inputs.shape == rows.targets.shape == (8, max(r.inputs.shape[1] for r in alone))
    for i, row in enumerate(alone):
        width = row.inputs.shape[1]
        assert rows.inputs[i, :width].tolist() == row.inputs[0].tolist()
        assert rows.targets[i, :width].tolist() == row.targets[0].tolist()
        assert set(rows.targets[i, width:].tolist()) <= {IGNORED}
    assert rows_from(shards, 0, None).seen == []
