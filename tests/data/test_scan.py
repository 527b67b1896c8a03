"""What a scan leaves out and counts: limits, filters, duplicates, blank documents."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer

from gptcli.config.data_schema import DataConfig
from gptcli.data.cache_folder import cache_root
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.row_fields import RowFields
from gptcli.data.store import open_store
from gptcli.data.stream import RecordStream, ShardReader
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, DataError


def opened(*sources: dict[str, Any], **options: Any) -> Corpus:
    return open_corpus(DataConfig.model_validate({"train": list(sources), **options}))


def write_rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def train_texts(corpus: Corpus) -> list[str]:
    return [record["text"] for record in corpus.train_records()]


def all_texts(corpus: Corpus) -> list[str]:
    return sorted([*train_texts(corpus), *(str(d.text) for d in corpus.val_documents)])


@pytest.mark.parametrize("limit", [1, 120, 199, 200, 500])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "line"])
def test_limit_takes_the_first_documents(tmp_path: Path, limit: int, kind: str):
    """Guards against a limit that counts lines, or is off by one at a shard's border."""
    texts = [f"document {i} {'word ' * 1500}" for i in range(200)]
    source: dict[str, Any] = {"limit": limit}
    if kind == "jsonl":
        source["path"] = write_rows(tmp_path / "a.jsonl", texts)
    elif kind == "csv":
        (tmp_path / "a.csv").write_text("text\n" + "".join(f'"{t}"\n' for t in texts))
        source["path"] = str(tmp_path / "a.csv")
    else:
        (tmp_path / "a.txt").write_text("\n\n".join(texts))
        source |= {"path": str(tmp_path / "a.txt"), "document": "line"}
    corpus = opened(source, val_fraction=0.01, cache="off")
    assert corpus.documents == min(limit, 200)
    if limit >= 100:
        assert all_texts(corpus) == sorted(texts[:limit])
    assert corpus.sources[0].bytes == sum(len(t) for t in texts[:limit])


def test_limit_goes_over_the_files_of_a_source(tmp_path: Path):
    """Guards against a limit for each file."""
    for name in "abc":
        write_rows(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(100)])
    corpus = opened({"path": str(tmp_path), "limit": 150}, cache="off")
    assert all_texts(corpus) == sorted(
        [f"a {i}" for i in range(100)] + [f"b {i}" for i in range(50)]
    )


def test_filters_leave_out_and_count(tmp_path: Path):
    """Guards against documents that are counted as left out and trained on all the same."""
    good = [f"An ordinary sentence, number {i}, about the weather." for i in range(150)]
    chinese = [f"第{i}天，天气很好，我们去公园散步。" for i in range(20)]
    path = write_rows(tmp_path / "a.jsonl", [*good, *chinese, "too short", *good[:30]])
    filters = {"min_characters": 12, "scripts": {"Latin": 0.5}, "exact_duplicates": True}
    corpus = opened({"path": path, "filters": filters}, val_fraction=0.1, cache="off")
    assert all_texts(corpus) == sorted(good)
    counts = {name: done["documents"] for name, done in corpus.sources[0].cleaning.items()}
    assert counts == {"min_characters": 1, "scripts": 20, "exact_duplicates": 30}
    assert corpus.documents == 150
    assert corpus.train_bytes == sum(len(text.encode()) for text in train_texts(corpus))


def test_near_duplicates_are_found_across_files(tmp_path: Path):
    """Guards against duplicates that are looked for in one file at a time."""
    words = [f"w{i}" for i in range(300)]
    article = " ".join(words)
    copy = " ".join([*words[:150], "changed", *words[151:]])
    write_rows(tmp_path / "a.jsonl", [article])
    write_rows(tmp_path / "b.jsonl", [copy, "something else entirely, with its own words"])
    corpus = opened({"path": str(tmp_path), "filters": {"near_duplicates": 0.8}}, cache="off")
    assert corpus.documents == 2
    assert corpus.sources[0].cleaning["near_duplicates"]["documents"] == 1


def test_personal_data_is_gone_from_both_parts(tmp_path: Path):
    """Guards against a validation part, or a tail, that keeps what was to be redacted."""
    rows = [
        f"Row {i}: write to user{i}@example.com or call +1 212 555 0123 today." for i in range(150)
    ]
    for path in (write_rows(tmp_path / "a.jsonl", rows), str(tmp_path / "a.txt")):
        (tmp_path / "a.txt").write_text("\n".join(rows))
        source = {"path": path, "filters": {"redact": ["email"]}}
        corpus = opened(source, val_fraction=0.2, cache="off")
        texts = all_texts(corpus)
        assert corpus.val_documents
        assert not any("@" in text for text in texts)
        assert sum(text.count("<EMAIL>") for text in texts) == 150
        done = corpus.sources[0].cleaning["redact"]
        assert done["replacements"] == {"email": 150}


def test_everything_filtered_is_an_error_that_says_so(tmp_path: Path):
    """D3: guards against training on nothing after the filters."""
    path = write_rows(tmp_path / "a.jsonl", ["short"] * 3)
    with pytest.raises(DataError, match="0 documents are left after filtering 3"):
        opened({"path": path, "filters": {"min_characters": 100}}, cache="off")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_blanks_are_no_documents(tmp_path: Path, name: str):
    """D3: guards against a corpus of white space that trains on separators."""
    (tmp_path / name).write_text(" \n\n" if name == "a.txt" else '{"text": " \\n"}\n')
    with pytest.raises(DataError, match="empty"):
        opened({"path": str(tmp_path / name)}, cache="off")


def test_filters_for_tokens_or_rows_are_refused(tmp_path: Path):
    """Guards against a filter that is silently without effect."""
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.uint16))
    with pytest.raises(ConfigError, match="filters are for text"):
        opened({"path": str(tmp_path / "a.npy"), "filters": {"min_characters": 3}}, cache="off")
    path = write_rows(tmp_path / "a.jsonl", ["x"])
    data = DataConfig.model_validate({"train": {"path": path, "filters": {"min_characters": 3}}})
    with pytest.raises(ConfigError, match="not for finetuning"):
        open_corpus(data, fields=RowFields.texts("text", "text"))


def test_a_large_corpus_holds_out_a_bounded_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against a validation part that does not fit into memory."""
    monkeypatch.setattr("gptcli.data.corpus.MOST_HELD_BYTES", 5000)
    path = write_rows(tmp_path / "a.jsonl", [f"{i} " + "word " * 30 for i in range(1000)])
    corpus = opened({"path": path}, val_fraction=0.5, cache="off")
    held = sum(len(document.text) for document in corpus.val_documents)
    assert 5000 <= held < 5400
    assert corpus.train_bytes < 0.55 * corpus.sources[0].bytes


def test_mixture_facts_by_source(tmp_path: Path):
    """Guards against bytes of one source counted for another."""
    a = write_rows(tmp_path / "a.jsonl", [f"a {i}" for i in range(120)])
    b = write_rows(tmp_path / "b.jsonl", [f"document b {i}" for i in range(60)])
    corpus = opened({"path": a, "weight": 1}, {"path": b, "weight": 3}, val_fraction=0.1)
    assert [source.documents for source in corpus.sources] == [120, 60]
    assert corpus.weights == [1, 3]
    for number, source in enumerate(corpus.sources):
        own = [r["bytes"] for r in corpus.train_records() if r["source"] == number]
        assert source.train_bytes == sum(own)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Guards against tokens kept under the fingerprint of other text."""
    monkeypatch.setenv("GPT_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "a.jsonl", [f"row {i}" for i in range(150)])
    corpus = opened({"path": path})
    corpus.check_unchanged()
    write_rows(tmp_path / "a.jsonl", [f"Row {i}" for i in range(150)])
    with pytest.raises(DataError, match="was changed while it was read"):
        corpus.check_unchanged()
    with pytest.raises(DataError, match="was changed while it was read"):
        open_store(corpus.train, Tokenizer.of_bytes(), corpus.key, 1, corpus.check_unchanged)
    assert not list((cache_root() / "tokens").glob("*/manifest.json"))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_an_epoch_of_a_tokenised_file_is_all_of_it(tmp_path: Path, dtype: Any):
    """Guards against an epoch that ends early because ids take more bytes than was thought."""
    np.save(tmp_path / "a.npy", (np.arange(60_000) % 250).astype(dtype))
    corpus = opened({"path": str(tmp_path / "a.npy")}, val_fraction=0.3)
    assert corpus.train_bytes == pytest.approx(42_000 * np.dtype(dtype).itemsize, rel=0.01)
    stream = RecordStream(ShardReader(corpus.train), corpus.train_bytes, 1, 10)
    while stream.next() is not None:
        assert stream.epochs < 1.0
    assert stream.epochs == 1.0


def test_weights_and_validation_files_are_no_part_of_the_key(tmp_path: Path):
    """Guards against a corpus tokenised again because another share of it is wanted."""
    a = write_rows(tmp_path / "a.jsonl", [f"a {i}" for i in range(120)])
    b = write_rows(tmp_path / "b.jsonl", [f"b {i}" for i in range(120)])
    val = write_rows(tmp_path / "val.jsonl", ["held out"])
    plain = opened({"path": a}, {"path": b}, val=val)
    weighted = opened({"path": a, "weight": 1}, {"path": b, "weight": 5}, val=val)
    write_rows(tmp_path / "val.jsonl", ["something else"])
    assert opened({"path": a}, {"path": b}, val=val).key == plain.key == weighted.key


def test_text_files_of_the_hub_are_split_and_filtered(monkeypatch: pytest.MonkeyPatch):
    """Guards against streamed text files that are all held out, or escape the filters."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    texts = {f"data/{i:03d}.txt": f"A story about the number {i}. " * (30 + i) for i in range(60)}
    texts |= {f"data/9{i:02d}.txt": "Kurz. " for i in range(5)}
    with HubServer() as hub:
        hub.commit("me/stories", {name: text.encode() for name, text in texts.items()})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        source = {"path": "hub:me/stories", "filters": {"min_characters": 20}}
        corpus = opened(source, val_fraction=0.2, cache="off")
        kept = all_texts(corpus)
    assert corpus.documents is None
    assert corpus.val_documents
    assert list(corpus.sources)
    assert sorted(kept) == sorted(text for text in texts.values() if len(text) > 20)
