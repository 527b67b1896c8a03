"""Best-fit packing: documents whole where they fit, no token lost, few rows."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.config.data_schema import SourceConfig
from gptcli.data import packing
from gptcli.data.best_fit import best_fit, cut_documents
from gptcli.data.files import resolve
from gptcli.data.mixture import Mixture
from gptcli.data.packing import PackedRows
from gptcli.data.shards import Shard, Split
from gptcli.data.stream import RecordStream, ShardReader
from gptcli.data.tokenizer import Tokenizer
from gptcli.model.loss import IGNORED

T = 12
TOKENIZER = Tokenizer.of_bytes()
EOT = TOKENIZER.eot


def rows_of_oracle(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every row: the lengths in each row."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        rooms = [(capacity - sum(row), i) for i, row in enumerate(rows)]
        fitting = [room for room in rooms if room[0] >= length]
        if fitting:
            rows[min(fitting)[1]].append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_pieces_lie_in_rows_without_overlap_as_best_fit_decreasing_puts_them(capacity: int):
    """Guards against overlapping pieces, rows that are too long, and a worse fit than promised."""
    for seed, count in itertools.product(range(4), (0, 1, 5, 200)):
        lengths = np.random.default_rng(seed).integers(1, capacity + 1, count)
        placed = best_fit(lengths, capacity)
        cells = [
            (row, offset + k)
            for row, offset, length in zip(placed.row, placed.offset, lengths, strict=True)
            for k in range(length)
        ]
        assert len(set(cells)) == len(cells) == lengths.sum()
        assert all(0 <= row < placed.rows and 0 <= at < capacity for row, at in cells)
        rows: list[list[int]] = [[] for _ in range(placed.rows)]
        for row, length in zip(placed.row.tolist(), lengths.tolist(), strict=True):
            rows[row].append(length)
        expected = rows_of_oracle(lengths.tolist(), capacity)
        assert Counter(map(sum, rows)) == Counter(map(sum, expected))
        firsts = [placed.row.tolist().index(row) for row in range(placed.rows)]
        assert firsts == sorted(firsts)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("first", [[], [5, 6]])
@pytest.mark.parametrize("sizes", [[3], [1, 1], [4, 8, 9], [0, 12, 0], [13, 2], []])
def test_chunks_hold_every_target_once(sizes: list[int], first: list[int], closed: bool):
    """Guards against targets lost where a document is cut, a closing eot that is lost or counted
    twice, and chunks over the border of a document. `first` continues an earlier document."""
    numbers = itertools.count(10)
    tokens = [*first, *(t for n in sizes for t in [EOT, *itertools.islice(numbers, n)])]
    tokens += [EOT] if closed and tokens else []
    chunks = cut_documents(np.array(tokens, dtype=np.uint16), EOT, 4, closed)
    targets: list[int] = []
    for start, length in zip(chunks.starts.tolist(), chunks.lengths.tolist(), strict=True):
        assert 1 <= length <= 4
        assert EOT not in tokens[start + 1 : start + length]  # at its ends only
        targets += range(start + 1, start + length + 1)
    assert targets == list(range(1, len(targets) + 1))
    if closed or not tokens:
        assert len(targets) == max(len(tokens) - 1, 0)
    else:
        assert chunks.rest == len(targets)
        assert len(tokens) - chunks.rest <= 4


def shards_of(tmp_path: Path, texts: list[str]) -> list[Shard]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (file,) = resolve([SourceConfig(path=str(path))])
    size = path.stat().st_size
    return [Shard(file, k, min(k + 60, size), Split("none")) for k in range(0, size, 60)]


class _Encoded:
    """Records with their tokens, encoded at once."""

    def __init__(self, stream: RecordStream) -> None:
        self.stream = stream

    @property
    def epochs(self) -> float:
        return self.stream.epochs

    def next(self) -> dict[str, Any] | None:
        record = self.stream.next()
        return record and {**record, "tokens": TOKENIZER.encode_numpy(record["text"])}

    def state(self) -> dict[str, Any]:
        return self.stream.state()


def opened(
    shards: list[Shard], texts: list[str], window: int, state: dict[str, Any] | None = None
) -> PackedRows:
    saved = state["mixture"] if state else None
    size = sum(map(len, texts))
    stream = RecordStream(ShardReader(shards), size, 7, window, saved and saved["streams"][0])
    mixture = Mixture([_Encoded(stream)], None, saved)
    return PackedRows(mixture, TOKENIZER, T, 7, window > 0, "best_fit", True, 1, state)


def segments_of(rows: Any) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of each segment, padding left out."""
    found = []
    for inputs, targets, starts in zip(rows.inputs, rows.targets, rows.starts, strict=True):
        length = int((targets != IGNORED).sum())
        assert (targets[:length] != IGNORED).all(), "padding stands at the end"
        assert (inputs[length:] == 0).all()
        assert not starts[length:].any()
        begins = np.flatnonzero(starts[:length]).tolist()
        for begin, end in zip(begins, [*begins[1:], length], strict=True):
            found.append((inputs[begin:end].tolist(), targets[begin:end].tolist()))
    return found


@pytest.mark.parametrize("window", [0, 3, 10000])
@pytest.mark.parametrize("group", [1, 60, 1 << 20])
def test_documents_stay_whole_and_each_token_is_a_target_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, window: int
):
    """Guards against documents cut that fit into a row, tokens dropped at the ends of rows, groups
    and epochs, and attention that begins inside a document."""
    monkeypatch.setattr(packing, "GROUP_TOKENS", group)
    texts = [f"{i:02d}" + "abcdefghij"[: i % 11] + "xyz" * (9 * (i % 5 == 4)) for i in range(15)]
    packed = opened(shards_of(tmp_path, texts), texts, window)
    segments: list[tuple[list[int], list[int]]] = []
    taken = 0
    while packed.epochs < 3.0 or packed.state()["rest"]["tokens"]:
        rows = packed.take(1)
        segments += segments_of(rows)
        taken += rows.count
    epochs = packed.seen[0]["documents"] / len(texts)
    assert epochs in (3, 4)
    wholes = Counter()
    rest = Counter()
    for inputs, targets in segments:
        assert inputs[1:] == targets[:-1]
        if inputs[0] == EOT and targets[-1] == EOT:
            wholes[bytes(targets[:-1])] += 1
        else:
            rest.update(targets)
    short = [text for text in texts if len(text) + 1 <= T]
    assert wholes == Counter({text.encode(): epochs for text in short})
    long = Counter(token for text in texts if len(text) >= T for token in [*text.encode(), EOT])
    assert rest == Counter({token: n * epochs for token, n in long.items()})
    assert taken == packed.seen[0]["tokens"] == epochs * sum(len(text) + 1 for text in texts)


def test_a_group_has_as_many_rows_as_best_fit_needs(tmp_path: Path):
    """Guards against a row for each document."""
    lengths = np.random.default_rng(0).integers(1, T, 400).tolist()
    texts = ["x" * n for n in lengths]
    packed = opened(shards_of(tmp_path, texts), texts, 10000)
    count = rows = 0
    while packed.epochs < 1.0:
        count += packed.take(1).count
        rows += 1
    assert count == sum(lengths) + len(lengths)
    assert rows == len(rows_of_oracle([n + 1 for n in lengths], T))


def test_restored_anywhere_it_goes_on_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Guards against a document that is lost or doubled where it lies over the end of a group."""
    monkeypatch.setattr(packing, "GROUP_TOKENS", 60)
    texts = [f"{i:02d}" + "abcdefghij" * (i % 6) for i in range(15)]
    shards = shards_of(tmp_path, texts)
    packed, states, whole = opened(shards, texts, 3), [], []
    for _ in range(110):
        states.append(json.dumps(packed.state()))
        whole.append(segments_of(packed.take(1)))
    assert packed.epochs > 2
    for cut in range(0, 110, 3):
        packed = opened(shards, texts, 3, json.loads(states[cut]))
        assert [segments_of(packed.take(1)) for _ in range(7)][: 110 - cut] == whole[cut:][:7]
