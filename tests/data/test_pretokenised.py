"""Files of token ids: each format read exactly, each damaged one named."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.config.data_schema import SourceConfig
from gptcli.data import pretokenised
from gptcli.data.files import SourceFile
from gptcli.data.pretokenised import PIECE_TOKENS, read_tokens, token_count
from gptcli.data.shards import Shard, Split
from gptcli.errors import DataError

EOT = 50256
GPT2_HEADER, LLAMA3_HEADER = (20240520, 1), (20240801, 7)


def header(magic: int, version: int, count: int) -> bytes:
    return struct.pack("<3i", magic, version, count).ljust(1024, b"\0")


def write(path: Path, ids: np.ndarray, kind: str) -> Path:
    """The ids in one of the formats that are read."""
    path = path / f"{kind}{'.bin' if '.c' in kind or kind == 'nanoGPT' else '.npy'}"
    if kind == "nanoGPT":
        ids.astype("<u2").tofile(path)
    elif kind == "llm.c gpt-2":
        path.write_bytes(header(*GPT2_HEADER, len(ids)) + ids.astype("<u2").tobytes())
    elif kind == "llm.c llama-3":
        path.write_bytes(header(*LLAMA3_HEADER, len(ids)) + ids.astype("<u4").tobytes())
    else:
        np.save(path, ids.astype(kind))
    return path


FORMATS = ["nanoGPT", "llm.c gpt-2", "llm.c llama-3", "uint16", "int32", "uint32", "int64"]


def token_file(path: Path) -> SourceFile:
    return SourceFile(SourceConfig(path=str(path)), str(path), "tokens", 3)


def shard(path: Path, eot: int | None = EOT, low: int = 0, high: int | None = None) -> Shard:
    """All of [low, high) as one shard."""
    file = token_file(path)
    high = token_count(file) if high is None else high
    return Shard(file, 0, -(-(high - low) // PIECE_TOKENS), Split("none"), low, high, eot=eot)


def documents(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 50000, n) for n in lengths]


def packed(records: list[dict[str, Any]]) -> list[int]:
    """What the packer makes of records: an eot before each that begins a document."""
    ids: list[int] = []
    for record in records:
        ids += [EOT] * (record["part"] == 0) + record["tokens"].tolist()
    return ids


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_tokens(tmp_path: Path, kind: str):
    """Guards against a header read as tokens, a wrong width of ids, or ids lost at the borders."""
    texts = documents([5, 30000, 1, 9000, 12000, 40000, 7])
    ids = np.concatenate([[EOT, *text] for text in texts])
    path = write(tmp_path, ids, kind)
    records = list(read_tokens(shard(path)))
    assert token_count(token_file(path)) == len(ids)
    assert packed(records) == ids.tolist()
    assert {record["tokens"].dtype.name for record in records} <= {"uint16", "uint32"}
    itemsize = {"uint16": 2, "nanoGPT": 2, "llm.c gpt-2": 2, "int64": 8}.get(kind, 4)
    assert sum(record["bytes"] for record in records) == itemsize * len(ids)
    assert {record["source"] for record in records} == {3}


def test_an_eot_behind_each_document_makes_the_same_sequence_as_one_before(tmp_path: Path):
    """Guards against two separators in a row where nanoGPT's files end and the next begins."""
    texts = documents([700, 20000, 3, 50000])
    before = write(tmp_path, np.concatenate([[EOT, *text] for text in texts]), "uint16")
    behind = write(tmp_path, np.concatenate([[*text, EOT] for text in texts]), "nanoGPT")
    assert packed(list(read_tokens(shard(before)))) == packed(list(read_tokens(shard(behind))))


@pytest.mark.parametrize("seed", range(4))
def test_each_piece_is_found_alone_and_begins_a_document_where_it_can(tmp_path: Path, seed: int):
    """Guards against pieces that depend on what was read before, and against cut documents."""
    random = np.random.default_rng(seed)
    texts = documents(random.integers(1, [60, 3000, 30000, 90000][seed], 40).tolist(), seed)
    ids = np.concatenate([[EOT, *text] for text in texts])
    low = 17 * seed
    whole = shard(write(tmp_path, ids, "uint32"), low=low)
    records = list(read_tokens(whole))
    alone = [
        record
        for k in range(whole.stop)
        for record in read_tokens(
            Shard(whole.file, k, k + 1, Split("none"), low, len(ids), eot=EOT)
        )
    ]
    assert [(r["part"], r["number"], r["tokens"].tolist()) for r in records] == [
        (r["part"], r["number"], r["tokens"].tolist()) for r in alone
    ]
    # By reading everything: the last eot of each 16384 tokens is where a piece begins.
    borders = {low, len(ids)}
    for line in range(low, len(ids) - PIECE_TOKENS, PIECE_TOKENS):
        eots = np.flatnonzero(ids[line : line + PIECE_TOKENS] == EOT)
        borders.add(line + (int(eots[-1]) if len(eots) else PIECE_TOKENS))
    expected = [ids[a:b] for a, b in zip(sorted(borders), sorted(borders)[1:], strict=False)]
    assert [len(e) * 4 for e in expected] == [r["bytes"] for r in records]
    for record, piece in zip(records, expected, strict=True):
        begins = piece[0] == EOT
        assert (record["part"] == 0) == (begins or record["number"] == 0)
        assert record["tokens"].tolist() == piece[int(begins) :].tolist()


def test_without_an_eot_pieces_are_as_long_as_can_be(tmp_path: Path):
    """Guards against ids taken for separators when the tokenizer is not known."""
    ids = np.arange(40000) % 7
    records = list(read_tokens(shard(write(tmp_path, ids, "uint16"), eot=None)))
    assert [len(r["tokens"]) for r in records] == [PIECE_TOKENS, PIECE_TOKENS, 40000 % PIECE_TOKENS]
    assert [r["part"] for r in records] == [0, 1, 2]
    assert np.concatenate([r["tokens"] for r in records]).tolist() == ids.tolist()


def test_separators_alone_are_no_documents(tmp_path: Path):
    """Guards against empty records, which would count as documents."""
    path = write(tmp_path, np.array([EOT, EOT]), "uint16")
    assert list(read_tokens(shard(path))) == []
    assert len(list(read_tokens(shard(write(tmp_path, np.array([EOT, 5, EOT]), "nanoGPT"))))) == 1


BAD = {
    "empty.bin": b"",
    "odd.bin": b"\1\2\3",
    "version.bin": header(20240520, 2, 1) + b"\1\0",
    "truncated.bin": header(*GPT2_HEADER, 10) + b"\1\0" * 9,
    "longer.bin": header(*LLAMA3_HEADER, 1) + b"\1\0\0\0" * 2,
    "negative.bin": header(*GPT2_HEADER, -1),
    "evaluation.bin": header(20240522, 1, 1) + b"\1\0",
    "header-cut.bin": header(*GPT2_HEADER, 1)[:600],
    "empty.npy": b"",
    "text.npy": b"not an array",
}
BAD_ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "2d.npy": np.zeros((3, 4), np.uint16),
    "float.npy": np.zeros(4),
    "uint8.npy": np.zeros(4, np.uint8),
    "big-endian.npy": np.zeros(4, ">u2"),
    "none.npy": np.zeros(0, np.uint16),
    "objects.npy": np.array([{}, {}], dtype=object),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_ARRAYS, "cut.npy", "archive.npy", "missing.npy"])
def test_a_file_that_is_no_list_of_tokens_is_named(tmp_path: Path, name: str):
    """D8: a truncated file or a wrong kind ended in numpy's own error or was read as tokens."""
    path = tmp_path / name
    if name in BAD:
        path.write_bytes(BAD[name])
    elif name in BAD_ARRAYS:
        np.save(path, BAD_ARRAYS[name], allow_pickle=True)
    elif name == "cut.npy":
        np.save(path, np.zeros(1000, np.uint16))
        path.write_bytes(path.read_bytes()[:-1])
    elif name == "archive.npy":
        with path.open("wb") as f:
            np.savez(f, ids=np.zeros(4, np.uint16))
    with pytest.raises(DataError, match=str(path)):
        token_count(token_file(path))


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_an_id_that_cannot_be_one_is_named_with_its_place(tmp_path: Path, bad: int):
    """T5: a negative id became a huge one in a cast, and the model read outside its table."""
    ids = np.arange(20000)
    ids[17000] = bad
    with pytest.raises(DataError, match=f"{bad} at place 17000"):
        list(read_tokens(shard(write(tmp_path, ids, "int64"), eot=None)))


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path):
    """D14: a file replaced while a run reads it gave other tokens without a word."""
    whole = shard(write(tmp_path, np.arange(20000), "uint16"))
    write(tmp_path, np.arange(10000), "uint16")
    with pytest.raises(DataError, match="changed while it was read"):
        list(read_tokens(whole))


def test_the_header_numbers_are_no_tokens_of_gpt2():
    """Guards against a file of nanoGPT that is taken for one of llm.c."""
    for magic in [*pretokenised._LLMC, pretokenised._LLMC_EVAL_MAGIC]:
        assert magic & 0xFFFF > EOT
