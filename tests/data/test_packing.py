"""Packing: every token of every epoch once, `eot` before each document, exactly resumable."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from gptcli.config.schema import SourceConfig
from gptcli.data import packing, readers
from gptcli.data.files import resolve
from gptcli.data.packing import PackedRows
from gptcli.data.readers import Shard, Split
from gptcli.data.stream import RecordStream
from gptcli.data.tokenizer import Tokenizer

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


def take(packed: PackedRows, n: int) -> list[list[int]]:
    return [packed.next().tokens.tolist() for _ in range(n)]


def rows_of_epochs(packed: PackedRows, epochs: int) -> list[list[int]]:
    rows = []
    while True:
        tokens = packed.next().tokens.tolist()
        if packed.epoch == epochs:
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
    packed = PackedRows(RecordStream(shards, 7, 0), tokenizer, block_size, 7, False)
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
    packed = PackedRows(RecordStream(shards, 7, 0), tokenizer, T, 7, False)
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
        packed = PackedRows(RecordStream(shards, seed, window), tokenizer, T, seed, True)
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
        packed = PackedRows(RecordStream(shards, 7, 0), tokenizer, T, 7, shuffle)
        begins: dict[int, set[int]] = {}
        for _ in range(59):
            row = packed.next()
            begins.setdefault(packed.epoch, set()).add(int(row.tokens[0]))
        assert [len(b) for b in begins.values()] == [4] + [5] * 11
        borders[shuffle] = {frozenset(b) for epoch, b in begins.items() if epoch}
    assert len(borders[False]) == 1
    assert len(borders[True]) > 5


def test_rows_of_a_group_are_shuffled(tmp_path: Path, tokenizer: Tokenizer):
    """Guards against a step made of neighbouring rows of one long piece."""
    shards, _ = corpus(tmp_path, [40 * T])
    packed = PackedRows(RecordStream(shards, 7, 10000), tokenizer, T, 7, True)
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

    def continued(state: str, n: int) -> list[tuple[list[int], int, float, str]]:
        loaded = json.loads(state)
        stream = RecordStream(shards, 7, window, loaded["stream"] if loaded else None)
        packed = PackedRows(stream, tokenizer, block_size, 7, shuffle, loaded)
        return [
            (packed.next().tokens.tolist(), packed.epoch, packed.epoch_bytes, state_of(packed))
            for _ in range(n)
        ]

    def state_of(packed: PackedRows) -> str:
        return json.dumps(packed.state())

    whole = continued("null", n)
    assert whole[-1][1] >= 2
    for cut in range(1, n):
        resumed = continued(whole[cut - 1][3], n - cut)
        assert [step[:3] for step in resumed] == [step[:3] for step in whole[cut:]]
        if cut % 5 == 0 and cut + 1 < n:  # stopped a second time
            again = continued(resumed[0][3], n - cut - 1)
            assert [step[:3] for step in again] == [step[:3] for step in whole[cut + 1 :]]


def test_epoch_bytes_grow_to_the_size_of_the_epoch(tmp_path: Path, tokenizer: Tokenizer):
    """Guards against a progress that jumps backwards within an epoch or beyond its end."""
    shards, texts = corpus(tmp_path, LENGTHS)
    size = sum(len(text.encode()) for text in texts)
    packed = PackedRows(RecordStream(shards, 7, 3), tokenizer, T, 7, True)
    places = []
    for _ in range(40):
        packed.next()
        places.append((packed.epoch, packed.epoch_bytes))
    assert places == sorted(places)
    assert max(read for _, read in places) == size
    assert min(read for _, read in places) > 0
