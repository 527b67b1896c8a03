"""Rows of examples: packing against one example at a time, padding, resuming anywhere."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config, FinetuneConfig
from gptcli.data.corpus import open_corpus
from gptcli.data.example_rows import GROUP_ROWS, PackedExamples, collate_examples, collate_packed
from gptcli.data.examples import Example, HeadExample, PreferencePair
from gptcli.data.rows import Rows, RowSource, step_batches
from gptcli.data.task_data import TaskData, open_task
from gptcli.data.task_formats import TaskEncoder, row_fields
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError
from gptcli.model.gpt import GPT
from gptcli.model.loss import IGNORED
from gptcli.training.objective import language_model_loss

BYTES = Tokenizer.of_bytes()
EOT = 256


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task_of(
    folder: Path,
    rows: list[dict[str, Any]],
    block_size: int = 16,
    sources: list[dict[str, Any]] | None = None,
    **finetune: Any,
) -> TaskData:
    """The rows as training data; one of them is the validation data too."""
    config = Config.model_validate(
        {
            "data": {
                "train": sources or write_rows(folder / "rows.jsonl", rows),
                "val": write_rows(folder / "val.jsonl", rows[:1]),
                "cache": "off",
            },
            "finetune": finetune,
        }
    )
    corpus = open_corpus(config.data, row_fields(config.finetune))
    return open_task(config, BYTES, corpus, block_size=block_size)


def numbered(n: int) -> list[dict[str, Any]]:
    """Rows with prompts 00, 01, ...; every fifth has a response that is too long for 16 tokens."""
    return [
        {"prompt": f"{i:02d}", "response": "long" * 9 if i % 5 == 3 else "r" * (i % 4 + 1)}
        for i in range(n)
    ]


def prompts(rows: Rows) -> list[int]:
    """The numbers of the examples in rows: what stands behind each document start."""
    found = []
    for line in rows.inputs.reshape(-1, rows.inputs.shape[-1]).tolist():
        starts = [i for i, token in enumerate(line) if token == EOT and line[i + 1 : i + 2] != [0]]
        found += [int(bytes(line[i + 1 : i + 3])) for i in starts]
    return found


def example(prompt: bytes, response: bytes) -> Example:
    tokens = [EOT, *prompt, *response, EOT]
    trained = [i > len(prompt) for i in range(len(tokens))]
    return Example(tokens, trained, 1 + len(prompt), "", [""], "")


@pytest.mark.parametrize("preset", ["modern", "gpt2"])
@pytest.mark.parametrize("block_size", [24, 320])
def test_packed_examples_are_as_exact_as_one_at_a_time(preset: str, block_size: int):
    """Guards against attention, positions or loss that reach from one example of a row into
    another. Longer rows attend by a call a segment (see model/segments.py)."""
    generator = torch.Generator().manual_seed(0)
    drawn = [bytes(torch.randint(97, 123, (n,), generator=generator).tolist()) for n in range(30)]
    examples = [example(drawn[i % 9], drawn[(7 * i) % 11 + 1]) for i in range(20)]
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": block_size}
    model = GPT(ModelConfig.model_validate({"preset": preset, **sizes}), 257).double()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)

    class Source:
        """The examples once, and then no more."""

        epochs = 0.0
        _left = iter([{"example": e, "tokens": e.tokens} for e in examples] + [None])

        def next(self) -> Any:
            return next(self._left)

        def state(self) -> dict[str, Any]:
            return {}

    packed = PackedExamples(Source(), block_size, 1, shuffle=True)  # type: ignore[arg-type]
    packed._read_group()
    batch = next(step_batches(packed, len(packed._rows)))
    assert len(batch.tokens) < len(examples)
    assert batch.tokens.shape[1] <= block_size
    assert int((batch.targets != IGNORED).sum()) == sum(sum(e.trained) for e in examples)
    loss_of = language_model_loss(model)
    loss_of(batch, batch).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss = loss_of(batch, batch).item()
    model.zero_grad()
    one = 0.0
    for e in examples:
        rows = collate_examples([e])
        inputs, targets = torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets)
        nats = model.loss(inputs, targets) / int((batch.targets != IGNORED).sum())
        nats.backward()
        one += nats.item()
    assert loss == pytest.approx(one, rel=1e-6)  # the sum of losses is fp32
    for ours, alone in zip(gradients, [p.grad for p in model.parameters()], strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-9)


def resumed(task: TaskData, window: int, state: str | None) -> RowSource:
    return task.rows(7, window, json.loads(state) if state is not None else None)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("window", [0, 6, 10000])
def test_each_epoch_gives_each_row_that_fits_once_and_resumes_anywhere(
    tmp_path: Path, window: int, packing: bool, monkeypatch: pytest.MonkeyPatch
):
    """Guards against rows lost or repeated by a resume, or around those that are skipped."""
    monkeypatch.setattr("gptcli.data.example_rows.GROUP_ROWS", 2)
    task = task_of(tmp_path, numbered(20), packing=packing)
    source = resumed(task, window, None)
    taken: list[list[int]] = []
    states = []
    order: list[int] = []
    while len(order) < 36:
        states.append(json.dumps(source.state()))
        before = source.epochs
        taken.append(prompts(source.take(1)))
        order += taken[-1]
        assert before <= source.epochs <= (len(order) + 15) // 16
    expected = [i for i in range(20) if i % 5 != 3]
    assert sorted(order[:16]) == sorted(order[16:32]) == expected
    assert (order[:16] == order[16:32]) == (window == 0)
    assert any(len(row) > 1 for row in taken) == packing
    for cut in (1, 2, len(taken) // 2, len(taken) - 2):
        again = resumed(task, window, states[cut])
        rest = [prompts(again.take(1)) for _ in taken[cut:]]
        assert rest == taken[cut:], f"cut before row {cut}"


@pytest.mark.parametrize("packing", [True, False])
def test_long_texts_go_on_in_further_rows_and_resume_in_their_middle(tmp_path: Path, packing: bool):
    """Guards against text beyond the block that is never learned, or learned twice after a resume
    between two parts of one text."""
    texts = [chr(97 + n) * (5 + 17 * n) for n in range(4)]  # up to four blocks of 16
    task = task_of(tmp_path, [{"text": t} for t in texts], task="text", packing=packing)
    source = resumed(task, 3, None)
    taken: list[list[int]] = []
    states = []
    while sum(map(len, taken)) < sum(map(len, texts)) + 4:  # each with its eot
        states.append(json.dumps(source.state()))
        targets = source.take(1).targets
        taken.append(targets[targets != IGNORED].tolist())
    assert sorted(chain(*taken)) == sorted([*"".join(texts).encode(), *[EOT] * 4])
    assert max(map(len, taken)) == 16
    for cut in range(len(taken)):
        again = resumed(task, 3, states[cut])
        for expected in taken[cut:]:
            targets = again.take(1).targets
            assert targets[targets != IGNORED].tolist() == expected


def test_steps_do_not_depend_on_how_many_rows_are_taken_at_once(tmp_path: Path):
    """Guards against another order after a change of the step's size, within a group."""
    task = task_of(tmp_path, numbered(60))
    one, many = task.rows(1, 1000), task.rows(1, 1000)
    alone = [prompts(one.take(1)) for _ in range(12)]
    assert prompts(many.take(5)) + prompts(many.take(7)) == list(chain(*alone))
    assert GROUP_ROWS > 12


def test_sources_are_mixed_by_weight_and_resume(tmp_path: Path):
    """Guards against weights that finetuning ignores, and a mixture that a resume restarts."""
    first = write_rows(tmp_path / "a.jsonl", numbered(90)[:50])
    other = write_rows(tmp_path / "b.jsonl", numbered(90)[50:])
    sources = [{"path": first, "weight": 3.0}, {"path": other, "weight": 1.0}]
    for packing in (True, False):
        task = task_of(tmp_path, numbered(1), sources=sources, packing=packing)
        source = task.rows(1, 10000)
        start = [prompts(source.take(1)) for _ in range(60)]
        state = json.dumps(source.state())
        rest = [prompts(source.take(1)) for _ in range(60)]
        again = resumed_mixture(task, state)
        assert [prompts(again.take(1)) for _ in range(60)] == rest
        numbers = np.array(list(chain(*start, *rest)))
        assert 0.7 < np.mean(numbers < 50) < 0.8


def resumed_mixture(task: TaskData, state: str) -> RowSource:
    return task.rows(1, 10000, json.loads(state))


def test_rows_of_which_none_fits_are_refused(tmp_path: Path):
    """Guards against a training loop that searches for ever, in a stream that was not read
    before."""
    task = task_of(tmp_path, numbered(5), packing=False)
    too_long = [{"prompt": "a", "response": "long" * 9}]
    write_rows(tmp_path / "rows.jsonl", too_long * 40)
    with pytest.raises(DataError, match="no row fits"):
        task.rows(1, 0).take(1)


def test_examples_are_padded_and_counted():
    """Guards against tokens per second and per step that count padding, or leave out prompts, and
    loss on padding. The expectation is written by hand."""
    none = IGNORED
    short, long = example(b"a", b"xy"), example(b"", b"z")
    rows = collate_examples([short, long])
    assert rows.count == 4 + 2
    assert rows.inputs.tolist() == [[EOT, *b"axy"], [EOT, *b"z", 0, 0]]
    assert rows.targets.tolist() == [[none, *b"xy", EOT], [*b"z", EOT, none, none]]
    packed = collate_packed([[long, long], [short]])
    assert packed.count == 8
    assert packed.inputs.tolist() == [[EOT, *b"z", EOT, *b"z"], [EOT, *b"axy"]]
    assert packed.targets.tolist() == [[*b"z", EOT, *b"z", EOT], [none, *b"xy", EOT]]
    assert packed.starts is not None
    assert packed.starts.tolist() == [[True, False, True, False], [True, False, False, False]]


def test_head_examples_and_pairs_in_rows():
    """Guards against a head that reads padding, a choice that a row lacks, and sides or labels
    mixed up. The expectation is written by hand."""
    none = IGNORED
    heads = [HeadExample([[EOT, 5, EOT]], 1, "", ""), HeadExample([[EOT, EOT], [7] * 4], 0, "", "")]
    rows = collate_examples(heads)
    assert rows.inputs.tolist() == [
        [[EOT, 5, EOT, 0], [0, 0, 0, 0]],
        [[EOT, EOT, 0, 0], [7, 7, 7, 7]],
    ]
    assert rows.targets.tolist() == [
        [[5, EOT, none, none], [none] * 4],
        [[EOT, none, none, none], [7, 7, 7, none]],
    ]
    assert rows.ends is not None
    assert rows.labels is not None
    assert (rows.ends.tolist(), rows.labels.tolist()) == ([[2, -1], [1, 3]], [1, 0])
    pairs = [PreferencePair(example(b"a", b"xy"), example(b"a", b"z"), 2**62, "")]
    rows = collate_examples(pairs)
    assert rows.inputs.tolist() == [[[EOT, *b"axy"], [EOT, *b"az", 0]]]
    assert rows.targets.tolist() == [[[none, *b"xy", EOT], [none, *b"z", EOT, none]]]
    assert (rows.ends, rows.count) == (None, 7)
    assert rows.labels is not None
    assert rows.labels.tolist() == [2**62]


def test_rows_are_nearly_full(tmp_path: Path):
    """Guards against packing that leaves much of each row to padding, or makes rows too long."""
    task = task_of(tmp_path, numbered(3000)[:2000], block_size=64)
    rows = task.rows(1, 10000).take(GROUP_ROWS)
    assert rows.inputs.shape == (GROUP_ROWS, 64)
    assert rows.count > 0.97 * rows.inputs.size
    encoder = TaskEncoder(FinetuneConfig(), BYTES, 64)
    lengths = {i: len(encoder.encode(row, "").tokens) for i, row in enumerate(numbered(100))}  # type: ignore[union-attr]
    assert max(lengths.values()) <= 65
