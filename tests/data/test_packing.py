"""Packed rows: no token dropped, none twice, exact cuts."""

import json
from collections import Counter
from pathlib import Path

import pytest

from gptcli.config.schema import DataConfig
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.packing import PackedRows
from gptcli.data.stream import RecordStream
from gptcli.data.tokenizer import Tokenizer

BLOCK = 16
EOT = 256
TOKENIZER = Tokenizer.of_bytes()


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Corpus]:
    """One file of many pieces, rows of which some are shorter than a block, and one short file."""
    for name in ("readers", "corpus"):
        for constant, size in (("PIECE_BYTES", 60), ("SHARD_PIECES", 3), ("SHARD_BYTES", 180)):
            monkeypatch.setattr(f"gptcli.data.{name}.{constant}", size)
    monkeypatch.setattr("gptcli.data.packing.GROUP_TOKENS", 5 * BLOCK)
    (tmp_path / "book.txt").write_text("".join(f"{i * i} is a line\n" for i in range(40)))
    rows = [{"text": f"{i}:" + f"{i * 7919} " * (i % 6)} for i in range(14)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "short.txt").write_text("not even two blocks")
    (tmp_path / "val.txt").write_text("held out")

    def opened(name: str) -> Corpus:
        source = {"train": str(tmp_path / name), "val": str(tmp_path / "val.txt")}
        return open_corpus(DataConfig.model_validate(source))

    return {name: opened(name) for name in ("book.txt", "rows.jsonl", "short.txt")}


def packed(corpus: Corpus, window: int, state: dict[str, object] | None = None) -> PackedRows:
    stream = RecordStream(corpus.train, 5, window, state["stream"] if state else None)  # type: ignore[arg-type]
    return PackedRows(stream, TOKENIZER, BLOCK, 5, window > 0, state)


def epoch_tokens(stream: RecordStream) -> list[int]:
    """The oracle: an epoch's records in the stream's order, `eot` before each document."""
    tokens: list[int] = []
    document = None
    while (record := stream.next()) is not None:
        if record["part"] == 0 or record["document"] != document:
            tokens.append(EOT)
        document = record["document"]
        tokens += record["text"].encode()
    return tokens


def cut(tokens: list[int]) -> list[tuple[int, ...]]:
    """Row k covers tokens [kT, kT + T]."""
    rows = (len(tokens) - 1) // BLOCK
    return [tuple(tokens[k * BLOCK : k * BLOCK + BLOCK + 1]) for k in range(rows)]


CORPORA = ["book.txt", "rows.jsonl", "short.txt"]


@pytest.mark.parametrize("kind", CORPORA)
def test_rows_in_order(kind: str, corpora: dict[str, Corpus]) -> None:
    """Bug: tokens at the end of a group or epoch are dropped, or eot stands inside a document."""
    stream = RecordStream(corpora[kind].train, 5, 0)
    expected = cut([t for _ in range(4) for t in epoch_tokens(stream)])
    rows = packed(corpora[kind], 0)
    found = [tuple(rows.next().tokens.tolist()) for _ in expected]
    assert found == expected
    text = b"".join(bytes(t for t in row[:-1] if t != EOT) for row in found)
    if kind == "book.txt":
        assert sum(row[:-1].count(EOT) for row in found) == 4  # one a pass over the one document
        assert text.startswith(b"0 is a line\n1 is a line\n4 is a line\n")


@pytest.mark.parametrize("kind", CORPORA)
def test_rows_shuffled(kind: str, corpora: dict[str, Corpus]) -> None:
    """Bug: shuffled rows or the moved start of an epoch lose tokens or use some twice."""
    stream = RecordStream(corpora[kind].train, 5, 3)
    rows = packed(corpora[kind], 3)
    sequence: list[int] = []
    offsets = []
    produced: list[tuple[int, ...]] = []
    for _ in range(3):
        epoch = epoch_tokens(stream)
        # The epoch begins at some offset below the block size; find it by its rows.
        count = (len(sequence) + len(epoch) - 1) // BLOCK - len(produced)
        produced += [tuple(rows.next().tokens.tolist()) for _ in range(count)]
        fits = [
            offset
            for offset in range(BLOCK)
            if Counter(cut(sequence + epoch[offset:] + epoch[:offset])) == Counter(produced)
        ]
        assert fits
        offsets.append(fits[0])
        sequence += epoch[fits[0] :] + epoch[: fits[0]]
    assert len(produced) == (len(sequence) - 1) // BLOCK
    assert produced != cut(sequence) or kind == "short.txt"  # they are shuffled
    assert len(set(offsets)) > 1  # block borders move from epoch to epoch


@pytest.mark.parametrize("window", [0, 3, 10_000])
@pytest.mark.parametrize("kind", CORPORA)
def test_cut_anywhere(kind: str, window: int, corpora: dict[str, Corpus]) -> None:
    """Bug: the remainder of a row, the epoch's head or the place in a group is not restored."""
    rows = packed(corpora[kind], window)
    total = 25
    straight = [tuple(rows.next().tokens.tolist()) for _ in range(total + 60)]
    rows = packed(corpora[kind], window)
    for k in range(total):
        resumed = packed(corpora[kind], window, json.loads(json.dumps(rows.state())))
        ahead = k % 4 if k % 9 else 50
        found = [tuple(resumed.next().tokens.tolist()) for _ in range(ahead)]
        assert found == straight[k : k + ahead]
        again = packed(corpora[kind], window, json.loads(json.dumps(resumed.state())))
        assert tuple(again.next().tokens.tolist()) == straight[k + ahead]
        rows.next()


@pytest.mark.parametrize("kind", CORPORA)
def test_progress_through_epochs(kind: str, corpora: dict[str, Corpus]) -> None:
    """Bug: max_epochs ends a run too early or never, because the count jumps or goes back."""
    corpus = corpora[kind]
    rows = packed(corpus, 3)
    reached = 0.0
    tokens = 0
    for _ in range(150):
        tokens += len(rows.next().tokens) - 1
        now = rows.epoch + min(rows.epoch_bytes / corpus.train_bytes, 1.0)
        assert now >= reached
        reached = now
    assert reached > 2.5
    assert tokens / reached == pytest.approx(corpus.train_bytes + corpus.documents, rel=0.25)


def test_eot_is_only_ours(tmp_path: Path) -> None:
    """Bug: `<|endoftext|>` in a document becomes the real token and cuts it in two."""
    path = tmp_path / "a.txt"
    path.write_text("before <|endoftext|> after " * 20)
    rows = packed(open_corpus(DataConfig.model_validate({"train": str(path)})), 0)
    tokens = [t for _ in range(20) for t in rows.next().tokens[1:].tolist()]
    assert EOT not in tokens
