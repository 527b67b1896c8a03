"""Which files a source names, and what is said when they cannot be read."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.data_schema import SourceConfig
from gptcli.data.files import resolve
from gptcli.errors import ConfigError, DataError


def source(path: Path | str, **options: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), **options})


def names(*paths: Path | str) -> list[str]:
    return [Path(file.path).name for file in resolve([source(path) for path in paths])]


def refused(*paths: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        names(*paths)
    assert caught.value.exit_code == 3
    return caught.value.message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "rows.jsonl", "picture.png", "sub/c.py", "sub/d.txt.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(b"d") if name.endswith(".gz") else b"{}")
    return tmp_path


def test_a_directory_gives_its_readable_files_in_order(folder: Path):
    """Guards against a picture read as text and against the file system's order."""
    assert names(folder) == ["a.md", "b.txt", "rows.jsonl", "c.py", "d.txt.gz"]


def test_a_pattern_is_expanded_and_sorted(folder: Path):
    """Guards against an order that differs between machines, and patterns that stop at a level."""
    assert names(folder / "*.txt", folder / "**" / "*.py") == ["b.txt", "c.py"]
    assert names(str(folder / "[ab].*")) == ["a.md", "b.txt"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path):
    """Guards against `a[1].txt` being read as the pattern that matches `a1.txt`."""
    for name in ("a[1].txt", "a1.txt"):
        (tmp_path / name).write_text(name)
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_missing_files_are_all_listed(folder: Path):
    """D1, D2: guards against reporting one missing file a run, and against a run on 0 rows."""
    message = refused(folder / "x.txt", folder / "a.md", folder / "y.txt", folder / "*.csv")
    assert [line.split(": ")[1] for line in message.splitlines()] == [
        "no such file",
        "no such file",
        "the pattern matches no files",
    ]
    assert str(folder / "x.txt") in message
    assert str(folder / "y.txt") in message


@pytest.mark.parametrize("name", ["~nobody-of-this-name/a.txt", "a" * 300 + ".txt", "a\0b.txt"])
def test_impossible_names_are_missing_files(name: str):
    """Guards against a traceback from the operating system's own checks of a name."""
    assert "no such file" in refused(name)


def test_an_unknown_kind_of_file_is_named(folder: Path):
    """Guards against binary files read as text; the message says what can be read."""
    message = refused(folder / "picture.png")
    assert "picture.png" in message
    assert ".jsonl" in message


def test_a_directory_without_text(tmp_path: Path):
    """Guards against an empty corpus that is noticed much later."""
    (tmp_path / "picture.png").touch()
    assert "no file in this directory" in refused(tmp_path)


def test_an_unknown_builtin_is_refused():
    """Guards against a misspelt builtin looked for as a file."""
    assert "web-bible" in refused("builtin:bible")


def test_document_is_for_text(folder: Path):
    """Guards against `document: line` being ignored silently for rows."""
    (folder / "r.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match="document is for text files"):
        resolve([source(folder / "r.jsonl", document="line")])
    assert resolve([source(folder / "b.txt", document="line")])[0].kind == "lines"


@pytest.mark.parametrize("encoding", ["utf-99", "hex", "rot13", ""])
def test_an_unknown_encoding_is_named(folder: Path, encoding: str):
    """Guards against a LookupError traceback, and against codecs that make no text."""
    with pytest.raises(DataError, match=f"no encoding is called '{encoding}'"):
        resolve([source(folder / "b.txt", encoding=encoding)])


KINDS = {
    "a.txt": "text",
    "a.md": "text",
    "a.text": "text",
    "a.PY": "text",
    "a.jsonl": "rows",
    "a.ndjson": "rows",
    "a.csv": "table",
    "a.tsv": "table",
    "a.parquet": "table",
    "a.arrow": "table",
    "a.npy": "tokens",
    "a.bin": "tokens",
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".XZ"])
def test_the_ending_chooses_the_kind(tmp_path: Path, name: str, ending: str):
    """Guards against a kind or an archive that is not known, and against one that cannot work."""
    (tmp_path / (name + ending)).touch()
    whole = source(tmp_path / (name + ending))
    if ending and Path(name).suffix in (".parquet", ".arrow", ".npy", ".bin"):
        with pytest.raises(DataError, match="not a kind of file"):
            resolve([whole])
        return
    (file,) = resolve([whole])
    assert file.kind == KINDS[name]
    assert file.compression == ending.lower()
    assert file.format == Path(name).suffix.lower()
    assert file.seekable == (not ending)


def test_files_know_their_source(folder: Path):
    """Guards against documents counted for another source of a mixture."""
    files = resolve([source(folder / "a.md"), source(folder), source("builtin:web-bible")])
    assert [file.number for file in files] == [0, 1, 1, 1, 1, 1, 2]


def test_binary_reads_every_file(folder: Path):
    """Guards against pictures that cannot be named, and against archives that are unpacked."""
    files = resolve([source(folder, encoding="binary")])
    assert [Path(f.path).name for f in files] == [
        "a.md",
        "b.txt",
        "picture.png",
        "rows.jsonl",
        "c.py",
        "d.txt.gz",
    ]
    assert {(f.kind, f.compression, f.seekable) for f in files} == {("binary", "", True)}


def test_tokens_beside_their_text_are_refused(folder: Path):
    """Guards against a folder of nanoGPT, with input.txt and train.bin, read as both."""
    (folder / "train.bin").touch()
    assert "holds files of tokens (train.bin) and others" in refused(folder)
    assert names(folder / "*.bin") == ["train.bin"]


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("a.txt", {"split": "train"}, "split is for hub corpora"),
        ("a.parquet", {"document": "line"}, "document is for text files"),
        ("a.txt", {"document": "line", "encoding": "binary"}, "document is for text files"),
        ("builtin:web-bible", {"document": "line"}, "document is for text files"),
        ("a.txt", {"text_field": "body"}, "text_field is for rows"),
        ("a.npy", {"text_field": "body"}, "text_field is for rows"),
        ("a.txt", {"on_bad_row": "skip"}, "on_bad_row is for rows"),
        ("a.parquet", {"encoding": "utf-16"}, "encoding is for files of text"),
        ("a.npy", {"encoding": "latin-1"}, "encoding is for files of text"),
        ("builtin:web-bible", {"encoding": "binary"}, "encoding is for files of text"),
        ("a.bin", {"on_bad_text": "error"}, "on_bad_text is for text"),
        ("a.bin", {"filters": {"min_characters": 3}}, "filters are for text"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], problem: str
):
    """Guards against an option that is written down and then ignored."""
    path = name if name.startswith("builtin:") else str(tmp_path / name)
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"{problem}.*leave it out") as caught:
        resolve([source(path, **options)])
    assert path in caught.value.message


def test_all_options_that_do_not_fit_are_listed(folder: Path):
    """Guards against one such option a run."""
    with pytest.raises(ConfigError) as caught:
        resolve([source(folder / "a.md", split="x"), source(folder / "b.txt", text_field="t")])
    assert len(caught.value.problems) == 2


def test_options_that_fit_some_files_of_a_folder_are_taken(folder: Path):
    """Guards against a folder of rows and texts that cannot be read for its text_field."""
    assert len(resolve([source(folder, text_field="body", on_bad_row="skip")])) == 5
