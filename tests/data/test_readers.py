"""Pieces and rows: nothing lost at any border, shards independent of each other, errors placed."""

import gzip
import json
import lzma
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gptcli.config.data_schema import SourceConfig
from gptcli.data.files import SourceFile, resolve
from gptcli.data.layout import layout
from gptcli.data.lines import HELD_BYTES
from gptcli.data.readers import content_hash, file_tail_start, read_shards, tail_start
from gptcli.data.row_fields import RowFields
from gptcli.data.shards import (
    MAX_ROW_BYTES,
    PIECE_BYTES,
    SHARD_BYTES,
    SHARD_PIECES,
    Problems,
    Shard,
    Split,
)
from gptcli.errors import DataError

WHOLE = Split("none")


def source_file(path: Path, **options: str) -> SourceFile:
    (file,) = resolve([SourceConfig.model_validate({"path": str(path), **options})])
    return file


def text_shard(file: SourceFile, start: int, stop: int, low: int, high: int) -> Shard:
    return Shard(file, start, stop, WHOLE, low, high)


def records_of(file: SourceFile, problems: Problems | None = None) -> list[dict[str, Any]]:
    """All records of a file, read as one shard."""
    size = layout(file, problems or Problems()).size
    count = -(-size // PIECE_BYTES) if file.kind in ("text", "binary") else size
    return list(read_shards([Shard(file, 0, count, WHOLE, high=size)], problems))


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


PACK = {
    ".gz": lambda data: gzip.compress(data, 1),
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".xz": lambda data: lzma.compress(data, preset=0),
}


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("kind", ["text", "line", "paragraph", "jsonl", "csv", "tsv"])
def test_an_archive_reads_as_the_plain_file(tmp_path: Path, ending: str, encoding: str, kind: str):
    """Guards against archives or encodings that are cut at other places, or not at all."""
    text = FILES["lines"].decode()
    documents = [text[i : i + 9000] for i in range(0, len(text), 9000)]
    options = {"document": kind} if kind in ("line", "paragraph") else {}
    content, suffix = text, ".txt"
    if kind == "jsonl":
        content = "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents)
        suffix = ".jsonl"
    elif kind in ("csv", "tsv"):
        rows = ["text,n", *(f'"{d}",{i}' for i, d in enumerate(documents))]
        content = "\n".join(row.replace(",", "\t") if kind == "tsv" else row for row in rows)
        suffix = f".{kind}"
    (tmp_path / f"a{suffix}").write_bytes(content.encode())
    (tmp_path / f"b{suffix}{ending}").write_bytes(PACK[ending](content.encode(encoding)))
    plain = records_of(source_file(tmp_path / f"a{suffix}", **options))
    packed = records_of(source_file(tmp_path / f"b{suffix}{ending}", encoding=encoding, **options))
    if kind in ("jsonl", "csv"):
        whole = "".join(record["text"] for record in plain)
        assert whole == "".join(d for d in documents if d.strip())
    assert len(plain) > 3
    for one, other in zip(plain, packed, strict=True):
        assert one | {"document": ""} == other | {"document": ""}


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
    """D5: guards against an offset within the piece, or without the mark, told as the file's."""
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
        ('{"text": ["a"]}', "'text' is not text but list"),
        ('{"text": {"a": "b"}}', "'text' is not text but dict"),
        ('{"text": "a"} {"text": "b"}', "not a JSON row"),
        ('{"text": 1' + "0" * 5000 + "}", "not a JSON row"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, line: str, problem: str):
    """D6, D7: guards against errors without the line, or without the fields that the row has."""
    path = write_rows(tmp_path / "a.jsonl", '{"text": "good"}', "", line, '{"text": "too"}')
    with pytest.raises(DataError, match=problem) as caught:
        rows_of(path)
    assert caught.value.message.startswith(f"{path}:3: ")
    problems = Problems()
    records = rows_of(path, problems, on_bad_row="skip")
    assert [r["text"] for r in records] == ["good", "too"]
    assert problems.skipped_rows == {str(path): 1}


def test_null_text_is_left_out_and_counted(tmp_path: Path):
    """D7: guards against the text `None`, and against rows that vanish without a word."""
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
    shard = Shard(source_file(path), 0, size, WHOLE, fields=RowFields.texts("q", "a"))
    (record,) = read_shards([shard])
    assert record["row"] == {"q": "1+1", "a": "2", "extra": [1]}
    bad = Shard(source_file(path), 0, size, WHOLE, fields=RowFields.texts("q", "answer"))
    with pytest.raises(DataError, match=r"no field 'answer' \(has: q, a, extra\)") as caught:
        list(read_shards([bad]))
    assert caught.value.message.startswith(f"{path}:1: ")


def test_a_row_of_gigabytes_is_a_bad_row(tmp_path: Path):
    """D6: guards against a line without end that fills the memory before it is refused."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as f:
        f.write(b'{"text": "a"}\n')
        f.write(b'{"text": "')
        f.truncate(f.tell() + MAX_ROW_BYTES)  # zero bytes, of which no disk space is used
        f.seek(0, 2)
        f.write(b'\n{"text": "b"}\n')
    with pytest.raises(DataError, match=rf"a row of {MAX_ROW_BYTES + 11} bytes, more") as caught:
        rows_of(path)
    assert caught.value.message.startswith(f"{path}:2: ")
    problems = Problems()
    assert [r["text"] for r in rows_of(path, problems, on_bad_row="skip")] == ["a", "b"]
    assert problems.skipped_rows == {str(path): 1}


def test_records_say_where_they_come_from(tmp_path: Path):
    """Guards against records that the token cache or the mixture cannot tell apart."""
    path = write_rows(tmp_path / "a.jsonl", '{"text": "a"}', "", '{"text": "b"}')
    (tmp_path / "b.txt").write_bytes(b"x\n" * PIECE_BYTES)
    first, second = resolve([SourceConfig(path=str(p)) for p in (path, tmp_path / "b.txt")])
    rows, pieces = records_of(first), records_of(second)
    assert [(r["number"], r["part"], r["source"]) for r in rows] == [(0, 0, 0), (15, 0, 0)]
    assert [(r["number"], r["part"], r["source"]) for r in pieces] == [(0, 0, 1), (1, 1, 1)]
    assert {r["document"] for r in pieces} == {str(tmp_path / "b.txt")}
    dropped = replace(Shard(first, 0, 99, WHOLE), dropped=frozenset({0}))
    assert [r["text"] for r in read_shards([dropped])] == ["b"]


def test_control_bytes_are_text(tmp_path: Path):
    """D19: guards against NUL and ESC that are cut out, or that end a text."""
    text = "a\0b\x1b[31mc\x07\x0c\x85d\u2028e\n"
    (tmp_path / "a.txt").write_text(text, newline="")
    write_rows(tmp_path / "a.jsonl", json.dumps({"text": text}))
    for name in ("a.txt", "a.jsonl"):
        assert [r["text"] for r in records_of(source_file(tmp_path / name))] == [text]
    assert [r["text"] for r in records_of(source_file(tmp_path / "a.txt", document="line"))] == [
        text[:-1]
    ]


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 17 * PIECE_BYTES + 5])
def test_binary_is_cut_exactly(tmp_path: Path, size: int):
    """Guards against bytes that are decoded, or cut at line ends."""
    data = random.Random(0).randbytes(size)
    (tmp_path / "a.png").write_bytes(data)
    file = source_file(tmp_path / "a.png", encoding="binary")
    records = records_of(file)
    assert b"".join(r["text"] for r in records) == data
    assert [r["bytes"] for r in records[:-1]] == [PIECE_BYTES] * max(len(records) - 1, 0)
    assert [r["part"] for r in records] == list(range(len(records)))
    low, high = size // 3, size - size // 5
    count = -(-(high - low) // PIECE_BYTES)
    shards = [Shard(file, k, k + 1, WHOLE, low, high) for k in range(count)]
    assert b"".join(r["text"] for r in read_shards(shards)) == data[low:high]


@pytest.mark.parametrize(
    ("row", "text_field", "text"),
    [
        ({"article": {"body": "inner"}}, "article.body", "inner"),
        ({"article.body": "own", "article": {"body": "inner"}}, "article.body", "own"),
        ({"a": {"b": {"c": "deep"}}}, "a.b.c", "deep"),
    ],
)
def test_a_field_may_be_inside_another(
    tmp_path: Path, row: dict[str, Any], text_field: str, text: str
):
    """Guards against corpora whose text is not at the top, and against names that have dots."""
    path = write_rows(tmp_path / "a.jsonl", json.dumps(row))
    assert [r["text"] for r in rows_of(path, text_field=text_field)] == [text]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"article": {"title": "t", "date": 3}},
            r"no field 'article.body' \(has: article.title",
        ),
        ({"title": "t"}, r"no field 'article.body' \(has: title\)"),
        ({"article": "t"}, "field 'article' has no fields: it is str"),
        ({"article": {"body": 3}}, "field 'article.body' is not text but int"),
    ],
)
def test_a_field_that_is_not_inside_another(tmp_path: Path, row: dict[str, Any], problem: str):
    """D7: guards against a KeyError, and against a message without the names that there are."""
    path = write_rows(tmp_path / "a.jsonl", json.dumps(row))
    with pytest.raises(DataError, match=problem) as caught:
        rows_of(path, text_field="article.body")
    assert caught.value.message.startswith(f"{path}:1: ")


def test_null_inside_a_field_is_null(tmp_path: Path):
    """D7: guards against an error for rows that have no article at all."""
    path = write_rows(tmp_path / "a.jsonl", '{"article": null}', '{"article": {"body": null}}')
    problems = Problems()
    assert rows_of(path, problems, text_field="article.body") == []
    assert problems.null_rows == {str(path): 2}


LONG = ("word " * 100 + "你好🙂") * (HELD_BYTES // 400)  # 20 % above what is held in memory
LINES = ["short", "", LONG, "  \t", "one more", LONG[5:], "é" * 70_000, "", "", "the last"]


@pytest.mark.parametrize("document", ["line", "paragraph"])
@pytest.mark.parametrize("split", ["none", "tail", "hash"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_long_lines_come_in_parts(tmp_path: Path, document: str, split: str, line_end: str):
    """Guards against text lost, doubled or torn where a line is too long to be held, against
    another split of it, and against a shard's border inside."""
    path = tmp_path / "a.txt"
    path.write_bytes(line_end.join(LINES).encode())
    file = source_file(path, document=document)
    found = layout(file, Problems())
    joined = LINES if document == "line" else line_end.join(LINES).split(line_end * 2)
    joined = joined if document == "line" else paragraphs_of(LINES, line_end)
    documents = [text for text in joined if text.strip()]
    hashes = sorted(content_hash(text) for text in documents)
    parts = {}
    for part in ("train", "val"):
        kind = Split(split, part, 0.1, hashes[2])  # type: ignore[arg-type]
        whole = list(read_shards([Shard(file, 0, found.size, kind)]))
        starts = found.borders or range(0, found.size, 300_000)
        shards = [
            Shard(file, low, high, kind)
            for low, high in zip(starts, [*starts[1:], found.size], strict=True)
        ]
        assert [r for shard in shards for r in read_shards([shard])] == whole
        assert all(0 < r["bytes"] <= PIECE_BYTES for r in whole)
        assert all(r["bytes"] == len(r["text"].encode()) for r in whole)
        assert {r["digest"] for r in whole} <= set(hashes)
        pieces: dict[int, list[str]] = {}
        for record in whole:
            pieces.setdefault(record["number"], []).append(record["text"])
        parts[part] = {number: "".join(texts) for number, texts in pieces.items()}
    if split == "none":
        assert list(parts["train"].values()) == documents
    elif split == "tail":
        both = [parts["train"].get(n, "") + parts["val"][n] for n in parts["val"]]
        assert both == documents
    else:
        assert sorted([*parts["train"].values(), *parts["val"].values()]) == sorted(documents)
        assert len(parts["val"]) == 2


def paragraphs_of(lines: list[str], line_end: str) -> list[str]:
    """The runs of lines that are not blank."""
    runs: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            runs[-1].append(line)
        else:
            runs.append([])
    return [line_end.join(run) for run in runs if run]


def test_paragraph_shards_begin_at_borders(tmp_path: Path):
    """Guards against paragraphs torn at a border, and against one shard for a whole corpus."""
    rng = random.Random(1)
    lines = [rng.choice(["", " \t", "a line " * rng.randrange(400)]) for _ in range(9000)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines), newline="")
    file = source_file(path, document="paragraph")
    found = layout(file, Problems())
    assert found.borders is not None
    assert len(found.borders) > 3
    gaps = [b - a for a, b in zip(found.borders, [*found.borders[1:], found.size], strict=True)]
    assert all(SHARD_BYTES <= gap < 3 * SHARD_BYTES for gap in gaps[:-1])
    texts = [
        record["text"]
        for low, gap in zip(found.borders, gaps, strict=True)
        for record in read_shards([Shard(file, low, low + gap, WHOLE)])
    ]
    assert texts == paragraphs_of(lines, "\n")


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_one_line_of_a_whole_file_needs_little_memory(tmp_path: Path, document: str):
    """Guards against a reader that finishes the line in memory: 20 MB here, gigabytes elsewhere."""
    path = tmp_path / "a.txt"
    with path.open("wb") as f:
        for _ in range(20):
            f.write(b"0123456789abcdef" * 62_500)
    file = source_file(path, document=document)
    records_of(file)  # what is imported or cached once is not the reader's
    tracemalloc.start()
    try:
        count = -(-20_000_000 // PIECE_BYTES) if document == "file" else 20_000_000
        step = SHARD_PIECES if document == "file" else SHARD_BYTES
        size = 0
        for low in range(0, count, step):
            shard = Shard(file, low, min(low + step, count), WHOLE, high=20_000_000)
            size += sum(record["bytes"] for record in read_shards([shard]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 20_000_000
    assert peak < 5 * HELD_BYTES
