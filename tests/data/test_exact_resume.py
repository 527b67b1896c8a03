"""The 40-cut test: a run saved anywhere, twice, goes on with the very same tokens.

Every kind of source, a mixture of three, both packings, with and without document mask; windows,
groups, shards and epochs are so small that their borders lie everywhere.
"""

import csv
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli.config.data_schema import SourceConfig
from gptcli.data import encode, packing, pretokenised, readers, stream
from gptcli.data.encode import EncodedStream
from gptcli.data.files import resolve
from gptcli.data.layout import layout
from gptcli.data.mixture import Mixture
from gptcli.data.packing import PackedRows
from gptcli.data.readers import read_shards
from gptcli.data.shards import Problems, Shard, Split
from gptcli.data.stream import RecordStream, ShardReader
from gptcli.data.tokenizer import Tokenizer

T = 16
STEP = 3  # rows
WINDOW = 4
CUTS = 42
TOKENIZER = Tokenizer.of_bytes()
EOT = TOKENIZER.eot
KINDS = ["text", "lines", "jsonl", "csv", "parquet", "builtin", "tokens"]


@dataclass(frozen=True)
class Source:
    """The shards of one stream, a reader for all who open it anew, and its size in bytes."""

    shards: list[Shard]
    reader: ShardReader
    size: int

    @classmethod
    def of(cls, shards: list[Shard]) -> "Source":
        return cls(shards, ShardReader(shards), sum(r["bytes"] for r in read_shards(shards)))


@pytest.fixture(autouse=True)
def _borders_everywhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "GROUP_TOKENS", 160)
    monkeypatch.setattr(readers, "PIECE_BYTES", 64)
    monkeypatch.setattr(pretokenised, "PIECE_TOKENS", 100)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 200)
    monkeypatch.setattr(encode, "AHEAD_BYTES", 4096)


def texts(seed: int, count: int) -> list[str]:
    """Documents of 1 to 70 characters, no two alike."""
    chosen = random.Random(seed)
    return [
        f"{seed}{i:x} " + "".join(chosen.choices("abcdeé \u4e2d", k=chosen.randrange(1, 65)))
        for i in range(count)
    ]


def shards_of(folder: Path, kind: str, seed: int = 1, number: int = 0) -> list[Shard]:
    """Shards of a few documents each, one of them empty where the kind allows it."""
    documents, path = texts(seed, 12), folder / f"{kind}{seed}"
    if kind == "text":
        shards = []
        for i, text in enumerate(documents[:7]):
            file = path.with_name(f"{kind}{seed}-{i}.txt")
            file.write_text(f"{text}\n{text[::-1]}\n" * (1 + i % 3))
            shards += pieces_of(file, 2, number)
        return shards
    if kind == "tokens":
        path = path.with_suffix(".npy")
        ids = [i for text in documents for i in [EOT, *TOKENIZER.encode(text)]]
        np.save(path, np.array(ids, dtype=np.uint16))
        (file,) = resolve([SourceConfig(path=str(path))])
        whole = Shard(replace(file, number=number), 0, 0, Split("none"), 0, len(ids), eot=EOT)
        pieces = -(-len(ids) // 100)
        return [replace(whole, start=k, stop=min(k + 2, pieces)) for k in range(0, pieces, 2)]
    if kind == "builtin":
        (file,) = resolve([SourceConfig(path="builtin:web-verses", text_field="verse")])
        return [
            Shard(replace(file, number=number), k, k + 3, Split("none")) for k in range(0, 14, 3)
        ]
    source = SourceConfig(path=str(write_rows(path, kind, documents)), document="line")
    if kind != "lines":
        source = SourceConfig(path=source.path)
    (file,) = resolve([source])
    found = layout(file, Problems())
    borders = found.borders or tuple(range(0, found.size, 70))
    return [
        Shard(replace(file, number=number), low, high, Split("none"))
        for low, high in zip(borders, [*borders[1:], found.size], strict=True)
    ]


def write_rows(path: Path, kind: str, documents: list[str]) -> Path:
    if kind == "lines":
        path = path.with_suffix(".txt")
        path.write_text("".join(f"{text}\n" for text in documents))
    elif kind == "jsonl":
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    elif kind == "csv":
        path = path.with_suffix(".csv")
        with path.open("w", newline="") as f:
            csv.writer(f).writerows([["id", "text"], *enumerate(documents)])
    else:
        path = path.with_suffix(".parquet")
        pq.write_table(pa.table({"text": documents}), path, row_group_size=5)
    return path


def pieces_of(path: Path, step: int, number: int) -> list[Shard]:
    (file,) = resolve([SourceConfig(path=str(path))])
    size = path.stat().st_size
    pieces = -(-size // 64)
    return [
        Shard(replace(file, number=number), k, min(k + step, pieces), Split("none"), 0, size)
        for k in range(0, pieces, step)
    ]


def opened(
    corpus: list[Source], packing: Any, mask: bool, state: str | None = None, block_size: int = T
) -> PackedRows:
    loaded = json.loads(state) if state else None
    saved = loaded["mixture"] if loaded else None
    streams = []
    for i, source in enumerate(corpus):
        at = saved["streams"][i] if saved else None
        records = RecordStream(source.reader, source.size, 7 + i, WINDOW, at)
        streams.append(EncodedStream(records, TOKENIZER, 2))
    weights = [3.0, 1.0, 2.0] if len(corpus) == 3 else None
    mixture = Mixture(streams, weights, saved)
    sources = len(corpus)
    return PackedRows(mixture, TOKENIZER, block_size, 7, True, packing, mask, sources, loaded)


def step_of(packed: PackedRows, n: int = STEP) -> Any:
    """All that a step of n rows is made of, and what is told about it."""
    rows = packed.take(n)
    starts = None if rows.starts is None else rows.starts.tolist()
    place = (rows.count, packed.epochs, packed.seen)
    return rows.inputs.tolist(), rows.targets.tolist(), starts, place


def whole_run(packed: PackedRows, epochs: float) -> tuple[list[Any], list[str]]:
    """The steps of that many epochs, and the state before each."""
    steps, states = [], []
    while packed.epochs < epochs:
        states.append(json.dumps(packed.state()))
        steps.append(step_of(packed))
    return steps, states


def cuts_of(states: list[str]) -> list[int]:
    """CUTS places: at borders of groups and windows, and random ones."""
    loaded = [json.loads(state) for state in states]
    places = [
        i
        for i, state in enumerate(loaded)
        if not state["row"] or any(s["position"] == 0 for s in state["mixture"]["streams"])
    ]
    chosen = set(places[: CUTS // 2])
    others = [i for i in range(len(states)) if i not in chosen]
    random.Random(3).shuffle(others)
    return sorted([*chosen, *others[: CUTS - len(chosen)]])


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", ["concat", "best_fit"])
@pytest.mark.parametrize("source", [*KINDS, "mixture"])
def test_resumed_twice_at_40_cuts_the_tokens_are_the_same(
    tmp_path: Path, source: str, kind: str, mask: bool
):
    """Guards against a resume that repeats, loses or reorders anything, whatever the source."""
    if source == "mixture":
        names = ("text", "jsonl", "tokens")
        corpus = [Source.of(shards_of(tmp_path, name, i + 1, i)) for i, name in enumerate(names)]
    else:
        corpus = [Source.of(shards_of(tmp_path, source))]
    steps, states = whole_run(opened(corpus, kind, mask), 4.3 if source == "builtin" else 2.3)
    while len(states) < CUTS:  # a small corpus: more epochs
        steps, states = whole_run(opened(corpus, kind, mask), 8.0)
    cuts = cuts_of(states)
    assert len(cuts) >= 40
    assert (steps[0][2] is None) == (not mask)
    for cut in cuts:
        packed = opened(corpus, kind, mask, states[cut])
        assert json.dumps(packed.seen) == json.dumps(json.loads(states[cut])["seen"])
        for i in (cut, cut + 1):
            if i < len(steps):
                assert step_of(packed) == steps[i], f"cut before step {cut}"
        packed = opened(corpus, kind, mask, json.dumps(packed.state()))
        for i in (cut + 2, cut + 3):
            if i < len(steps):
                assert step_of(packed) == steps[i], f"second cut before step {cut + 2}"


def tokens_of(source: Source) -> Counter[int]:
    """The oracle's tokens of an epoch's documents, without separators."""
    tokens: Counter[int] = Counter()
    for record in read_shards(source.shards):
        ids = record["tokens"].tolist() if "tokens" in record else TOKENIZER.encode(record["text"])
        tokens.update(ids)
    del tokens[EOT]
    return tokens


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
@pytest.mark.parametrize("name", KINDS)
def test_each_epoch_has_every_token_once_in_a_new_order(tmp_path: Path, name: str, kind: str):
    """Guards against text that is lost or repeated at a border, and against the same order every
    epoch. What the state keeps for later rows is counted where a whole number of epochs is read."""
    source = Source.of(shards_of(tmp_path, name))
    expected, packed = tokens_of(source), opened([source], kind, False)
    given: list[int] = []
    begins: dict[int, int] = {}  # epochs read -> tokens given till then
    while packed.epochs < 5.5:
        rows = packed.take(1)
        # With best fit the rest begins with a token that was a target, or with an eot.
        counted = rows.inputs if kind == "concat" else rows.targets[rows.targets >= 0]
        given += counted.ravel().tolist()
        state = packed.state()
        rest = state["rest"]["tokens"][0 if kind == "concat" else 1 :]
        epochs = round(packed.epochs, 6)  # a whole one comes with the end that is read next
        if state["row"] or epochs % 1:
            continue
        epochs = int(epochs)
        begins.setdefault(epochs, len(given))
        counts = Counter(given + rest + state["head"]["tokens"])
        del counts[EOT]
        assert counts == Counter({token: n * epochs for token, n in expected.items()})
    assert len(begins) >= 3
    assert len({tuple(given[i : i + 100]) for i in begins.values()}) == len(begins)


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_the_state_is_small(tmp_path: Path, kind: str):
    """Guards against a state with records or rows in it: it is written with every checkpoint."""
    names = ("text", "lines", "csv")
    corpus = [Source.of(shards_of(tmp_path, name, i + 1, i)) for i, name in enumerate(names)]
    packed, sizes = opened(corpus, kind, True, block_size=128), []
    for _ in range(60):
        packed.take(1)
        sizes.append(len(json.dumps(packed.state())))
    print(f"state of a mixture of three, T = 128, {kind}: at most {max(sizes):,} bytes")
    assert max(sizes) < 100_000
