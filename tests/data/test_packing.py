"""Packing: every token of every epoch once, `eot` before each document, exactly resumable."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.config.data_schema import SourceConfig
from gptcli.data import packing, readers
from gptcli.data.encode import EncodedStream
from gptcli.data.files import resolve
from gptcli.data.mixture import Mixture
from gptcli.data.packing import PackedRows
from gptcli.data.shards import Shard, Split
from gptcli.data.stream import RecordStream, ShardReader
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError

LENGTHS = [5, 1, 30, 2, 9, 0, 17, 3]  # characters of the documents; an empty one is none
T = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token for each two-byte character, so that no token of a corpus occurs twice."""
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {chr(c).encode(): 256 + i for i, c in enumerate(range(0x80, 0x800))}
    return Tokenizer("file", ranks, r"[\s\S]", len(ranks))


def corpus(tmp_path: Path, lengths: list[int]) -> tuple[list[Shard], list[str]]:
    """Shards of a few rows each, and the documents: all characters different."""
    letters = iter(range(0x100, 0x800))
    texts = ["".join(chr(c) for c in itertools.islice(letters, n)) for n in lengths]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    (file,) = resolve([SourceConfig(path=str(path))])
    size = path.stat().st_size
    shards = [Shard(file, k, min(k + 60, size), Split("none")) for k in range(0, size, 60)]
    return shards, [text for text in texts if text]


def epoch_tokens(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    """The oracle's token sequence of an epoch whose documents come as they stand."""
    return [token for text in texts for token in [tokenizer.eot, *tokenizer.encode(text)]]


def packed_rows(
    shards: list[Shard],
    tokenizer: Tokenizer,
    block_size: int = T,
    seed: int = 7,
    window: int = 0,
    shuffle: bool = False,
    state: dict[str, Any] | None = None,
    document_mask: bool = False,
) -> PackedRows:
    """Concatenated rows of the shards, from one stream."""
    saved = state["mixture"] if state else None
    size = sum(record["bytes"] for record in readers.read_shards(shards))
    reader = ShardReader(shards)
    records = RecordStream(reader, size, seed, window, saved and saved["streams"][0])
    mixture = Mixture([EncodedStream(records, tokenizer, 1)], None, saved)
    return PackedRows(
        mixture, tokenizer, block_size, seed, shuffle, "concat", document_mask, 1, state
    )


def next_row(packed: PackedRows) -> list[int]:
    """The next row's tokens: the inputs and the last target; the others are the inputs again."""
    rows = packed.take(1)
    assert rows.inputs[0, 1:].tolist() == rows.targets[0, :-1].tolist()
    assert rows.count == rows.inputs.size
    assert rows.inputs.dtype == rows.targets.dtype == np.int64
    return [*rows.inputs[0].tolist(), int(rows.targets[0, -1])]


def take(packed: PackedRows, n: int) -> list[list[int]]:
    return [next_row(packed) for _ in range(n)]


def rows_of_epochs(packed: PackedRows, epochs: int) -> list[list[int]]:
    rows = []
    while True:
        tokens = next_row(packed)
        if packed.epochs > epochs:
            return rows
        rows.append(tokens)


@pytest.mark.parametrize("group", [1, 40, 1 << 20])
@pytest.mark.parametrize("block_size", [1, T, 200])
def test_unshuffled_rows_are_the_documents_one_after_the_other(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    block_size: int,
    group: int,
):
    """Guards against tokens dropped at the borders of rows, groups and epochs, a missing or extra
    eot, and a corpus shorter than a row."""
    monkeypatch.setattr(packing, "GROUP_TOKENS", group)
    shards, texts = corpus(tmp_path, LENGTHS)
    sequence = epoch_tokens(texts, tokenizer) * 4
    packed = packed_rows(shards, tokenizer, block_size)
    expected = [
        sequence[i : i + block_size + 1]
        for i in range(0, len(sequence) - block_size - 1, block_size)
    ]
    assert take(packed, len(expected)) == expected


def test_pieces_of_a_document_follow_each_other_without_eot(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """Guards against an eot every 64 KiB inside a book, and none between two copies of one."""
    monkeypatch.setattr(readers, "PIECE_BYTES", 16)
    files = []
    for letter in "aab":
        path = tmp_path / f"{letter}.txt"
        path.write_text(f"{letter} line\n" * 9)
        files += resolve([SourceConfig(path=str(path))])
    shards = [Shard(f, k, k + 2, Split("none"), 0, 63) for f in files for k in (0, 2)]
    assert len(list(readers.read_shards(shards))) == 12
    packed = packed_rows(shards, tokenizer)
    tokens = [token for row in take(packed, 3 * 64 // T) for token in row[:-1]]
    assert tokens == epoch_tokens([f"{letter} line\n" * 9 for letter in "aab"], tokenizer)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("window", [3, 10000])
@pytest.mark.parametrize("group", [1, 40, 1 << 20])
def test_every_token_of_every_epoch_is_in_one_row(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    pieces: bool,
    window: int,
    group: int,
):
    """Guards against text that is never, or more often than other text, trained on when shuffled,
    and against the epoch's head (what stands before its random offset) being lost."""
    monkeypatch.setattr(packing, "GROUP_TOKENS", group)
    if pieces:
        monkeypatch.setattr(readers, "PIECE_BYTES", 10)
    shards, texts = corpus(tmp_path, LENGTHS)
    characters = [token for text in texts for token in tokenizer.encode(text)]
    borders = {(token, tokenizer.eot) for token in characters}
    borders |= {(tokenizer.eot, tokenizer.encode(text)[0]) for text in texts}
    inside = {pair for text in texts for pair in itertools.pairwise(tokenizer.encode(text))}
    for seed, epochs in ((1, 1), (2, 1), (3, 6)):
        packed = packed_rows(shards, tokenizer, T, seed, window, True)
        rows = rows_of_epochs(packed, epochs)
        counts = Counter(token for row in rows for token in row[:-1])
        eots = counts.pop(tokenizer.eot)
        # What is missing stands behind the last whole row, which needs a token of the next epoch.
        missing = epochs * len(characters) - counts.total()
        assert 0 <= missing <= T
        assert set(counts) <= set(characters)
        assert max(counts.values()) <= epochs
        pairs = [pair for row in rows for pair in itertools.pairwise(row)]
        if not pieces:
            assert epochs * len(texts) - T <= eots <= epochs * len(texts)
            assert eots + missing <= epochs * len(texts) + T
            # Only where an epoch's kept head ends may a pair be neither text nor a border.
            assert len([p for p in pairs if p not in inside | borders]) < epochs


def test_block_borders_move_from_epoch_to_epoch(tmp_path: Path, tokenizer: Tokenizer):
    """Guards against every epoch showing the model the same rows."""
    shards, _ = corpus(tmp_path, [5 * T - 1])  # with its eot exactly five rows
    borders = {}
    for shuffle in (False, True):
        packed = packed_rows(shards, tokenizer, shuffle=shuffle)
        begins: dict[int, set[int]] = {}
        for _ in range(59):
            row = next_row(packed)
            begins.setdefault(math.ceil(packed.epochs) - 1, set()).add(row[0])
        assert [len(b) for b in begins.values()] == [4] + [5] * 11
        borders[shuffle] = {frozenset(b) for epoch, b in begins.items() if epoch}
    assert len(borders[False]) == 1
    assert len(borders[True]) > 5


def test_rows_of_a_group_are_shuffled(tmp_path: Path, tokenizer: Tokenizer):
    """Guards against a step made of neighbouring rows of one long piece."""
    shards, _ = corpus(tmp_path, [40 * T])
    packed = packed_rows(shards, tokenizer, window=10000, shuffle=True)
    begins = [row[0] for row in take(packed, 39)]
    assert sorted(begins) != begins
    neighbours = sum(b - a == T for a, b in itertools.pairwise(begins))
    assert neighbours < 8


@pytest.mark.parametrize(
    ("block_size", "window", "shuffle", "group"),
    [
        (T, 0, False, 40),
        (T, 3, True, 1),
        (T, 3, True, 40),
        (T, 10000, True, 1 << 20),
        (100, 0, False, 1),
        (100, 3, True, 1 << 20),
    ],
)
def test_restored_anywhere_it_goes_on_as_if_never_stopped(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    block_size: int,
    window: int,
    shuffle: bool,
    group: int,
):
    """Guards against a resume that repeats or skips rows, or counts epochs anew."""
    monkeypatch.setattr(packing, "GROUP_TOKENS", group)
    shards, _ = corpus(tmp_path, LENGTHS)
    n = 24 if block_size == T else 4

    def continued(state: str, n: int) -> list[tuple[list[int], float, str, str]]:
        loaded = json.loads(state)
        packed = packed_rows(shards, tokenizer, block_size, 7, window, shuffle, loaded)
        return [
            (next_row(packed), packed.epochs, json.dumps(packed.seen), state_of(packed))
            for _ in range(n)
        ]

    def state_of(packed: PackedRows) -> str:
        return json.dumps(packed.state())

    whole = continued("null", n)
    assert whole[-1][1] > 2
    for cut in range(1, n):
        resumed = continued(whole[cut - 1][3], n - cut)
        assert [step[:3] for step in resumed] == [step[:3] for step in whole[cut:]]
        if cut % 5 == 0 and cut + 1 < n:  # stopped a second time
            again = continued(resumed[0][3], n - cut - 1)
            assert [step[:3] for step in again] == [step[:3] for step in whole[cut + 1 :]]


def test_epochs_grow_to_whole_ones(tmp_path: Path, tokenizer: Tokenizer):
    """Guards against a progress that jumps backwards within an epoch or beyond its end."""
    shards, _ = corpus(tmp_path, LENGTHS)
    packed = packed_rows(shards, tokenizer, window=3, shuffle=True)
    places = [packed.epochs]
    for _ in range(40):
        next_row(packed)
        places.append(packed.epochs)
    assert places == sorted(places)
    assert places[0] == 0 < places[1]
    assert {1.0, 2.0, 3.0} <= set(places)  # an epoch's last row ends it exactly


def test_rows_taken_together_are_the_rows_taken_one_by_one(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """Guards against rows lost or repeated where a step reaches over the end of a group."""
    monkeypatch.setattr(packing, "GROUP_TOKENS", 40)
    shards, _ = corpus(tmp_path, LENGTHS)
    single, many = (packed_rows(shards, tokenizer, window=3, shuffle=True) for _ in range(2))
    expected = take(single, 34)
    given = []
    for n in (1, 2, 3, 5, 8, 15):
        rows = many.take(n)
        assert rows.count == n * T
        tokens = np.concatenate([rows.inputs, rows.targets[:, -1:]], axis=1)
        given += tokens.tolist()
    assert given == expected
    assert many.seen == single.seen
    assert many.state() == single.state()


def test_documents_begin_where_their_eot_stands(tmp_path: Path, tokenizer: Tokenizer):
    """Guards against a document mask that is shifted, or open at a row's beginning."""
    shards, _ = corpus(tmp_path, LENGTHS)
    assert packed_rows(shards, tokenizer).take(3).starts is None
    rows = packed_rows(shards, tokenizer, document_mask=True).take(20)
    assert rows.starts is not None
    for row, starts in zip(rows.inputs.tolist(), rows.starts.tolist(), strict=True):
        assert starts == [i == 0 or token == tokenizer.eot for i, token in enumerate(row)]


def test_what_was_seen_is_counted_exactly(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """Guards against counts that include rows read ahead, lose those behind a resume, or count
    pieces as documents."""
    monkeypatch.setattr(packing, "GROUP_TOKENS", 40)
    monkeypatch.setattr(readers, "PIECE_BYTES", 16)
    shards, texts = corpus(tmp_path, LENGTHS)
    packed = packed_rows(shards, tokenizer)
    sequence = epoch_tokens(texts, tokenizer) * 3
    for n in range(1, 25):
        packed.take(1)
        (seen,) = packed.seen
        assert seen["tokens"] == n * T
        assert seen["documents"] == sequence[: n * T].count(tokenizer.eot)
        assert seen["epochs"] == packed.epochs
        assert packed.state()["seen"] == packed.seen
        if n % 7 == 0:
            packed = packed_rows(shards, tokenizer, state=json.loads(json.dumps(packed.state())))
            assert packed.seen == [seen]


def test_a_token_outside_the_vocabulary_names_its_document(tmp_path: Path, tokenizer: Tokenizer):
    """T5: guards against an index error in the model, which on a GPU kills the process."""
    paths = [tmp_path / "good.npy", tmp_path / "bad.npy"]
    for path, largest in zip(paths, (tokenizer.vocab_size - 1, tokenizer.vocab_size), strict=True):
        np.save(path, np.array([3] * 50 + [largest], dtype=np.uint16))
    files = [file for path in paths for file in resolve([SourceConfig(path=str(path))])]
    shards = [Shard(file, 0, 1, Split("none"), 0, 51) for file in files]
    assert packed_rows(shards[:1], tokenizer).take(5).inputs.max() < tokenizer.vocab_size
    with pytest.raises(DataError, match=f"bad.npy: token id {tokenizer.vocab_size} is outside"):
        packed_rows(shards, tokenizer).take(5)


def test_eot_stands_only_between_documents(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """Guards against separators inside a long document whose pieces the shuffle has parted, and
    against none between the pieces of two."""
    monkeypatch.setattr(readers, "PIECE_BYTES", 10)
    for lengths in ([100], [50, 50]):
        shards, texts = corpus(tmp_path, lengths)
        owner = {t: i for i, text in enumerate(texts) for t in tokenizer.encode(text)}
        packed = packed_rows(shards, tokenizer, window=10000, shuffle=False)
        tokens = [token for row in take(packed, 12) for token in row[:-1]]
        begins = 0  # the pieces that begin a document, which have one anyway
        for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
            if token == tokenizer.eot:
                begins += owner[before] == owner[after]
            else:
                assert tokenizer.eot in (before, after) or owner[token] == owner[after]
        assert begins <= len(lengths)


@pytest.mark.parametrize("length", [3, 16384])
def test_tokens_that_begin_with_eot_get_no_second_one(
    tmp_path: Path, tokenizer: Tokenizer, length: int
):
    """Guards against two separators where a tokenised corpus has its own, and against an eot
    inside a long document."""
    eot = tokenizer.eot
    documents = [[eot, *range(10, 10 + length % 100)] * (length // 100 + 1) for _ in range(3)]
    tokens = np.array([t for document in documents for t in document], dtype=np.uint16)
    np.save(tmp_path / "ids.npy", tokens)
    (file,) = resolve([SourceConfig(path=str(tmp_path / "ids.npy"))])
    pieces = -(-len(tokens) // 16384)
    shard = Shard(file, 0, pieces, Split("none"), 0, len(tokens), eot=eot)
    rows = take(packed_rows([shard], tokenizer), 2 * len(tokens) // T)
    assert [t for row in rows for t in row[:-1]] == (tokens.tolist() * 3)[: len(rows) * T]


def test_pieces_of_a_tokenised_file_do_not_run_into_each_other(
    tmp_path: Path, tokenizer: Tokenizer
):
    """Guards against two documents joined without eot, since all of a file have its name."""
    long = [[tokenizer.eot, *([10 + i] * 40_000)] for i in range(6)]
    np.save(tmp_path / "ids.npy", np.array([t for d in long for t in d], dtype=np.uint16))
    (file,) = resolve([SourceConfig(path=str(tmp_path / "ids.npy"))])
    size = 6 * 40_001
    pieces = -(-size // 16384)
    shards = [
        Shard(file, k, k + 1, Split("none"), 0, size, eot=tokenizer.eot) for k in range(pieces)
    ]
    packed = packed_rows(shards, tokenizer, block_size=1000, window=10000, shuffle=False)
    tokens = packed.take(240).inputs.ravel()
    joined = (
        (tokens[1:] != tokens[:-1]) & (tokens[1:] != tokenizer.eot) & (tokens[:-1] != tokenizer.eot)
    )
    assert not joined.any()
