"""Pieces and rows: nothing lost at any border, shards independent of each other, errors placed."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.schema import SourceConfig
from gptcli.data.files import SourceFile, resolve
from gptcli.data.readers import (
    PIECE_BYTES,
    SHARD_PIECES,
    Problems,
    Shard,
    Split,
    file_tail_start,
    read_shards,
    tail_start,
)
from gptcli.errors import DataError

WHOLE = Split("none")


def source_file(path: Path, **options: str) -> SourceFile:
    (file,) = resolve([SourceConfig.model_validate({"path": str(path), **options})])
    return file


def text_shard(file: SourceFile, start: int, stop: int, low: int, high: int) -> Shard:
    return Shard(file, start, stop, WHOLE, low, high)


def lines_of(characters: str, size: int, seed: int = 0) -> bytes:
    """About `size` bytes of lines of very different lengths."""
    rng, text = random.Random(seed), ""
    while len(text.encode()) < size:
        text += "".join(rng.choices(characters, k=rng.choice((0, 3, 80, 3000)))) + "\n"
    return text.encode()


FILES = {
    "empty": b"",
    "one character": b"x",
    "no line end": "é".encode() * 100_000,  # 2 bytes: some borders are inside a character
    "no line end, shifted": b"x" + "é".encode() * 100_000,
    "three bytes": "你".encode() * 60_000,
    "four bytes": b"abc" + "🙂".encode() * 50_000,
    "CRLF": b"line of text\r\n" * 12_000,
    "exactly a piece": b"a" * (PIECE_BYTES - 1) + b"\n",
    "exactly a piece without line end": b"a" * PIECE_BYTES,
    "one byte more": b"a" * PIECE_BYTES + b"b",
    "line end behind a piece": b"a" * PIECE_BYTES + b"\n" + b"b" * 10,
    "one line end early": b"a\n" + b"b" * 3 * PIECE_BYTES,
    "long last line": b"start\n" + b"word " * 600,
    "lines": lines_of("abc é你🙂", 300_000),
    "above 2 MiB": lines_of("abcdefgh 你", 2 * 1024 * 1024 + 12345),
    "invalid at the borders": b"\xe4\xbd" * 70_000 + b"\xff" * 70_000 + b"\x80" * 70_000,
    "cut character at the end": b"abc\n" + "🙂".encode()[:3],
}


@pytest.mark.parametrize("name", FILES)
def test_pieces_of_a_file_are_the_file(tmp_path: Path, name: str):
    """Guards against bytes lost, repeated or torn apart at a 64 KiB border."""
    data = FILES[name]
    (tmp_path / "a.txt").write_bytes(data)
    file = source_file(tmp_path / "a.txt")
    count = -(-len(data) // PIECE_BYTES)
    records = list(read_shards([text_shard(file, 0, count, 0, len(data))]))
    assert "".join(r["text"] for r in records) == data.decode("utf-8", "replace")
    assert sum(r["bytes"] for r in records) == len(data)
    assert all(r["bytes"] <= 2 * PIECE_BYTES for r in records)
    assert all(r["document"] == file.path for r in records)
    for record in records[:-1]:  # a piece ends inside a line only where a line fills 64 KiB
        last = record["text"].rpartition("\n")[2]
        assert not last or len(record["text"].encode()) > PIECE_BYTES - 4 or "invalid" in name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_shards_read_alone_equal_the_whole(tmp_path: Path, name: str, bom: bytes):
    """Guards against a shard, resumed or shuffled, that begins at another place than it should."""
    data = FILES[name]
    (tmp_path / "a.txt").write_bytes(bom + data)
    file = source_file(tmp_path / "a.txt")
    low, high = (0, len(data)) if len(data) < 9 else (4, len(data) - 4)  # as in a tail split
    count = -(-(high - low) // PIECE_BYTES)
    whole = list(read_shards([text_shard(file, 0, count, low, high)]))
    for step in (1, 3, SHARD_PIECES):
        shards = [
            text_shard(file, k, min(k + step, count), low, high) for k in range(0, count, step)
        ]
        backwards = [list(read_shards([shard])) for shard in reversed(shards)]
        assert [record for records in reversed(backwards) for record in records] == whole


def test_a_gzipped_file_reads_as_the_plain_one(tmp_path: Path):
    """Guards against archives that are cut at other places, or not at all."""
    data = FILES["lines"]
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data, 1))
    count = -(-len(data) // PIECE_BYTES)
    texts = [
        [r["text"] for r in read_shards([text_shard(source_file(p), 0, count, 0, len(data))])]
        for p in (tmp_path / "a.txt", tmp_path / "b.txt.gz")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", [n for n in FILES if "invalid" not in n and "cut" not in n])
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.5, 0.999])
def test_the_tail_begins_at_a_character_and_is_not_twice_as_long(
    tmp_path: Path, name: str, fraction: float
):
    """Guards against a held-out part torn inside a character or much larger than asked for."""
    data = FILES[name]
    (tmp_path / "a.txt").write_bytes(data)
    cut = tail_start(data, fraction)
    assert file_tail_start(source_file(tmp_path / "a.txt"), len(data), fraction) == cut
    data[:cut].decode()
    data[cut:].decode()
    exact = len(data) - int(len(data) * (1 - fraction))
    assert exact <= len(data) - cut <= 2 * exact + 3


@pytest.mark.parametrize(
    "place", [0, 5, PIECE_BYTES - 1, PIECE_BYTES, 3 * PIECE_BYTES + 7, (1 << 20) + 12]
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_is_placed_in_the_file(tmp_path: Path, place: int, bom: bytes):
    """Guards against an offset within the piece, or without the mark, reported as the file's."""
    data = bytearray(("x" * 99 + "\n").encode() * 12_000)
    data[place] = 0xFF
    (tmp_path / "a.txt").write_bytes(bom + data)
    file = source_file(tmp_path / "a.txt", on_bad_text="error")
    count = -(-len(data) // PIECE_BYTES)
    with pytest.raises(DataError, match=f"invalid UTF-8 at byte {place + len(bom)}$") as caught:
        list(read_shards([text_shard(file, 0, count, 0, len(data))]))
    assert str(tmp_path / "a.txt") in caught.value.message


def test_invalid_utf8_is_counted_when_replaced(tmp_path: Path):
    """Guards against silent repair, and against counting U+FFFD that the text itself contains."""
    (tmp_path / "a.txt").write_bytes(b"a\xffb\xfe " + "\ufffd".encode() + b" \xe4\xbd")
    problems = Problems()
    file = source_file(tmp_path / "a.txt")
    (record,) = read_shards([text_shard(file, 0, 1, 0, 11)], problems)
    assert record["text"] == "a\ufffdb\ufffd \ufffd \ufffd"
    assert problems.invalid_utf8 == {file.path: 3}


def rows_of(path: Path, problems: Problems | None = None, **options: str) -> list[dict[str, Any]]:
    shard = Shard(source_file(path, **options), 0, path.stat().st_size, WHOLE)
    return list(read_shards([shard], problems))


def write_rows(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("options", [{}, {"encoding": "utf-16"}])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n  \n"])
def test_row_shards_split_anywhere_hold_each_row_once(
    tmp_path: Path, line_end: str, options: dict[str, str]
):
    """Guards against rows lost or read twice where a shard's border is inside or before one."""
    texts = [f"row {i} é🙂\u2028{'x' * (i % 7)}" for i in range(20)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    content = line_end.join(lines)  # the last line has no end
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode(options.get("encoding", "utf-8")))
    file, size = source_file(path, **options), len(content.encode())
    for step in (1, 2, 7, 40, 41, size):
        shards = [Shard(file, k, min(k + step, size), WHOLE) for k in range(0, size, step)]
        assert [r["text"] for r in read_shards(shards)] == texts


def test_a_long_row_is_cut_into_pieces_of_one_document(tmp_path: Path):
    """Guards against a row of megabytes that arrives whole, or as several documents."""
    text = FILES["lines"].decode() + "你" * 70_000
    records = rows_of(write_rows(tmp_path / "a.jsonl", json.dumps({"text": text}), '{"text": "b"}'))
    first, second = records[:-1], records[-1]
    assert "".join(r["text"] for r in first) == text
    assert [r["part"] for r in first] == list(range(len(first)))
    assert all(r["bytes"] <= PIECE_BYTES for r in first)
    assert len({r["document"] for r in first}) == 1
    assert second["text"] == "b"
    assert second["document"] != first[0]["document"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "cut', "not a JSON row"),
        ("[" * 100_000, "not a JSON row"),
        ("[1, 2]", "must be a JSON object, not list"),
        ('{"title": "a", "body": "b"}', r"no field 'text' \(has: title, body\)"),
        ("{}", r"no field 'text' \(has: none\)"),
        ('{"text": 3}', "'text' is not text but int"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, line: str, problem: str):
    """Guards against errors without the line, or without the fields that the row does have."""
    path = write_rows(tmp_path / "a.jsonl", '{"text": "good"}', "", line, '{"text": "too"}')
    with pytest.raises(DataError, match=problem) as caught:
        rows_of(path)
    assert caught.value.message.startswith(f"{path}:3: ")
    problems = Problems()
    records = rows_of(path, problems, on_bad_row="skip")
    assert [r["text"] for r in records] == ["good", "too"]
    assert problems.skipped_rows == {str(path): 1}


def test_null_text_is_left_out_and_counted(tmp_path: Path):
    """Guards against the text `None`, and against rows that vanish without a word."""
    path = write_rows(tmp_path / "a.jsonl", '{"text": null}', '{"text": "a"}', '{"text": null}')
    problems = Problems()
    assert [r["text"] for r in rows_of(path, problems)] == ["a"]
    assert problems.null_rows == {str(path): 2}


def test_the_text_field_is_chosen_by_the_source(tmp_path: Path):
    """Guards against a fixed field name."""
    path = write_rows(tmp_path / "a.jsonl", '{"text": "a", "body": "b"}')
    assert [r["text"] for r in rows_of(path, text_field="body")] == ["b"]


def test_lone_surrogates_in_rows_are_repaired_and_counted(tmp_path: Path):
    r"""Guards against `\ud83d` of a text cut by an emoji becoming a question mark in silence."""
    path = write_rows(tmp_path / "a.jsonl", r'{"text": "a \ud83d b \ud83d\ude42 \udc00"}')
    problems = Problems()
    assert [r["text"] for r in rows_of(path, problems)] == ["a \ufffd b 🙂 \ufffd"]
    assert problems.invalid_utf8 == {str(path): 2}
    with pytest.raises(DataError, match="lone surrogate") as caught:
        rows_of(path, on_bad_text="error")
    assert caught.value.message.startswith(f"{path}:1: ")


def test_rows_stay_whole_for_finetuning(tmp_path: Path):
    """Guards against fields that the template needs being dropped, and missing ones found late."""
    path = write_rows(tmp_path / "a.jsonl", '{"q": "1+1", "a": "2", "extra": [1]}')
    size = path.stat().st_size
    shard = Shard(source_file(path), 0, size, WHOLE, fields=("q", "a"))
    (record,) = read_shards([shard])
    assert record["row"] == {"q": "1+1", "a": "2", "extra": [1]}
    bad = Shard(source_file(path), 0, size, WHOLE, fields=("q", "answer"))
    with pytest.raises(DataError, match=r"no field 'answer' \(has: q, a, extra\)") as caught:
        list(read_shards([bad]))
    assert caught.value.message.startswith(f"{path}:1: ")
