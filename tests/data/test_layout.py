"""Size, identity and borders of files of every kind."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli import stop
from gptcli.config.data_schema import SourceConfig
from gptcli.data.files import SourceFile, resolve
from gptcli.data.layout import Layout, layout
from gptcli.data.shards import Problems
from gptcli.errors import DataError


def source_file(path: Path | str, **options: str) -> SourceFile:
    (file,) = resolve([SourceConfig.model_validate({"path": str(path), **options})])
    return file


def found(path: Path | str, **options: str) -> Layout:
    return layout(source_file(path, **options), Problems())


TEXT = "some text, 你好\n".encode() * 300_000


@pytest.mark.parametrize("stored", ["plain", "mark", "gz", "utf-16"])
def test_text_is_measured_and_hashed_as_it_is_read(tmp_path: Path, stored: str):
    """Guards against an archive or a mark that changes the identity of the same text."""
    path = tmp_path / ("a.txt.gz" if stored == "gz" else "a.txt")
    written = {
        "plain": TEXT,
        "mark": b"\xef\xbb\xbf" + TEXT,
        "gz": gzip.compress(TEXT, 1),
        "utf-16": TEXT.decode().encode("utf-16"),
    }[stored]
    path.write_bytes(written)
    options = {"encoding": "utf-16"} if stored == "utf-16" else {}
    anywhere = None if stored in ("plain", "mark") else (0,)
    for document in ("file", "line"):
        sha256 = hashlib.sha256(TEXT).hexdigest()
        assert found(path, document=document, **options) == Layout(len(TEXT), sha256, anywhere)


def test_rows_may_be_cut_anywhere(tmp_path: Path):
    """Guards against rows of a plain file that are read by one shard."""
    data = json.dumps({"text": "a"}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(data)
    assert found(tmp_path / "a.jsonl") == Layout(len(data), hashlib.sha256(data).hexdigest(), None)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    assert found(tmp_path / "a.jsonl.gz").borders == (0,)


def test_stored_bytes_identify_tables_tokens_and_raw_files(tmp_path: Path):
    """Guards against an identity that needs the rows decoded, and sizes in other units."""
    pq.write_table(pa.table({"text": ["x" * 9000] * 1000}), tmp_path / "a.parquet", 100)
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.uint16))
    (tmp_path / "a.png").write_bytes(TEXT)
    for name, size in (("a.parquet", 1000), ("a.npy", 1000), ("a.png", len(TEXT))):
        options = {"encoding": "binary"} if name == "a.png" else {}
        one = found(tmp_path / name, **options)
        assert one.size == size
        assert one.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert (one.borders is None) == (name != "a.parquet")


def test_small_row_groups_are_taken_together(tmp_path: Path):
    """Guards against a shard for each row group of ten rows."""
    texts = [str(i) * 2000 for i in range(1000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", 10)
    borders = found(tmp_path / "a.parquet").borders
    assert borders is not None
    assert 3 <= len(borders) <= 8
    assert all(border % 10 == 0 for border in borders)


def test_a_builtin_is_measured_in_rows():
    """Guards against a builtin without identity."""
    one = found("builtin:web-bible")
    assert (one.size, one.borders) == (1189, None)
    assert len(one.sha256) == 64


def test_what_transcoding_replaces_is_counted_here(tmp_path: Path):
    """D5: guards against repairs that nobody counts, because the records are valid UTF-8."""
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16-le") + b"\x00\xd8")
    problems = Problems()
    layout(source_file(tmp_path / "a.txt", encoding="utf-16-le"), problems)
    assert problems.invalid_utf8 == {str(tmp_path / "a.txt"): 1}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.txt.zst", "a.jsonl.xz", "a.csv.gz"])
def test_damage_is_found_before_reading_begins(tmp_path: Path, name: str):
    """D8: guards against a run that finds out about an empty download after hours."""
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"damaged or truncated.* 0 bytes") as caught:
        found(tmp_path / name)
    assert caught.value.message.startswith(str(tmp_path / name))


@pytest.mark.parametrize("options", [{}, {"document": "paragraph"}, {"encoding": "binary"}])
def test_hashing_polls_the_stop_flag(tmp_path: Path, options: dict[str, str]):
    """Guards against Ctrl-C that waits for gigabytes to be hashed."""
    (tmp_path / "a.txt").write_bytes(TEXT)
    stop.request(2)
    with pytest.raises(stop.Stopped):
        found(tmp_path / "a.txt", **options)
