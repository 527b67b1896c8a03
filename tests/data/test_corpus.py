"""A corpus: what is held out, what identifies it, what it refuses; the builtin ones."""

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptcli import stop
from gptcli.config.data_schema import DataConfig, SourceConfig
from gptcli.data.corpus import Corpus, open_corpus, read_documents
from gptcli.data.readers import read_shards
from gptcli.data.row_fields import RowFields
from gptcli.errors import DataError


def config(train: Any, **options: Any) -> DataConfig:
    values = {"train": train if not isinstance(train, Path) else str(train), **options}
    return DataConfig.model_validate(values)


def train_texts(corpus: Corpus) -> list[str]:
    return [record["text"] for record in corpus.train_records()]


def train_rows(corpus: Corpus) -> list[dict[str, Any]]:
    return [record["row"] for record in read_shards(corpus.train)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(n: int) -> list[dict[str, Any]]:
    return [{"text": f"document number {i}, with a few words"} for i in range(n)]


@pytest.mark.parametrize("fraction", [0.02, 0.3])
@pytest.mark.parametrize(
    "text",
    ["one two three\n" * 30, "你好🙂" * 40_000, "word " * 500, "line\r\n" * 40_000, "ab"],
    ids=["lines", "long", "no line ends", "pieces", "tiny"],
)
def test_training_part_and_held_out_tail_make_the_document(
    tmp_path: Path, text: str, fraction: float
):
    """Guards against text in both parts, or in none."""
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    corpus = open_corpus(config(path, val_fraction=fraction))
    (held_out,) = corpus.val_documents
    assert "".join(train_texts(corpus)) + held_out.text == text
    assert corpus.split == "tail"
    assert corpus.documents == 1
    assert corpus.train_bytes == len(text.encode()) - len(held_out.text.encode())


def test_each_row_of_a_few_has_its_own_tail(tmp_path: Path):
    """Guards against whole rows held out of a handful, and against the tails mixed up."""
    rows = [{"text": f"row {i} " * 100} for i in range(5)]
    corpus = open_corpus(config(write_rows(tmp_path / "a.jsonl", rows), val_fraction=0.1))
    kept = train_texts(corpus)
    assert [a + d.text for a, d in zip(kept, corpus.val_documents, strict=True)] == [
        row["text"] for row in rows
    ]


def test_many_documents_are_held_out_whole(tmp_path: Path):
    """Guards against documents in both parts or in none when the split goes by hash."""
    rows = numbered(1000)
    corpus = open_corpus(config(write_rows(tmp_path / "a.jsonl", rows), val_fraction=0.1))
    kept = train_texts(corpus)
    held_out = [document.text for document in corpus.val_documents]
    assert corpus.split == "hash"
    assert corpus.documents == 1000
    assert sorted(kept + held_out) == sorted(row["text"] for row in rows)
    assert not set(kept) & set(held_out)
    assert 60 < len(held_out) < 140  # 100 expected, 9.5 the standard deviation


def test_the_hash_split_knows_no_file_names(tmp_path: Path):
    """Guards against a renamed or reordered corpus whose validation part was trained on."""
    rows = numbered(300)
    first = open_corpus(config(write_rows(tmp_path / "a.jsonl", rows)))
    second = open_corpus(config(write_rows(tmp_path / "z.jsonl", rows[::-1])))
    files = tmp_path / "files"
    files.mkdir()
    for i, row in enumerate(rows):
        (files / f"{i}.txt").write_text(row["text"])
    third = open_corpus(config(files))
    held_out = [{d.text for d in c.val_documents} for c in (first, second, third)]
    assert held_out[0] == held_out[1] == held_out[2]
    assert held_out[0]


def test_at_least_one_document_is_held_out(tmp_path: Path):
    """Guards against a run without validation because the fraction caught no document."""
    corpus = open_corpus(config(write_rows(tmp_path / "a.jsonl", numbered(150)), val_fraction=1e-9))
    assert len(corpus.val_documents) == 1
    assert len(train_texts(corpus)) == 149


def test_rows_for_finetuning_are_split_whole(tmp_path: Path):
    """Guards against a prompt without its answer: rows are never cut, however few they are."""
    rows = [{"q": f"{i}+{i}", "a": str(2 * i)} for i in range(20)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    corpus = open_corpus(config(path), fields=RowFields.texts("q", "a"))
    held_out = [row for _, row in corpus.val_rows]
    kept = train_rows(corpus)
    assert len(held_out) >= 1
    assert sorted(map(str, kept + held_out)) == sorted(map(str, rows))
    assert corpus.train_bytes == sum(len(json.dumps(row)) for row in kept)


def test_finetuning_on_text_is_refused(tmp_path: Path):
    """Guards against a KeyError deep in the encoder."""
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="finetuning reads rows"):
        open_corpus(config(tmp_path / "a.txt"), fields=RowFields.texts("prompt", "response"))


def test_a_given_validation_source_leaves_training_whole(tmp_path: Path):
    """Guards against holding out twice."""
    (tmp_path / "train.txt").write_text("to train on\n" * 50)
    (tmp_path / "val.txt").write_text("to score\n" * 5)
    corpus = open_corpus(config(tmp_path / "train.txt", val=str(tmp_path / "val.txt")))
    assert "".join(train_texts(corpus)) == "to train on\n" * 50
    assert [d.text for d in corpus.val_documents] == ["to score\n" * 5]
    assert corpus.split == "given"
    assert len(corpus.fingerprint) == 2


def test_the_same_file_as_training_and_validation_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Guards against scores on training text; a copy under another name counts too."""
    for name in ("a.txt", "copy.txt", "other.txt"):
        (tmp_path / name).write_text("other" if name == "other.txt" else "the same text\n" * 9)
    with caplog.at_level(logging.WARNING, "gptcli"):
        open_corpus(config(tmp_path / "a.txt", val=str(tmp_path / "other.txt")))
        assert not caplog.messages
        open_corpus(config(tmp_path / "a.txt", val=str(tmp_path / "copy.txt")))
    (message,) = caplog.messages
    assert "copy.txt is validation and training data at once" in message


def test_the_fingerprint_follows_the_content(tmp_path: Path):
    """Guards against a resume over data that changed by one byte."""
    path = tmp_path / "a.txt"
    path.write_text("one two three\n" * 30)
    before = open_corpus(config(path)).fingerprint
    assert open_corpus(config(path)).fingerprint == before
    path.write_text("one two three\n" * 29 + "one two thref\n")
    assert open_corpus(config(path)).fingerprint != before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.txt", b" \n\n\t"),
        ("a.txt", b"\xef\xbb\xbf"),
        ("a.jsonl", b""),
        ("a.jsonl", b'{"text": ""}\n\n'),
        ("a.jsonl", b'{"text": " \\n"}\n'),
        ("a.jsonl", b'{"text": null}\n'),
    ],
)
def test_an_empty_corpus_is_refused(tmp_path: Path, name: str, content: bytes):
    """Guards against a run that trains on nothing."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="the training data is empty") as caught:
        open_corpus(config(tmp_path / name))
    assert str(tmp_path / name) in caught.value.message
    assert ("1 rows were left out" in caught.value.message) == (b"{" in content)
    with pytest.raises(DataError, match="no text in"):
        read_documents(config(tmp_path / name).train)


def test_holding_everything_out_is_refused(tmp_path: Path):
    """Guards against an endless search for a first training row."""
    path = write_rows(tmp_path / "a.jsonl", [{"q": "a", "a": "b"}])
    with pytest.raises(DataError, match="nothing is left to train on"):
        open_corpus(config(path), fields=RowFields.texts("q", "a"))


def test_repairs_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Guards against silent repair, and against counts doubled by reading twice."""
    (tmp_path / "a.txt").write_bytes(b"good \xff text \xfe\n" * 3)
    rows = '{"text": null}\n{"text": "b"}\n'
    (tmp_path / "b.jsonl").write_text(rows)
    with caplog.at_level(logging.WARNING, "gptcli"):
        corpus = open_corpus(config([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]))
    assert corpus.problems.invalid_utf8 == {str(tmp_path / "a.txt"): 6}
    assert len(caplog.messages) == 2
    assert "a.txt: 6 invalid UTF-8 sequences" in caplog.messages[0]
    assert "b.jsonl: 1 rows whose text is null" in caplog.messages[1]


@pytest.mark.parametrize("place", [3, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_invalid_utf8_is_placed_while_scanning(tmp_path: Path, place: int):
    """Guards against offsets counted from the last MiB that was read."""
    data = bytearray(b"x" * ((3 << 20) + 100))
    data[place] = 0xFF
    (tmp_path / "a.txt").write_bytes(data)
    source = {"path": str(tmp_path / "a.txt"), "on_bad_text": "error"}
    with pytest.raises(DataError, match=f"invalid UTF-8 at byte {place}$"):
        open_corpus(config(source))


def test_skipped_rows_have_a_limit(tmp_path: Path):
    """Guards against a wrong text_field that skips most of a corpus quietly."""
    rows = [{"text": f"row {i}"} for i in range(198)]
    bad = [{"body": "b"}] * 2
    source = {"path": str(tmp_path / "a.jsonl"), "on_bad_row": "skip"}
    write_rows(tmp_path / "a.jsonl", bad + rows)
    corpus = open_corpus(config(source))
    assert corpus.documents == 198
    assert corpus.problems.skipped_rows == {source["path"]: 2}
    write_rows(tmp_path / "a.jsonl", bad + rows[:-1])
    with pytest.raises(DataError, match="2 of 199 rows cannot be used, more than 1 %"):
        open_corpus(config(source))
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'text' \(has: body\)"):
        open_corpus(config({"path": source["path"]}))


def test_scanning_polls_the_stop_flag(tmp_path: Path):
    """Guards against Ctrl-C that waits for gigabytes to be read."""
    (tmp_path / "a.txt").write_text("text\n" * 100)
    stop.request(2)
    with pytest.raises(stop.Stopped):
        open_corpus(config(tmp_path / "a.txt"))


def test_documents_for_evaluation_are_whole(tmp_path: Path):
    """Guards against pieces scored as documents of their own."""
    long = "a line of text\n" * 10_000
    (tmp_path / "a.txt").write_text(long)
    write_rows(tmp_path / "b.jsonl", [{"text": long}, {"text": "short"}])
    documents = read_documents(config([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]).train)
    assert [d.text for d in documents] == [long, long, "short"]
    assert len({d.name for d in documents}) == 3


def test_two_fields_of_one_file_are_two_sources(tmp_path: Path):
    """Guards against documents of one file, read twice by different fields, glued together."""
    path = write_rows(tmp_path / "a.jsonl", [{"title": "T1", "body": "B1"}])
    sources = [{"path": str(path), "text_field": field} for field in ("title", "body")]
    assert [d.text for d in read_documents(config(sources).train)] == ["T1", "B1"]


def test_builtin_bible_is_read_without_importing_its_package():
    """Guards against the import of pythonbible (it takes seconds) and against another text."""
    code = """if True:
        import hashlib, sys
        from gptcli.data.builtin import builtin_rows
        rows = builtin_rows("web-bible")
        assert len(rows) == 1189, len(rows)
        assert rows[0]["text"].startswith("In the beginning"), rows[0]["text"][:40]
        assert not any("`" in row["text"] or row["text"] != row["text"].strip() for row in rows)
        verses = builtin_rows("web-verses")
        genesis = [v for v in verses if v["reference"].startswith("Genesis 1:")]
        assert len(genesis) == 31 and all(v["verse"] in rows[0]["text"] for v in genesis)
        assert verses[-1]["book"] == "Revelation" and len({v["book"] for v in verses}) == 66
        assert not [name for name in sys.modules if name.startswith("pythonbible")]
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_builtin_bible_as_a_corpus():
    """Guards against a builtin that is split or sharded other than files are."""
    corpus = open_corpus(config("builtin:web-bible"))
    kept = train_texts(corpus)
    assert corpus.documents == 1189
    assert corpus.split == "hash"
    assert len(corpus.train) > 1
    assert 10 < len(corpus.val_documents) < 40
    held_out = {document.text for document in corpus.val_documents}
    assert not held_out & set(kept)
    total = sum(len(text.encode()) for text in kept)
    assert total == corpus.train_bytes > 3_900_000


def test_builtin_python_is_the_standard_library():
    """Guards against installed packages or tests read as the standard library."""
    from gptcli.data.builtin import stdlib_files

    files = stdlib_files()
    names = {path.name for path in files}
    assert {"json", "email"} <= {path.parent.name for path in files}
    assert {"argparse.py", "ast.py", "decoder.py"} <= names
    assert not [p for p in files if {"site-packages", "test"} & set(p.parts)]
    assert files == sorted(files)


def test_a_builtin_without_the_text_field_names_the_row():
    """Guards against a byte offset where a builtin's row number is meant."""
    with pytest.raises(DataError, match=r"builtin:web-verses row 0: no field 'text' \(has: ref"):
        open_corpus(config("builtin:web-verses"))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_lines_and_paragraphs_are_documents(tmp_path: Path, ending: str) -> None:
    """Guards against lines lost or doubled at shard borders, and against glued paragraphs."""
    lines = [f"line {i} " + "x" * (i % 900) for i in range(6000)]
    body = "\n".join(line + ("\n" if i % 3 == 2 else "") for i, line in enumerate(lines))
    path = tmp_path / f"a.txt{ending}"
    opener = gzip.open if ending else open
    with opener(path, "wb") as file:
        file.write(body.encode())
    paragraphs = ["\n".join(lines[i : i + 3]) for i in range(0, 6000, 3)]
    for document, expected in (("line", lines), ("paragraph", paragraphs)):
        corpus = open_corpus(DataConfig(train=[SourceConfig(path=str(path), document=document)]))
        assert corpus.split == "hash"
        assert corpus.documents == len(expected)
        texts = [*train_texts(corpus), *(d.text for d in corpus.val_documents)]
        assert sorted(texts) == sorted(expected)
        assert len(corpus.train) > 1 or document == "paragraph" or ending
