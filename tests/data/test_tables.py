"""Tables: the rows that were written, from any border, and damage told with the file's name."""

import contextlib
import csv
import datetime
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli.config.data_schema import SourceConfig
from gptcli.data.files import SourceFile, resolve
from gptcli.data.layout import layout
from gptcli.data.readers import content_hash, read_shards
from gptcli.data.row_fields import RowFields
from gptcli.data.shards import Problems, Shard, Split
from gptcli.errors import DataError

WHOLE = Split("none")


def source_file(path: Path, **options: Any) -> SourceFile:
    (file,) = resolve([SourceConfig.model_validate({"path": str(path), **options})])
    return file


def read(
    path: Path,
    problems: Problems | None = None,
    fields: tuple[str, ...] | None = None,
    **options: Any,
) -> list[Any]:
    """The texts of a file, or its rows, read at once."""
    file = source_file(path, **options)
    size = layout(file, Problems()).size
    records = read_shards([Shard(file, 0, size, WHOLE, fields=fields)], problems)
    return [r["text"] if fields is None else r["row"] for r in records]


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.message.startswith(str(path))
    return caught.value.message.removeprefix(str(path))


def texts_of(n: int) -> list[str]:
    rng = random.Random(n)
    some = ["a, b", 'said "so"', "line\nline", "line\r\nline", "tab\there", "你好🙂", " x ", "\x1b"]
    return [f"{i} " + "".join(rng.choices(some, k=rng.randrange(1, 60))) for i in range(n)]


def write(path: Path, texts: list[str], **more: list[Any]) -> Path:
    """A table of this kind with the columns n, text and `more`."""
    columns = {"n": list(range(len(texts))), "text": texts, **more}
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        return path
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=300)
        return path
    new = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
    with path.open("wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    return path


KINDS = ["a.csv", "a.tsv", "a.parquet", "a.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", KINDS)
def test_tables_hold_what_was_written_from_every_border(tmp_path: Path, name: str):
    """Guards against rows lost, doubled or torn where a shard begins, above all inside quotes."""
    texts = texts_of(10_000)
    file = source_file(write(tmp_path / name, texts))
    found = layout(file, Problems())
    assert found.borders is not None
    assert len(found.borders) > 1
    ranges = list(zip(found.borders, [*found.borders[1:], found.size], strict=True))
    records = [r for low, high in ranges for r in read_shards([Shard(file, low, high, WHOLE)])]
    assert [r["text"] for r in records] == texts
    assert len({r["number"] for r in records}) == len(texts)
    assert list(read_shards([Shard(file, 0, found.size, WHOLE)])) == records
    assert all(r["bytes"] == len(r["text"].encode()) for r in records)
    dropped = frozenset(r["number"] for r in records[5:])
    kept = read_shards([Shard(file, 0, found.size, WHOLE, dropped=dropped)])
    assert [r["text"] for r in kept] == texts[:5]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_typed_tables_can_be_cut_anywhere(tmp_path: Path, name: str):
    """Guards against shards that must be whole row groups."""
    texts = texts_of(1000)
    file = source_file(write(tmp_path / name, texts))
    for start, end in ((0, 1), (299, 301), (300, 600), (3, 999), (901, 1000), (1000, 1000)):
        given = [r["text"] for r in read_shards([Shard(file, start, end, WHOLE)])]
        assert given == texts[start:end]


@pytest.mark.parametrize("name", KINDS)
def test_whole_rows_for_finetuning(tmp_path: Path, name: str):
    """Guards against columns that a template needs left unread, and dates that cannot be hashed."""
    day = datetime.date(2024, 1, 1)
    path = write(tmp_path / name, ["q1", "q2"], answer=["a1", "a2"], day=[day, day])
    rows = read(path, fields=RowFields.texts("text", "answer"))
    typed = "." in name and not name.endswith("sv")
    assert rows[1] == {
        "n": 1 if typed else "1",
        "text": "q2",
        "answer": "a2",
        "day": day if typed else "2024-01-01",
    }
    assert content_hash(rows[0]) != content_hash(rows[1])
    assert "no field 'reply' (has: n, text, answer, day)" in refused(
        path, fields=RowFields.texts("reply")
    )
    if typed:
        assert refused(path, fields=RowFields.texts("n")).startswith(
            " row 0: field 'n' is not text but int"
        )


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_text_column_lists_those_there_are(tmp_path: Path, name: str):
    """D7: guards against a KeyError, and against 0 rows without a word."""
    path = write(tmp_path / name, ["a"])
    assert "no field 'body' (has: n, text)" in refused(path, text_field="body")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "int64"),
        ([["a"], ["b"]], "list"),
        ([datetime.datetime(2024, 1, 1)] * 2, "timestamp"),
        ([b"a", b"b"], "binary"),
        ([{"x": "a"}] * 2, "struct"),
    ],
)
def test_a_column_that_is_not_text(tmp_path: Path, name: str, values: list[Any], kind: str):
    """D7: guards against numbers, dates and lists trained on as their Python names."""
    path = write(tmp_path / name, ["a", "b"], body=values)
    assert f"field 'body' is not text but {kind}" in refused(path, text_field="body")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_all_types_of_strings_are_text(tmp_path: Path, name: str, kind: Any):
    """D7: guards against categories refused or read as numbers; null rows are counted."""
    column = pa.array(["a", None, "b", "a"]).cast(kind)
    path = write(tmp_path / name, [""] * 4, body=column)
    problems = Problems()
    assert read(path, problems, text_field="body") == ["a", "b", "a"]
    assert problems.null_rows == {str(path): 1}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_fields_inside_a_column(tmp_path: Path, name: str):
    """D7: guards against a dotted text_field that reaches rows of JSON only."""
    rows = [{"title": "t", "body": "inner"}, None, {"title": "t", "body": None}]
    path = write(tmp_path / name, [""] * 3, article=rows)
    problems = Problems()
    assert read(path, problems, text_field="article.body") == ["inner"]
    assert problems.null_rows == {str(path): 2}
    message = refused(path, text_field="article.date")
    assert "no field 'article.date' (has: article.title, article.body)" in message
    own = {"article.body": ["own"] * 3}
    path = write(tmp_path / name, [""] * 3, article=rows, **own)
    assert read(path, text_field="article.body") == ["own"] * 3


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_invalid_utf8_in_a_column(tmp_path: Path, name: str):
    """D5: guards against pyarrow's UnicodeDecodeError in the middle of a run."""
    raw = pa.array([b"good", b"b\xffd", None]).view(pa.string())
    path = write(tmp_path / name, [""] * 3, body=raw)
    problems = Problems()
    assert read(path, problems, text_field="body") == ["good", "b\ufffdd"]
    assert problems.invalid_utf8 == {str(path): 1}
    message = refused(path, text_field="body", on_bad_text="error")
    assert message == " row 1: invalid UTF-8 in field 'body'"


@pytest.mark.parametrize("name", KINDS[2:])
@pytest.mark.parametrize("damage", ["empty", "half", "end", "rubbish", "text"])
def test_damaged_tables_are_named(tmp_path: Path, name: str, damage: str):
    """D8: guards against pyarrow's own errors, without the file, from a download that broke off."""
    path = write(tmp_path / name, texts_of(2000))
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": data[: len(data) // 2],
            "end": data[:-20],
            "rubbish": random.Random(0).randbytes(5000),
            "text": b"this is no table at all\n" * 9,
        }[damage]
    )
    if (name, damage) == ("stream.arrow", "end"):  # its end mark and the padding before it
        path.write_bytes(data[:-200])
    assert "damaged or truncated" in refused(path)


@pytest.mark.parametrize("name", KINDS[2:])
def test_flipped_bytes_are_an_error_or_text(tmp_path: Path, name: str):
    """D8: guards against a crash of the process, or a bare error, from a damaged disk."""
    path = write(tmp_path / name, texts_of(50))
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert all(isinstance(text, str) for text in read(path))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("3", "1 fields, but the header has 2 (n, text)"),
        ("3,a,b", "3 fields, but the header has 2 (n, text)"),
        ("3,a\0b", "a NUL byte"),
        ('3,"a" b', "not a row of CSV: ',' expected after '\"'"),
    ],
)
def test_bad_rows_of_csv_are_named_by_line(tmp_path: Path, row: str, problem: str):
    """D6: guards against ragged rows shifted into other columns, and errors without the line."""
    path = tmp_path / "a.csv"
    path.write_text(f'n,text\n1,"two\nlines"\n\n{row}\n4,good\n')
    assert refused(path).startswith(f":5: {problem}")
    problems = Problems()
    assert read(path, problems, on_bad_row="skip") == ["two\nlines", "good"]
    assert problems.skipped_rows == {str(path): 1}


def test_a_quote_that_is_never_closed(tmp_path: Path):
    """D6: guards against a file whose rest becomes one text."""
    path = tmp_path / "a.csv"
    path.write_text('text\ngood\n"open\nrow\nrow\n')
    assert refused(path).startswith(":3: not a row of CSV: unexpected end of data")
    assert read(path, on_bad_row="skip") == ["good"]


def test_csv_of_long_fields(tmp_path: Path):
    """Guards against the csv module's own limit of 128 KiB."""
    text = 'long "text", ' * 50_000
    assert "".join(read(write(tmp_path / "a.csv", [text, "b"]))) == text + "b"


@pytest.mark.parametrize("content", ["", "n,text\n", "\n\n", "\ufeffn,text\n"])
def test_csv_without_rows(tmp_path: Path, content: str):
    """D3: guards against a traceback when there is no header or nothing behind it."""
    (tmp_path / "a.csv").write_text(content)
    assert read(tmp_path / "a.csv") == []


def test_csv_headers(tmp_path: Path):
    """D7, D9: guards against a mark in the first name, and against columns lost by equal names."""
    path = tmp_path / "a.csv"
    path.write_text("\ufefftext,n\r\na,1\r\n", newline="")
    assert read(path) == ["a"]
    path.write_text("text,n,text\na,1,b\n")
    assert refused(path) == ":1: two columns are called 'text'"
    path.write_text('te"xt,"n"x\na,1\n')
    assert "the header line: not a row of CSV" in refused(path)


def test_csv_agrees_with_the_csv_module(tmp_path: Path):
    """Guards against own ideas of quotes and line ends, also where a shard begins."""
    rng, path = random.Random(3), tmp_path / "a.csv"
    for _ in range(40):
        parts = rng.choices(['"', '""', ",", "\n", "\r\n", "a", "é", " "], k=60)
        path.write_text("x,text\n" + "".join(parts), newline="", encoding="utf-8")
        try:
            lines = io.StringIO(path.read_text(encoding="utf-8", newline=""), newline="")
            rows = list(csv.reader(lines, strict=True))[1:]
        except (csv.Error, TypeError):
            continue
        expected = [row[1] for row in rows if len(row) == 2 and row[1].strip()]
        assert read(path, on_bad_row="skip") == expected


def test_rows_of_a_table_are_split_like_rows_of_json(tmp_path: Path):
    """Guards against a corpus converted to another format whose validation part was trained on."""
    texts = [f"document {i}" for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    split = Split("hash", "val", threshold=2**62)
    held = []
    for path in (tmp_path / "a.jsonl", *(write(tmp_path / name, texts) for name in KINDS)):
        file = source_file(path)
        size = layout(file, Problems()).size
        held.append([r["text"] for r in read_shards([Shard(file, 0, size, split)])])
    assert 0 < len(held[0]) < 25
    assert all(part == held[0] for part in held)
