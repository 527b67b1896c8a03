"""Models by their names on the hub, against a real server on this machine."""

import logging
import pickle
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from gptcli import stop
from gptcli.errors import CheckpointError, ResourceError
from gptcli.interop import hub as hub_module
from gptcli.interop.hub import HubLookupError, fetch
from gptcli.runs.load import load_model
from gptcli.runs.resolve import hub_name

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
sys.path.insert(0, str(Path(__file__).parent.parent / "data"))

from hub_server import HubServer
from published import publish_folder, random_model

CPU = torch.device("cpu")
TOKENS = torch.arange(12).view(1, 12) * 7


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.chdir(tmp_path)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(reference: str, allow_pickle: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(reference, CPU, allow_pickle=allow_pickle)
    assert caught.value.exit_code == 4
    return f"{caught.value.message} | {caught.value.hint}"


@pytest.mark.parametrize("name", ["tiny", "some-one/tiny.model"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_name_is_fetched_and_runs(
    hub: HubServer, tmp_path: Path, name: str, shards: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against files that are missed, taken from elsewhere, or fetched again each time."""
    caplog.set_level(logging.INFO, "gptcli")
    model = random_model()
    folder = publish_folder(tmp_path / "made", model, shards=shards)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "consolidated.safetensors").write_bytes(b"the same again, for another program")
    commit = hub.commit(name, files_of(folder))
    loaded = load_model(name, CPU)
    with torch.no_grad():
        assert torch.equal(loaded.model(TOKENS), model(TOKENS))
    assert (loaded.name, loaded.step, loaded.run_dir) == (name.split("/")[-1], 0, None)
    assert (loaded.state, loaded.manifest, loaded.path.name) == (None, {}, commit)
    read = {path.rpartition("/")[2] for path, _ in hub.reads()}
    assert read.isdisjoint({"modeling_evil.py", "consolidated.safetensors"})
    size = sum(len(data) for file, data in files_of(folder).items() if file in read) / 1e6
    assert [r.getMessage() for r in caplog.records if "fetching" in r.getMessage()] == [
        f"fetching {name} at {commit[:12]} from {hub.url}: {len(read)} files, {size:,.1f} MB"
    ]
    before = hub.sent_bytes
    load_model(name, CPU)
    assert hub.sent_bytes == before
    assert caplog.text.count("fetching") == 1


def test_revisions(hub: HubServer, tmp_path: Path) -> None:
    """Guards against a pinned commit that moves with its branch, and branches that are passed
    over."""
    first = random_model(vocab_size=300)
    second = random_model(vocab_size=301)
    old = hub.commit("me/m", files_of(publish_folder(tmp_path / "a", first)))
    new = hub.commit("me/m", files_of(publish_folder(tmp_path / "b", second)))
    hub.commit("me/m", files_of(tmp_path / "a"), branch="old")
    assert load_model("me/m", CPU).path.name == new
    for reference in (f"me/m@{old}", "me/m@old"):
        loaded = load_model(reference, CPU)
        assert (loaded.path.name, loaded.model.vocab_size) == (old, 300)
    assert "has no revision 'gone'" in refused("me/m@gone")


def test_offline(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a model in the cache that cannot be used on a train."""
    hub.commit("me/m", files_of(publish_folder(tmp_path / "a", random_model(), shards=2)))
    expected = load_model("me/m", CPU)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert load_model("me/m", CPU).path == expected.path
    message = refused("me/other")
    assert "no run, checkpoint or folder at me/other; as a name on the hub: " in message
    assert "HF_HUB_OFFLINE" in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    assert load_model("me/m", CPU).path == expected.path


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model-00002-of-00002", "index"])
def test_a_part_in_the_cache_is_no_model(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Guards against a fetch that broke off, taken for the model: another error hides why, and
    without its tokenizer a model would read token ids."""
    hub.commit("me/m", files_of(publish_folder(tmp_path / "a", random_model(), shards=2)))
    folder = load_model("me/m", CPU).path
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    assert fetch("me/m", None).folder == folder
    next(path for path in folder.iterdir() if lost in path.name).unlink()
    with pytest.raises(HubLookupError, match="the hub could not be read"):
        fetch("me/m", None)


def test_shards_beside_the_whole_are_not_needed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a model in the cache that is useless offline, as files it does not need were
    not fetched."""
    files = files_of(publish_folder(tmp_path / "a", random_model()))
    files |= {"model-00001-of-00001.safetensors": b"x", "model.safetensors.index.json": b"{}"}
    hub.commit("me/m", files)
    folder = load_model("me/m", CPU).path
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    assert load_model("me/m", CPU).path == folder


def test_pickles_in_the_cache(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against pickles that count as weights, or are lost, where the hub is out of reach."""
    hub.commit("me/old", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    folder = fetch("me/old", None, allow_pickle=True).folder
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    assert fetch("me/old", None, allow_pickle=True).folder == folder
    with pytest.raises(HubLookupError, match="the hub could not be read"):
        fetch("me/old", None)


@pytest.mark.skipif(sys.platform != "linux", reason="files bounded by the system stand for a disk")
def test_a_full_disk_is_no_fault_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """Guards against advice to check the network where the disk is full."""
    hub.commit("me/m", files_of(publish_folder(tmp_path / "a", random_model(vocab_size=4000))))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ResourceError, match="no space left on the disk for me/m in") as caught:
            fetch("me/m", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "HF_HUB_CACHE" in str(caught.value.hint)


def test_names_that_fail(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a mistyped run that waits for the network, or hides why no model is there."""
    begun = time.monotonic()
    message = refused("smal-run")
    assert message.startswith("no run, checkpoint or folder at smal-run; as a name on the hub: ")
    assert f"no model 'smal-run' at {hub.url}" in message
    assert "see: gpt runs list\nif it is private, set HF_TOKEN" in message
    hub.commit("me/shut", {"config.json": b"{}", "model.safetensors": b""})
    hub.gated.add("me/shut")
    assert f"access to me/shut must be asked for at {hub.url}/me/shut" in refused("me/shut")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    message = refused("smal-run")
    assert "the hub could not be read: " in message
    assert "HF_ENDPOINT (http://127.0.0.1:9)" in message
    assert time.monotonic() - begun < 3.0
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(hub_module, "LOOKUP_SECONDS", 0.2)
    hub.stall_seconds = 1.0
    assert "the hub could not be read" in refused("smal-run")


def test_what_is_no_name(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against paths, files and runs with a typing error that are sent to the hub."""
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "runs"))
    (tmp_path / "here").mkdir()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    paths = ["./x", "../x", "/x", "~/x", "a/b/c", "runs/x", "here/x", "x.pt", "a/x.safetensors"]
    for reference in (*paths, "x y", "x@", ".x", "", "a//b", "x\n", "mine"):
        assert "as a name on the hub" not in refused(reference)
    assert hub.requests == []
    assert hub_name("a/b@refs/pr/1") == ("a/b", "refs/pr/1")


def test_a_server_that_dies(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a cut file that is taken for whole; and what had come is not lost."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.commit("me/m", files_of(publish_folder(tmp_path / "a", random_model())))
    hub.drop_after, hub.drops = 1000, 1000
    assert "the hub could not be read" in refused("me/m")
    hub.drops = 0
    load_model("me/m", CPU)


def test_pickles_are_never_fetched(hub: HubServer) -> None:
    """Guards against code of strangers on this disk that nobody asked for."""
    weights = pickle.dumps({"a": 1})
    hub.commit("me/old", {"config.json": b"{}", "pytorch_model.bin": weights})
    message = refused("me/old")
    assert "pickles only (pytorch_model.bin)" in message
    assert "gpt import me/old OUT --allow-pickle" in message
    assert hub.reads() == []
    found = fetch("me/old", None, allow_pickle=True)
    assert (found.folder / "pytorch_model.bin").read_bytes() == weights
    hub.commit("me/none", {"README.md": b"hello"})
    assert "has no config.json" in refused("me/none")
    hub.commit("me/code", {"config.json": b"{}", "model.gguf": b""})
    assert "has no model.safetensors" in refused("me/code")


def test_a_stop_request_ends_a_download(hub: HubServer, tmp_path: Path) -> None:
    """Guards against Ctrl-C that waits for gigabytes."""
    hub.commit("me/m", files_of(publish_folder(tmp_path / "a", random_model())))
    stop.request(2)
    with pytest.raises(stop.Stopped):
        fetch("me/m", None)


def test_hub_errors(hub: HubServer) -> None:
    """Guards against a traceback where the hub is ill."""
    hub.commit("me/m", {"config.json": b"{}", "model.safetensors": b"x" * 10})
    hub.refuse, hub.refusals = 403, 1000
    with pytest.raises(HubLookupError, match=r"HTTP 403|could not be read"):
        fetch("me/m", None)
