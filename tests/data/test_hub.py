"""Hub corpora against a real server on this machine: listing, pinning, ranged reads, failures."""

import io
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli import stop
from gptcli.config.data_schema import SourceConfig
from gptcli.data import remote
from gptcli.data.hub import RemoteFile, hub_files, open_remote
from gptcli.errors import DataError

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from hub_server import HubServer, blob_id

CARD = """---
configs:
- config_name: plain
  default: true
  data_files:
  - {split: train, path: plain/train-*}
  - {split: validation, path: plain/valid.jsonl}
- config_name: tables
  data_files: [{split: train, path: ["tables/b.parquet", "tables/*.parquet"]}]
---
# Stories
"""
FILES = {
    "README.md": CARD.encode(),
    "plain/train-0.jsonl": b'{"text": "one"}\n',
    "plain/train-1.jsonl.gz": b"not read here",
    "plain/valid.jsonl": b'{"text": "two"}\n',
    "tables/a.parquet": b"aaa",
    "tables/b.parquet": b"bb",
}


def forget(monkeypatch: pytest.MonkeyPatch) -> remote._Cache:
    """Empty the cache of blocks, as in a new process."""
    monkeypatch.setattr(remote, "_CACHE", remote._Cache())
    return remote._CACHE


def card(text: str) -> bytes:
    return f"---\n{text}\n---\n".encode()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", (0.01, 0.01, 0.01, 0.01))
    forget(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", False)
    stop.reset()
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()
    stop.reset()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def listed(path: str, split: str | None = None, known: dict[str, str] | None = None) -> list[str]:
    """Names of the files inside the repository."""
    files = hub_files(SourceConfig(path=path, split=split), known)
    return [file.path.split("@", 1)[1].split("/", 1)[1] for file in files]


def one(hub: HubServer, data: bytes, name: str = "a.txt") -> RemoteFile:
    """A dataset of one file."""
    hub.commit("me/one", {name: data})
    [file] = hub_files(SourceConfig(path="hub:me/one"))
    hub.requests.clear()
    hub.sent_bytes = 0
    return file


def test_config_and_split_choose_the_files(hub: HubServer) -> None:
    """Another config's files were read, or validation text was trained on."""
    commit = hub.commit("me/stories", FILES)
    assert listed("hub:me/stories") == ["plain/train-0.jsonl", "plain/train-1.jsonl.gz"]
    assert listed("hub:me/stories:plain", "validation") == ["plain/valid.jsonl"]
    assert listed(f"hub:me/stories:tables@{commit}") == ["tables/b.parquet", "tables/a.parquet"]
    files = hub_files(SourceConfig(path="hub:me/stories"))
    name, data = "plain/train-0.jsonl", FILES["plain/train-0.jsonl"]
    path = f"hf://datasets/me/stories@{commit}/{name}"
    assert files[0] == RemoteFile(path, len(data), blob_id(data))
    assert len(files[1].identity) == 64  # large files: the SHA-256
    assert all("/datasets/me/stories" in place for _, place, _ in hub.requests)  # no telemetry


@pytest.mark.parametrize(
    ("files", "train"),
    [
        ({"data/train-00000-of-00001.parquet": b"1", "data/test-00000-of-00001.parquet": b"2"}, 0),
        ({"train.csv": b"1", "test.csv": b"2", "LICENSE": b"3"}, 0),
        ({"book.txt": b"1", "cover.png": b"2", ".gitattributes": b"3"}, 0),
    ],
)
def test_a_dataset_without_a_card(hub: HubServer, files: dict[str, bytes], train: int) -> None:
    """Most small datasets are bare files; test text and pictures must stay out of training."""
    hub.commit("me/bare", files)
    assert listed("hub:me/bare") == [list(files)[train]]


def test_a_long_listing_is_read_to_its_end(hub: HubServer) -> None:
    """Listings come in pages; files behind the first were not trained on."""
    hub.page = 10
    hub.commit("me/many", {f"data/train-{i:05d}-of-00035.parquet": b"%d" % i for i in range(35)})
    assert len(listed("hub:me/many")) == 35


def test_the_known_commit_is_read_again(hub: HubServer) -> None:
    """A resume after `main` moved would continue on other text."""
    old = hub.commit("me/one", {"a.txt": b"old"})
    known = {file.path: "fingerprint" for file in hub_files(SourceConfig(path="hub:me/one"))}
    new = hub.commit("me/one", {"a.txt": b"new text", "b.txt": b"more"})
    source = SourceConfig(path="hub:me/one")
    [file] = hub_files(source, {**known, "/data/local.txt": "x", "builtin:web-bible": "y"})
    assert f"@{old}/" in file.path
    assert open_remote(file.path, file.size, file.identity).read() == b"old"
    assert [f"@{new}/" in f.path for f in hub_files(source, {})] == [True, True]
    [named] = hub_files(SourceConfig(path=f"hub:me/one@{old}"), {file.path: "z"})
    assert named == file


def test_reads_equal_the_file(hub: HubServer) -> None:
    """An off-by-one at a block's border would move bytes; the oracle is the file in memory."""
    rng = random.Random(1)
    data = rng.randbytes(6 * remote.BLOCK_BYTES + 1234)
    file = one(hub, data)
    got, plain = open_remote(file.path, file.size, file.identity), io.BytesIO(data)
    border = remote.BLOCK_BYTES
    for place in [0, border - 1, border, 3 * border - 5, len(data) - 1, len(data), len(data) + 9]:
        for size in (1, 10, 100_000, 2 * border + 3):
            assert got.seek(place) == plain.seek(place)
            assert got.read(size) == plain.read(size)
    assert got.seek(-7, io.SEEK_END) == plain.seek(-7, io.SEEK_END)
    assert got.read() == plain.read()
    got.seek(0)
    plain.seek(0)
    assert all(got.readline() == line for line in plain)
    assert open_remote(file.path).read() == data  # size unknown


def test_reading_in_order_fetches_each_byte_once(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache too small, or shards opened one by one, would fetch a corpus several times."""
    data = random.Random(2).randbytes(9 * remote.BLOCK_BYTES)
    file = one(hub, data)
    got = []
    for start in range(0, len(data), remote.BLOCK_BYTES):  # as shards do
        with open_remote(file.path, file.size, file.identity) as part:
            part.seek(start)
            got.append(part.read(remote.BLOCK_BYTES))
    with open_remote(file.path, file.size, file.identity) as whole:
        assert b"".join(got) == whole.read() == data
    assert hub.sent_bytes == len(data)
    cache = forget(monkeypatch)
    with open_remote(file.path, file.size, file.identity) as whole:
        while whole.read(100_000):
            pass
    assert hub.sent_bytes == 2 * len(data)
    assert len(hub.reads()) < 9 + 9  # read in order, several blocks come in one request
    assert len(cache._blocks) <= remote.CACHE_BLOCKS


def test_opening_a_file_again_costs_no_request(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard's opening looks at the file's first bytes: a corpus would be fetched twice."""
    monkeypatch.setattr(remote, "CACHE_BLOCKS", 2)
    data = random.Random(6).randbytes(6 * remote.BLOCK_BYTES)
    file = one(hub, data)
    open_remote(file.path, file.size).read(4)
    for number in (3, 1, 5, 2, 4):  # in random order, as in training
        with open_remote(file.path, file.size, file.identity) as f:
            assert f.read(4) == data[:4]
            f.seek(number * remote.BLOCK_BYTES)
            assert f.read(50_000) == data[number * remote.BLOCK_BYTES :][:50_000]
    assert hub.sent_bytes == len(data)
    with open_remote(file.path, file.size) as f:
        assert f.read() == data


def test_an_empty_file_is_empty(hub: HubServer) -> None:
    """A range of nothing is an HTTP error."""
    file = one(hub, b"")
    assert open_remote(file.path, file.size).read() == b""
    assert open_remote(file.path).read() == b""
    assert open_remote(file.path).seek(0, io.SEEK_END) == 0


@pytest.mark.parametrize("name", ["a.txt", "train.parquet"])  # the second behind a redirect
def test_a_drop_in_the_middle_is_recovered(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """D16: one broken connection ended a run of days, or lost or repeated bytes."""
    data = random.Random(3).randbytes(3 * remote.BLOCK_BYTES + 99)
    file = one(hub, data, name)
    hub.drop_after, hub.drops = 200_000, 4  # less than a block in all
    with open_remote(file.path, file.size, file.identity) as f:
        assert f.read() == data
    assert hub.drops == 0
    whole = len(hub.reads())
    forget(monkeypatch)
    hub.requests.clear()
    with open_remote(file.path, file.size, file.identity) as f:
        assert f.read() == data
    assert whole == len(hub.reads()) + 4  # a retry each
    hub.refuse, hub.refusals = 503, 2
    forget(monkeypatch)
    with open_remote(file.path, file.size, file.identity) as f:
        assert f.read(10) == data[:10]
    assert hub.refusals == 0


def test_a_network_that_stays_down_ends_in_an_error(hub: HubServer) -> None:
    """D16: endless retries hang a run; the message must say that --resume goes on."""
    file = one(hub, bytes(3_000_000))
    hub.drop_after, hub.drops = 0, 10**6
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"the network failed: \S") as error:
        open_remote(file.path, file.size).read()
    assert str(error.value).startswith(file.path)
    assert "--resume" in str(error.value.hint)
    assert len(hub.reads()) == 5
    assert time.monotonic() - begun < 10


def test_reading_on_after_the_network_came_back(hub: HubServer) -> None:
    """D16: the failed read must not leave a hole or a moved place behind."""
    data = random.Random(4).randbytes(2_000_000)
    file = one(hub, data)
    f = open_remote(file.path, file.size)
    assert f.read(1_500) == data[:1_500]
    hub.drop_after, hub.drops = 1000, 5
    with pytest.raises(DataError, match="network failed"):
        f.read()
    f = open_remote(file.path, file.size)
    f.seek(1_500)
    assert f.read() == data[1_500:]


def test_a_failure_while_reading_ahead_arrives(hub: HubServer) -> None:
    """D17: an error in the thread that reads ahead must not be swallowed, nor hang the reader."""
    data = bytes(8 * remote.BLOCK_BYTES)
    file = one(hub, data)
    f = open_remote(file.path, file.size)
    for _ in range(2):
        f.read(remote.BLOCK_BYTES)
    hub.drop_after, hub.drops = 0, 10**6
    with pytest.raises(DataError, match="network failed"):
        f.read()


def test_a_stop_ends_the_waiting(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during a long backoff was noticed only after it."""
    file = one(hub, bytes(100))
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", (60.0,))
    hub.drops, begun = 10**6, time.monotonic()
    threading.Timer(0.3, stop.request, (2,)).start()
    with pytest.raises(stop.Stopped):
        open_remote(file.path, file.size).read()
    assert time.monotonic() - begun < 5


def test_a_changed_file_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: other bytes under the listed name would be trained on unseen."""
    for name in ("a.txt", "train.parquet"):
        data = b"first " * 50
        file = one(hub, data, name)
        commit = hub.refs["me/one"]["main"]
        for other in (data[:-1], b"other " * 50):
            forget(monkeypatch)
            hub.commits["me/one", commit][name] = other
            with pytest.raises(DataError, match="not the one that was listed any more"):
                open_remote(file.path, file.size, file.identity).read()


def test_parquet_reads_only_the_row_group_it_needs(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of a large parquet file must not fetch the whole of it."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 16 * 1024)
    rng = random.Random(5)
    rows = [rng.randbytes(500).hex() for _ in range(4000)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), buffer, row_group_size=100, compression="none")
    file = one(hub, buffer.getvalue(), "train.parquet")
    table = pq.ParquetFile(open_remote(file.path, file.size, file.identity))
    assert table.num_row_groups == 40
    assert table.read_row_group(17)["text"].to_pylist() == rows[1700:1800]
    assert hub.sent_bytes < file.size / 10


@pytest.mark.parametrize(
    ("path", "split", "message", "hint"),
    [
        ("hub:me/storys", None, "no dataset 'me/storys'", "HF_TOKEN"),
        ("hub:me/stories:tabels", None, "no config 'tabels'; it has: tables, plain", "CONFIG"),
        ("hub:me/stories", "test", "no split 'test'; it has: train, validation", "split"),
        ("hub:me/stories@v2", None, "no such revision; it has: old, main", ""),
        ("hub:me/two", None, "name one of its configs: x, y", "hub:me/two:x"),
        ("hub:me/bare:en", None, "no config 'en'; it has no configs", "hub:me/bare"),
        ("hub:me/script", None, "script.py: not a kind of file", "refs/convert/parquet"),
        ("hub:me/empty", None, "no data files in this dataset", ""),
        ("hub:me/audio", None, "sound.mp3: not a kind of file that is read here", ".parquet"),
        ("hub:me/gated", None, "access must be asked for at http", "HF_TOKEN"),
        ("hub:me/outside", None, "its card names a file outside it: '/etc/", ""),
        ("hub:me/other", None, "its card names a file outside it: 'https://", ""),
        ("hub:me/broken", None, "its card cannot be read: ", ""),
        ("hub:me/gone", None, "no file matches 'data/\\*'", ""),
        ("hub:stories", None, "not the name of a hub dataset", "hub:owner/name"),
        ("hub:me/a--b", None, "--", "hub:owner/name"),
        ("hub:../../etc", None, "not the name of a hub dataset", "hub:owner/name"),
    ],
)
def test_wrong_names_say_what_there_is(
    hub: HubServer, path: str, split: str | None, message: str, hint: str
) -> None:
    """D1, D2 for the hub: a traceback of the library, or no word about what exists."""
    hub.commit("me/stories", FILES, "old")
    hub.commit("me/stories", FILES)

    two = "configs: [{config_name: x, data_files: a.txt}, {config_name: y, data_files: a.txt}]"
    hub.commit("me/two", {"README.md": card(two), "a.txt": b"x"})
    hub.commit("me/bare", {"a.txt": b"x"})
    hub.commit("me/empty", {"README.md": b"nothing"})
    hub.commit("me/script", {"script.py": b"import os"})
    hub.commit("me/audio", {"sound.mp3": b"x"})
    hub.commit("me/gated", FILES)
    hub.gated.add("me/gated")
    for name, pattern in (("outside", "/etc/*"), ("other", "https://example.org/a.txt")):
        text = f"configs: [{{config_name: default, data_files: '{pattern}'}}]"
        hub.commit(f"me/{name}", {"README.md": card(text), "a.txt": b"x"})
    hub.commit("me/broken", {"README.md": card("configs: {a: ["), "a.txt": b"x"})
    gone = card("configs: [{config_name: default, data_files: 'data/*'}]")
    hub.commit("me/gone", {"README.md": gone, "a.txt": b"x"})
    with pytest.raises(DataError, match=message) as error:
        hub_files(SourceConfig(path=path, split=split))
    assert str(error.value).startswith((path, "hf://datasets/me/gated@"))
    assert hint in str(error.value.hint or "")


def test_a_token_opens_a_gated_dataset(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN must reach listings and reads alike."""
    hub.commit("me/gated", FILES)
    hub.gated.add("me/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    [file, _] = hub_files(SourceConfig(path="hub:me/gated"))
    assert open_remote(file.path, file.size).read() == FILES["plain/train-0.jsonl"]


def test_no_network_and_offline_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a network gave a traceback, or waited for minutes."""
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)  # closed below
    begun = time.monotonic()
    with pytest.raises(DataError, match="hub:me/x: the hub could not be read: ") as error:
        hub_files(SourceConfig(path="hub:me/x"))
    assert "name local files" in str(error.value.hint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="switched off by HF_HUB_OFFLINE"):
        hub_files(SourceConfig(path="hub:me/x"))
    assert time.monotonic() - begun < 5


def test_a_hub_that_never_answers(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's listings wait forever; a stalled hub must end in an error."""
    hub.commit("me/stories", FILES)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    file = hub_files(SourceConfig(path="hub:me/stories"))[0]
    hub.stall_seconds = 1.0
    with pytest.raises(DataError, match="could not be read"):
        hub_files(SourceConfig(path="hub:me/stories"))
    with pytest.raises(DataError, match="the network failed"):
        open_remote(file.path, file.size).read()
    assert huggingface_hub.get_session().timeout.read == remote.REQUEST_SECONDS
