"""Which files a source names, and what is said when they cannot be read."""

import gzip
from pathlib import Path

import pytest

from gptcli.config.schema import SourceConfig
from gptcli.data.files import open_utf8, resolve
from gptcli.errors import ConfigError, DataError

TEXT = "naïve café, 你好, 🙂\nsecond line\r\nno end"


def source(path: Path | str, **options: str) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), **options})


def names(*paths: Path | str) -> list[str]:
    return [Path(file.path).name for file in resolve([source(path) for path in paths])]


def content(path: Path, **options: str) -> str:
    (file,) = resolve([source(path, **options)])
    with open_utf8(file) as f:
        return f.read().decode()


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
    """Guards against reporting one missing file a run."""
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


def test_unknown_builtin_and_hub_are_refused():
    """Guards against a misspelt builtin looked for as a file."""
    assert "web-bible" in refused("builtin:bible")
    assert "hub" in refused("hub:owner/name")


def test_an_option_that_is_not_read_yet_is_refused(folder: Path):
    """Guards against `document: line` being ignored silently for rows."""
    (folder / "r.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match="document is for text files"):
        resolve([source(folder / "r.jsonl", document="line")])
    assert resolve([source(folder / "b.txt", document="line")])[0].kind == "lines"


def test_an_unknown_encoding_is_named(folder: Path):
    """Guards against a LookupError traceback."""
    with pytest.raises(DataError, match="utf-99"):
        resolve([source(folder / "b.txt", encoding="utf-99")])


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_utf8_is_read_as_it_is_without_its_mark(tmp_path: Path, bom: bytes, suffix: str):
    """Guards against a byte-order mark as the first character, and against changed line ends."""
    path = tmp_path / f"a{suffix}"
    data = bom + TEXT.encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert content(path) == TEXT


def test_seeking_behind_a_mark_counts_without_it(tmp_path: Path):
    """Guards against places of a file with a mark that are three bytes off."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf0123456789")
    (file,) = resolve([source(path)])
    with open_utf8(file) as f:
        assert f.seek(4) == 4
        assert f.read(2) == b"45"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_other_encodings_are_read_when_named(tmp_path: Path, encoding: str):
    """Guards against text of other encodings read as mojibake or with its mark."""
    text = TEXT if encoding != "latin-1" else "naïve café\n"
    path = tmp_path / "a.txt"
    path.write_bytes(("\ufeff" * encoding.startswith("utf-16-") + text).encode(encoding))
    assert content(path, encoding=encoding) == text


def test_utf16_without_its_name_gives_a_hint(tmp_path: Path):
    """Guards against UTF-16 trained on as zero bytes between letters."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16") as caught:
        content(path)
    assert "encoding: utf-16" in str(caught.value.hint)


def test_text_of_another_encoding_than_named(tmp_path: Path):
    """Guards against a UnicodeDecodeError traceback."""
    path = tmp_path / "a.txt"
    path.write_bytes("abc".encode("utf-16") + b"x")
    with pytest.raises(DataError, match="not utf-16 text"):
        content(path, encoding="utf-16")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "plain"])
def test_damaged_archives_are_named(tmp_path: Path, damage: str):
    """Guards against a traceback, or half a corpus, from a download that broke off."""
    path = tmp_path / "a.txt.gz"
    data = gzip.compress(bytes(range(256)) * 50)
    path.write_bytes(
        {
            "truncated": data[:-20],
            "flipped": data[:-6] + bytes([data[-6] ^ 1]) + data[-5:],
            "plain": b"not gzip at all",
        }[damage]
    )
    with pytest.raises(DataError, match="damaged or truncated archive") as caught:
        content(path)
    assert str(path) in caught.value.message
