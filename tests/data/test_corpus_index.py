"""Scans that are kept: an unchanged corpus is not read again, a changed one is."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.data_schema import DataConfig
from gptcli.data import corpus as corpus_module
from gptcli.data.cache_folder import cache_root
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.readers import read_shards


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GPT_CACHE", str(tmp_path_factory.mktemp("cache")))


def data_config(folder: Path, **options: Any) -> DataConfig:
    return DataConfig.model_validate({"train": str(folder / "*"), "val_fraction": 0.1, **options})


def write_corpus(folder: Path) -> None:
    rows = [{"text": f"row {i}: some words, {'more ' * (i % 7)}and an end"} for i in range(200)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.csv").write_text(
        "text\n" + "".join(f'"csv {i}\nwith two lines"\n' for i in range(50))
    )
    (folder / "c.txt").write_text("a text file\n" * 9000)


def everything(corpus: Corpus) -> list[Any]:
    """All that a run uses of a corpus."""
    return [
        list(read_shards(corpus.train)),
        corpus.val_documents,
        corpus.fingerprint,
        corpus.split,
        vars(corpus.problems),
        corpus.sources,
        corpus.key,
        corpus.documents,
        corpus.train_bytes,
    ]


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are scanned from now on."""
    seen: list[str] = []
    real = corpus_module.SourceScan.scan

    def scan(self: Any, file: Any, *rest: Any) -> Any:
        seen.append(Path(file.path).name)
        return real(self, file, *rest)

    monkeypatch.setattr(corpus_module.SourceScan, "scan", scan)
    return seen


def test_a_kept_scan_gives_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against another split, order or fingerprint the second time."""
    write_corpus(tmp_path)
    first = everything(open_corpus(data_config(tmp_path)))
    seen = reads(monkeypatch)
    assert everything(open_corpus(data_config(tmp_path))) == first
    assert seen == []
    uncached = everything(open_corpus(data_config(tmp_path, cache="off")))
    assert uncached == first
    assert seen == ["a.jsonl", "b.csv", "c.txt"]


@pytest.mark.parametrize("change", ["content", "same size and times", "new file", "gone"])
def test_any_change_of_a_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    """Guards against training on what a file held yesterday (D14)."""
    write_corpus(tmp_path)
    before = open_corpus(data_config(tmp_path))
    path = tmp_path / "c.txt"
    if change == "new file":
        (tmp_path / "d.txt").write_text("one more\n" * 100)
    elif change == "gone":
        path.unlink()
    else:
        stat = path.stat()
        text = path.read_text()
        path.write_text("A" + text[1:] if change == "same size and times" else text + "more\n")
        if change == "same size and times":
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen = reads(monkeypatch)
    after = open_corpus(data_config(tmp_path))
    assert seen
    assert after.fingerprint != before.fingerprint
    assert after.key != before.key


def test_another_setting_is_another_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against filters or a split that have no effect because a scan was kept."""
    write_corpus(tmp_path)
    open_corpus(data_config(tmp_path))
    seen = reads(monkeypatch)
    assert open_corpus(data_config(tmp_path, val_fraction=0.3)).train_bytes
    source = {"path": str(tmp_path / "*"), "filters": {"min_characters": 40}}
    filtered = open_corpus(data_config(tmp_path, train=source))
    assert len(seen) == 6
    assert filtered.sources[0].cleaning["min_characters"]["documents"] > 0


@pytest.mark.parametrize("damage", ["", "{", '{"scans": 3}', "\x00\x01"])
def test_a_damaged_entry_is_no_error(tmp_path: Path, damage: str):
    """Guards against a run that a half-written cache file ends."""
    write_corpus(tmp_path)
    first = everything(open_corpus(data_config(tmp_path)))
    (entry,) = (cache_root() / "corpora").iterdir()
    entry.write_text(damage)
    assert everything(open_corpus(data_config(tmp_path))) == first


def test_off_writes_nothing(tmp_path: Path):
    """Guards against private text copied to the cache against the user's word."""
    write_corpus(tmp_path)
    open_corpus(data_config(tmp_path, cache="off"))
    assert not cache_root().exists() or not list(cache_root().iterdir())


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Guards against a read-only home that ends every run."""
    write_corpus(tmp_path)
    (tmp_path.parent / "file").write_text("")
    monkeypatch.setenv("GPT_CACHE", str(tmp_path.parent / "file"))
    assert open_corpus(data_config(tmp_path)).documents
