"""The token cache: the same records as reading gives, whatever happens to the files."""

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli import stop
from gptcli.config.data_schema import SourceConfig
from gptcli.data import store_writer
from gptcli.data.cache_folder import cache_root
from gptcli.data.files import resolve
from gptcli.data.pipeline import should_cache
from gptcli.data.pretokenised import PIECE_TOKENS
from gptcli.data.readers import file_tail_start
from gptcli.data.shards import PIECE_BYTES, Shard, Split
from gptcli.data.store import (
    StoreReader,
    TokenStore,
    open_store,
    store_sizes,
)
from gptcli.data.stream import RecordStream, ShardReader, permutation
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError, GptError, ResourceError

KEY = "0" * 64
WHOLE = Split("none")
FIELDS = ("document", "part", "number", "bytes", "source")
BYTES = Tokenizer.of_bytes()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("GPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_sources(path: Path) -> dict[str, list[SourceConfig]]:
    """A few records of every kind of source, each with several shards."""
    path.mkdir(exist_ok=True)
    lines = [f"Line {i} of the text, 第{i}行。\n" * (1 + i % 3) for i in range(120)]
    (path / "book.txt").write_text("".join(lines) * 40, encoding="utf-8")
    (path / "lines.txt").write_text("".join(lines), encoding="utf-8")
    rows = [{"text": "".join(lines[i : i + 1 + i % 4])} for i in range(100)]
    rows[7] = {"text": "long\n" * 30000}  # a row of three pieces
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = np.random.default_rng(0).integers(0, 256, 70000).astype(np.uint16)
    ids[::997] = BYTES.eot
    ids.tofile(path / "ids.bin")
    text = SourceConfig(path=str(path / "book.txt"))
    sources = {
        "text": [text],
        "lines": [SourceConfig(path=str(path / "lines.txt"), document="line")],
        "rows": [SourceConfig(path=str(path / "rows.jsonl"))],
        "tokens": [SourceConfig(path=str(path / "ids.bin"))],
        "builtin": [SourceConfig(path="builtin:web-bible")],
    }
    return {**sources, "several": [source for (source,) in sources.values()]}


def make_shards(sources: list[SourceConfig], split: Split = WHOLE) -> list[Shard]:
    """Small shards of the sources, some of them without a record."""
    shards = []
    for file in resolve(sources):
        if file.kind == "builtin":
            shards += [Shard(file, k, k + 10, split) for k in range(0, 40, 10)]
        elif file.kind in ("text", "tokens"):
            size, piece = os.path.getsize(file.path), PIECE_BYTES
            if file.kind == "tokens":
                size, piece = size // 2, PIECE_TOKENS
            high = size
            if split.kind == "tail":
                whole = file.kind == "tokens"
                high = int(size * 0.8) if whole else file_tail_start(file, size, 0.2)
            eot = BYTES.eot if file.kind == "tokens" else None
            pieces = -(-high // piece)
            shards += [
                Shard(file, k, min(k + 2, pieces), split, 0, high, eot=eot)
                for k in range(0, pieces, 2)
            ]
        else:
            size = os.path.getsize(file.path)
            shards += [Shard(file, k, min(k + 500, size), split) for k in range(0, size, 500)]
    return shards


def plain(record: dict[str, Any], tokenizer: Tokenizer = BYTES) -> tuple[Any, ...]:
    """A record's fields and tokens, encoded where it holds text."""
    tokens = record["tokens"] if "tokens" in record else tokenizer.encode_numpy(record["text"])
    return (*(record[name] for name in FIELDS), tokens.astype(np.uint32).tobytes(), len(tokens))


def walk(reader: Any, tokenizer: Tokenizer = BYTES) -> list[tuple[Any, ...]]:
    """Each record that is left, with the cursor behind it."""
    records = []
    while (record := reader.next()) is not None:
        records.append((*plain(record, tokenizer), tuple(reader.cursor())))
    return records


def opened(shards: list[Shard]) -> ShardReader:
    """What a store must equal: the shards read in their order."""
    reader = ShardReader(shards)
    reader.open(range(len(shards)), (0, 0))
    return reader


def files_in(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if not p.is_dir())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Blocks and files so small that every border occurs."""
    monkeypatch.setattr(store_writer, "BLOCK_RECORDS", 3)
    monkeypatch.setattr(store_writer, "BLOCK_TOKENS", 3000)
    monkeypatch.setattr(store_writer, "FILE_TOKENS", 20000)


@pytest.mark.parametrize("split", ["none", "tail", "hash"])
@pytest.mark.parametrize("kind", ["text", "lines", "rows", "tokens", "builtin", "several"])
def test_gives_what_reading_gives(tmp_path: Path, small_blocks: None, kind: str, split: Any):
    """Guards against a cached run that differs in one record or one cursor from an uncached."""
    part = Split(split, fraction=0.2, threshold=2**62)
    shards = make_shards(write_sources(tmp_path / "data")[kind], part)
    store = open_store(shards, BYTES, KEY, 2)
    streamed, stored = ShardReader(shards), StoreReader(store)
    for seed in range(2):
        order = permutation(len(shards), seed) if seed else list(range(len(shards)))
        streamed.open(order, (0, 0))
        stored.open(order, (0, 0))
        assert tuple(stored.cursor()) == tuple(streamed.cursor())
        expected = walk(streamed)
        assert walk(stored) == expected
    assert len(expected) > 3
    assert store.tokens == sum(record[-2] for record in expected)
    for number, record in enumerate(expected):
        stored.open(order, record[-1])
        assert stored.cursor() == record[-1]
        following = stored.next()
        assert (None if following is None else plain(following)) == (
            expected[number + 1][:-1] if number + 1 < len(expected) else None
        )


def test_the_shuffled_stream_goes_on_with_or_without_it(tmp_path: Path, small_blocks: None):
    """Guards against a resume that loses its place when the cache was switched on or off."""
    shards = make_shards(write_sources(tmp_path / "data")["rows"])
    store = open_store(shards, BYTES, KEY, 2)
    readers: list[Callable[[], Any]] = [lambda: ShardReader(shards), lambda: StoreReader(store)]

    def take(stream: RecordStream, count: int) -> list[Any]:
        records = (stream.next() for _ in range(count))
        return [record and plain(record) for record in records]

    whole = take(RecordStream(readers[0](), 10**6, 5, 40), 320)
    assert whole.count(None) >= 2
    for cut in (0, 1, 39, 40, 41, 100, 230):
        for first, then in ((0, 1), (1, 0)):
            stream = RecordStream(readers[first](), 10**6, 5, 40)
            assert take(stream, cut) == whole[:cut]
            state = json.loads(json.dumps(stream.state()))
            resumed = RecordStream(readers[then](), 10**6, 5, 40, state)
            assert take(resumed, 60) == whole[cut : cut + 60]


def test_large_vocabularies_are_kept_in_four_bytes(tmp_path: Path):
    """T5: ids above 65535 lost their upper half in uint16."""
    pairs = {bytes([a, b]): 4465 + 65536 - (a * 256 + b) for a in range(256) for b in range(256)}
    ranks = {bytes([b]): b for b in range(256)} | pairs
    large = Tokenizer("file", ranks, r"[\s\S]{1,20}", 70002)
    (tmp_path / "a.txt").write_text("some text\n\n\n\n" * 100)
    shards = make_shards([SourceConfig(path=str(tmp_path / "a.txt"))])
    store = open_store(shards, large, KEY, 1)
    assert store.files[0].dtype == np.uint32
    assert int(store.files[0].max()) > 65535
    assert walk(StoreReader(store)) == walk(opened(shards), large)
    assert open_store(shards, BYTES, KEY, 1).files[0].dtype == np.uint16


class Counting(Tokenizer):
    """Bytes; counts its calls, and does something before each."""

    def __init__(self, before: Callable[[int], None] = lambda calls: None) -> None:
        super().__init__("bytes", {bytes([b]): b for b in range(256)}, r"[\s\S]", 256)
        self.calls, self.before = 0, before

    def encode_numpy(self, text: Any) -> Any:
        self.calls += 1
        self.before(self.calls)
        return super().encode_numpy(text)


def test_a_second_run_encodes_nothing(tmp_path: Path):
    """Guards against a cache that is written and never read."""
    shards = make_shards(write_sources(tmp_path / "data")["rows"])
    tokenizer = Counting()
    first = walk(StoreReader(open_store(shards, tokenizer, KEY, 2)))
    calls = tokenizer.calls
    assert calls == len(first)
    assert walk(StoreReader(open_store(shards, tokenizer, KEY, 2))) == first
    assert tokenizer.calls == calls


def test_whatever_changes_the_tokens_makes_another_store(tmp_path: Path):
    """Guards against the tokens of other files, options, filters or another tokenizer."""
    shards = make_shards(write_sources(tmp_path / "data")["rows"])
    stores = [open_store(shards, BYTES, KEY, 2)]
    file = shards[0].file
    other_field = replace(file, source=file.source.model_copy(update={"on_bad_text": "error"}))
    ranks = {bytes([b]): 255 - b for b in range(256)}
    stores += [
        open_store(shards, BYTES, "1" * 64, 2),
        open_store(shards, Tokenizer("file", ranks, r"[\s\S]", 256), KEY, 2),
        open_store(shards[:-1], BYTES, KEY, 2),
        open_store([replace(shards[0], dropped=frozenset({0})), *shards[1:]], BYTES, KEY, 2),
        open_store([replace(s, file=other_field) for s in shards], BYTES, KEY, 2),
        open_store([replace(s, split=Split("hash", threshold=9)) for s in shards], BYTES, KEY, 2),
        open_store([replace(s, file=replace(s.file, number=1)) for s in shards], BYTES, KEY, 2),
    ]
    assert len({store.path for store in stores}) == len(stores)
    weighted = replace(file, source=file.source.model_copy(update={"weight": 2.0}))
    again = open_store([replace(s, file=weighted) for s in shards], BYTES, KEY, 2)
    assert again.path == stores[0].path


def flip_token(store: TokenStore) -> None:
    flip(store.path / "tokens-00000.bin")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def token_too_large(store: TokenStore) -> None:
    path = store.path / "tokens-00000.bin"
    ids = np.fromfile(path, "<u2")
    ids[len(ids) // 3] = 65535
    ids.tofile(path)


def manifest_says(**values: Any) -> Callable[[TokenStore], None]:
    def change(store: TokenStore) -> None:
        path = store.path / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def truncate(name: str) -> Callable[[TokenStore], None]:
    return lambda store: os.truncate(store.path / name, 100)


SEEN_WHEN_READ: dict[str, Callable[[TokenStore], None]] = {
    "bit flip in tokens": flip_token,
    "bit flip in index": lambda store: flip(store.path / "index.bin"),
    "id above the vocabulary": token_too_large,
}
SEEN_AT_START: dict[str, Callable[[TokenStore], None]] = {
    "bit flip in blocks": lambda store: flip(store.path / "blocks.npy"),
    "bit flip in names": lambda store: flip(store.path / "names.json"),
    "tokens cut": truncate("tokens-00000.bin"),
    "index cut": truncate("index.bin"),
    "manifest cut": truncate("manifest.json"),
    "manifest of something else": manifest_says(key="1" * 64),
    "manifest with an id above the vocabulary": manifest_says(max_id=257),
    "no list of files": manifest_says(bytes=None),
    "tokens gone": lambda store: (store.path / "tokens-00000.bin").unlink(),
    "manifest gone": lambda store: (store.path / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", [*SEEN_WHEN_READ, *SEEN_AT_START])
def test_a_damaged_store_never_changes_a_token(
    tmp_path: Path, small_blocks: None, caplog: pytest.LogCaptureFixture, damage: str
):
    """T5: a token id outside the vocabulary in the cache killed the run, or was trained on."""
    shards = make_shards(write_sources(tmp_path / "data")["rows"])
    expected = walk(opened(shards))
    store = open_store(shards, BYTES, KEY, 2)
    {**SEEN_WHEN_READ, **SEEN_AT_START}[damage](store)
    with caplog.at_level(logging.WARNING, "gptcli"):
        store = open_store(shards, BYTES, KEY, 2)
        assert len(caplog.records) == (damage in SEEN_AT_START)
        reader = StoreReader(store)
        assert walk(reader) == expected
        reader.open(list(range(len(shards))), (0, 0))
        assert walk(reader) == expected
    (warning,) = caplog.records
    assert str(store.path) in warning.message
    assert "damaged" in warning.message
    # The next start has a whole store again.
    store = open_store(shards, BYTES, KEY, 2)
    caplog.clear()
    assert walk(StoreReader(store)) == expected
    assert walk(StoreReader(open_store(shards, BYTES, KEY, 2))) == expected
    assert not caplog.records


def test_tokens_of_a_source_outside_the_vocabulary_are_an_error(tmp_path: Path, cache: Path):
    """T5: ids of another tokenizer's file reached the embedding."""
    np.array([1, 2, 257], dtype=np.uint16).tofile(tmp_path / "ids.bin")
    shards = make_shards([SourceConfig(path=str(tmp_path / "ids.bin"))])
    with pytest.raises(DataError, match=r"ids\.bin: token id 257 is outside the vocabulary of 257"):
        open_store(shards, BYTES, KEY, 2)
    assert files_in(cache) == []


def test_a_stop_request_ends_a_build_and_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Guards against Ctrl-C that waits for the whole corpus, and against half a store."""
    shards = make_shards(write_sources(tmp_path / "data")["rows"])
    tokenizer = Counting(lambda calls: stop.request(signal.SIGINT) if calls == 20 else None)
    monkeypatch.setattr(store_writer, "_CHUNK_BYTES", 1000)
    with pytest.raises(stop.Stopped):
        open_store(shards, tokenizer, KEY, 2)
    assert tokenizer.calls < 100
    assert files_in(cache) == []
    assert not list((cache / "tokens").iterdir())


FORK = multiprocessing.get_context("fork")  # a fresh interpreter imports for five seconds


class Build:
    """A process that builds the store of `shards`, at `seconds` a record."""

    def __init__(self, shards: list[Shard], data: Path, seconds: float, limit_bytes: int = 0):
        self._answer, sender = FORK.Pipe(duplex=False)
        self.process = FORK.Process(
            target=self._run, args=(sender, shards, data, seconds, limit_bytes)
        )
        self.process.start()
        sender.close()

    def answer(self) -> str:
        """The number of records, or exit code, message and hint of the error."""
        assert self._answer.poll(60)
        answer = self._answer.recv()
        self.process.join()
        return answer

    @staticmethod
    def _run(sender: Any, shards: list[Shard], data: Path, seconds: float, limit_bytes: int):
        def slowly(calls: int) -> None:
            time.sleep(seconds)
            with open(f"{data}.calls", "a") as f:
                f.write("x")

        store_writer._CHUNK_BYTES = 1000
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        try:
            store = open_store(shards, Counting(slowly), KEY, 2)
            sender.send(str(len(walk(StoreReader(store)))))
        except GptError as error:
            sender.send(f"{error.exit_code} {error} {error.hint}")


def test_a_killed_build_is_forgotten(tmp_path: Path, cache: Path):
    """Guards against half a store that is taken for a whole one, and against litter."""
    data = tmp_path / "data"
    shards = make_shards(write_sources(data)["rows"])
    process = Build(shards, data, 0.02).process
    calls = tmp_path / "data.calls"
    deadline = time.monotonic() + 60
    while (not calls.exists() or calls.stat().st_size < 10) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert [p.suffix for p in (cache / "tokens").iterdir() if p.is_dir()] == [".building"]
    assert store_sizes() == []
    # Any start removes it, also one that wants another store.
    other = open_store(shards[:3], BYTES, KEY, 2)
    assert list((cache / "tokens").iterdir()) == [other.path]
    store = open_store(shards, BYTES, KEY, 2)
    assert walk(StoreReader(store)) == walk(opened(shards))


def test_two_processes_build_once(tmp_path: Path, cache: Path):
    """Guards against two runs started together that both tokenise, or mix their files."""
    data = tmp_path / "data"
    shards = make_shards(write_sources(data)["rows"])
    builds = [Build(shards, data, 0.02) for _ in range(2)]
    records = str(len(walk(opened(shards))))
    assert [build.answer() for build in builds] == [records, records]
    assert (tmp_path / "data.calls").stat().st_size == int(records)
    assert len(list((cache / "tokens").iterdir())) == 1


def test_a_file_that_cannot_grow_is_a_resource_error(tmp_path: Path, cache: Path):
    """Guards against a full disk that ends in a traceback and stays full."""
    shards = make_shards(write_sources(tmp_path / "data")["rows"])
    out = Build(shards, tmp_path / "data", 0, limit_bytes=200_000).answer()
    assert out.startswith("6 ")
    assert "cannot be written" in out
    assert "data.cache: off" in out
    assert files_in(cache) == []


def test_a_disk_too_small_is_told_before_it_is_full(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Guards against an hour of tokenising that ends because the disk is full."""
    shards = make_shards(write_sources(tmp_path / "data")["several"])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store_writer, "_FIRST_REPORT_SECONDS", 0.0)
    monkeypatch.setattr(store_writer, "_REPORT_SECONDS", 0.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ResourceError, match=r"needs .* GB more"):
        open_store(shards, BYTES, KEY, 2)
    assert files_in(cache) == []


def test_progress_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Guards against minutes of silence, and against shares above one."""
    monkeypatch.setattr(store_writer, "_FIRST_REPORT_SECONDS", 0.0)
    monkeypatch.setattr(store_writer, "_REPORT_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "gptcli"):
        open_store(make_shards(write_sources(tmp_path / "data")["several"]), BYTES, KEY, 2)
    shares = [int(record.message.split()[1]) for record in caplog.records]
    assert shares == sorted(shares)
    assert shares[0] < 20
    assert 80 < shares[-1] <= 100


def test_stores_unused_for_60_days_go_when_another_is_built(tmp_path: Path):
    """Guards against a cache that only grows, and against one that drops what is in use."""
    shards = make_shards(write_sources(tmp_path / "data")["rows"])
    old, used = (open_store(shards[n:], BYTES, KEY, 2) for n in (1, 2))
    long_ago = time.time() - 61 * 24 * 3600
    for store in (old, used):
        os.utime(store.path / "manifest.json", (long_ago, long_ago))
    open_store(shards[2:], BYTES, KEY, 2)
    new = open_store(shards[3:], BYTES, KEY, 2)
    sizes = store_sizes()
    assert {size.path for size in sizes} == {used.path, new.path}
    expected = {path: sum(f.stat().st_size for f in path.iterdir()) for path in {new.path}}
    assert {s.path: s.size_bytes for s in sizes}[new.path] == expected[new.path]
    assert all(abs(size.last_used - time.time()) < 60 for size in sizes)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Guards against a cache in the working directory when a variable is empty."""
    assert cache_root() == tmp_path / "cache"
    monkeypatch.setenv("GPT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "gptcli"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "gptcli"


GB = 2**30


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("on", None, True, None), True),
        (("off", 100, False, 1e9), False),
        (("auto", 4 * GB, False, 0.5 * GB), True),
        (("auto", 4 * GB + 1, False, 1e12), False),
        (("auto", 4 * GB, False, 0.4 * GB), False),
        (("auto", 1000, True, 1e9), False),
        (("auto", None, False, 1e9), False),
        (("auto", 1000, False, None), False),
    ],
)
def test_auto_caches_what_is_read_again(arguments: Any, expected: bool):
    """Guards against a cache written for a corpus of which a run reads a hundredth."""
    assert should_cache(*arguments) is expected


def test_an_empty_corpus_has_a_store(tmp_path: Path):
    """Guards against a memory map of an empty file, which is an error."""
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    shards = make_shards([SourceConfig(path=str(tmp_path / "empty.jsonl"))])
    for _ in range(2):
        store = open_store(shards, BYTES, KEY, 2)
        assert store.tokens == 0
        assert StoreReader(store).next() is None
