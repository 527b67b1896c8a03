"""How content is opened: archives, other encodings, byte-order marks, and damage of all kinds."""

import gzip
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from gptcli.config.data_schema import SourceConfig
from gptcli.data.files import SourceFile, resolve
from gptcli.data.opening import open_stored, open_utf8
from gptcli.errors import DataError

TEXT = "naïve café, 你好, 🙂\nsecond line\r\nno end"


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".xz": lzma.compress,
}
ARCHIVES = [".gz", ".zst", ".xz"]


def file_of(path: Path, **options: str) -> SourceFile:
    (file,) = resolve([SourceConfig.model_validate({"path": str(path), **options})])
    return file


def content(path: Path, **options: str) -> str:
    with open_utf8(file_of(path, **options)) as f:
        return f.read().decode()


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", PACK)
def test_utf8_is_read_as_it_is_without_its_mark(tmp_path: Path, bom: bytes, ending: str):
    """D9: guards against a byte-order mark as the first character, and against other line ends."""
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](bom + TEXT.encode()))
    assert content(path) == TEXT


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
def test_seeking_finds_the_same_bytes(tmp_path: Path, bom: bytes, ending: str, encoding: str):
    """Guards against places that are off by the mark, and against archives and transcoded text
    that cannot go back."""
    text = "".join(f"{i} é🙂\n" for i in range(60_000))
    path = tmp_path / f"a.txt{ending}"
    mark = bom.decode()
    path.write_bytes(PACK[ending]((mark + text).encode(encoding)))
    data, rng = text.encode(), random.Random(0)
    with open_utf8(file_of(path, encoding=encoding)) as f:
        for place in (4, 0, len(data), 10, len(data) - 3, *rng.sample(range(len(data)), 4)):
            assert f.seek(place) == place
            assert f.tell() == place
            assert f.read(7) == data[place : place + 7]
            end = data.find(b"\n", place + 7) + 1 or len(data)
            assert f.readline() == data[place + 7 : end]
        f.seek(0)
        assert f.read() == data
        assert f.read(1) == b""


@pytest.mark.parametrize("ending", ARCHIVES)
def test_several_archives_in_one_file(tmp_path: Path, ending: str):
    """Guards against reading only the first part of what parallel tools and `cat` write."""
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](b"first\n") + PACK[ending](b"second\n"))
    assert content(path) == "first\nsecond\n"


@pytest.mark.parametrize(
    "encoding",
    ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "gb18030", "shift_jis", "cp1252"],
)
@pytest.mark.parametrize("on_bad_text", ["replace", "error"])
def test_other_encodings_are_read_when_named(tmp_path: Path, encoding: str, on_bad_text: str):
    """Guards against text of other encodings read as mojibake, with its mark, or with characters
    torn at the borders of what is read at once."""
    some = {"latin-1": "naïve café\n", "cp1252": "naïve “café”\n", "shift_jis": "日本語 a\n"}
    text = some.get(encoding, TEXT) * 40_000
    mark = "\ufeff" if encoding.startswith("utf-16-") else ""
    path = tmp_path / "a.txt"
    path.write_bytes((mark + text).encode(encoding))
    assert content(path, encoding=encoding, on_bad_text=on_bad_text) == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "gb18030", "ascii"])
def test_bad_text_of_other_encodings_is_replaced_and_counted(tmp_path: Path, encoding: str):
    """D5: guards against silent repair, a traceback, and counting U+FFFD that the text contains."""
    own = "" if encoding == "ascii" else "\ufffd"
    bad = {"utf-16-le": b"\x00\xd8", "gb18030": b"\xff", "ascii": b"\xff"}[encoding]
    good = f"some text {own} of the file\n" * 20_000
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join((good.encode(encoding), bad, good.encode(encoding), bad)))
    counts: list[int] = []
    with open_utf8(file_of(path, encoding=encoding), counts.append) as f:
        assert f.read().decode() == good + "\ufffd" + good + "\ufffd"
    assert sum(counts) == 2
    place = len(good.encode(encoding))
    with pytest.raises(DataError, match=f"not {encoding} text at byte {place}: ") as caught:
        content(path, encoding=encoding, on_bad_text="error")
    assert caught.value.message.startswith(f"{path}: ")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("ending", PACK)
def test_utf16_without_its_name_gives_a_hint(tmp_path: Path, encoding: str, ending: str):
    """D9: guards against UTF-16 trained on as zero bytes between letters."""
    path = tmp_path / f"a.txt{ending}"
    mark = "\ufeff" if encoding.endswith("be") else ""
    path.write_bytes(PACK[ending]((mark + TEXT).encode(encoding)))
    with pytest.raises(DataError, match=encoding[:6].upper()) as caught:
        content(path)
    assert f"encoding: {encoding[:6]}" in str(caught.value.hint)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("text", ["no", "“Naïve” café, 一 or two —\n" * 100])
def test_utf16_without_a_mark_gives_a_hint_too(
    tmp_path: Path, encoding: str, ending: str, text: str
):
    """D9: guards against UTF-16 whose mark is missing, trained on as zero bytes between letters,
    and a hint that does not read it."""
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](text.encode(encoding)))
    with pytest.raises(DataError, match=f"{encoding[:6].upper()} text, not utf-8") as caught:
        content(path)
    source = f"{{path: {json.dumps(str(path))}, encoding: {encoding}}}"
    assert caught.value.hint == (
        f"write the source with its encoding in the YAML (data.train, eval.data): {source}"
    )
    assert content(path, encoding=encoding) == text


@pytest.mark.parametrize("text", ["", "a", "a\0", "\0" * 2000, "a record\0another\0" * 200, TEXT])
def test_zero_bytes_in_utf8_are_read(tmp_path: Path, text: str):
    """Guards against UTF-8 that is refused because it has zero bytes somewhere."""
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert content(path) == text


@pytest.mark.parametrize("ending", ARCHIVES)
@pytest.mark.parametrize("damage", ["truncated", "a few bytes", "empty", "plain"])
def test_damaged_archives_are_named(tmp_path: Path, ending: str, damage: str):
    """D8: guards against a traceback, or half a corpus, from a download that broke off."""
    path = tmp_path / f"a.txt{ending}"
    data = PACK[ending](random.Random(0).randbytes(3000) * 50)
    path.write_bytes(
        {
            "truncated": data[:-20],
            "a few bytes": data[:3],
            "empty": b"",
            "plain": b"not an archive at all",
        }[damage]
    )
    with pytest.raises(DataError, match="damaged or truncated archive") as caught:
        content(path)
    assert caught.value.message.startswith(f"{path}: ")


@pytest.mark.parametrize("ending", [".gz", ".xz"])  # pyarrow's zstd files have no checksum
def test_a_flipped_bit_in_an_archive_is_found(tmp_path: Path, ending: str):
    """D8: guards against training on what a broken disk or download made of the text."""
    path = tmp_path / f"a.txt{ending}"
    data = bytearray(PACK[ending](bytes(range(256)) * 50))
    data[-30 if ending == ".xz" else -6] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged or truncated archive"):
        content(path)


def test_a_file_that_goes_away_is_named(tmp_path: Path):
    """Guards against a traceback when a file is deleted between finding and reading it."""
    path = tmp_path / "a.txt"
    path.write_text("text")
    file = file_of(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: No such file"), open_utf8(file):
        pass


def test_binary_is_read_as_stored(tmp_path: Path):
    """Guards against marks cut off, and archives unpacked, of what is to be read as bytes."""
    for name, data in (("a.png", b"\xff\xfe\x00\x01"), ("b.gz", gzip.compress(b"x"))):
        (tmp_path / name).write_bytes(data)
        file = file_of(tmp_path / name, encoding="binary")
        with open_utf8(file) as f:
            assert f.read() == data
        with open_stored(file) as f:
            assert f.read() == data


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, ending: str, encoding: str):
    """Guards against archives and other encodings that are unpacked in memory."""
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](("0123456789abcdef" * 1_250_000).encode(encoding)))
    tracemalloc.start()
    try:
        with open_utf8(file_of(path, encoding=encoding)) as f:
            size = sum(len(block) for block in iter(lambda: f.read(1 << 16), b""))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 20_000_000
    assert peak < 12_000_000  # .xz: its dictionary of 8 MiB is in it
