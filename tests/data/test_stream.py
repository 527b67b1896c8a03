"""The stream of records: complete in each epoch, in an order of its own, exactly resumable."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptcli import stop
from gptcli.config.schema import SourceConfig
from gptcli.data import stream as stream_module
from gptcli.data.files import resolve
from gptcli.data.readers import Shard, Split, read_shards
from gptcli.data.stream import RecordStream, permutation

ROWS = 13
WINDOWS = [0, 3, 10000]
PER_EPOCH = ROWS + 1  # a None ends it


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """13 rows in 6 shards of different row counts, one of them without any."""
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"text": f"{i:02d}" + "x" * (i % 3)}) + "\n" for i in range(ROWS)]
    rows[5] = json.dumps({"text": "05" + "long" * 30}) + "\n"
    path.write_text("".join(rows))
    (file,) = resolve([SourceConfig(path=str(path))])
    size = path.stat().st_size
    return [Shard(file, k, min(k + 70, size), Split("none")) for k in range(0, size, 70)]


def take(stream: RecordStream, n: int) -> list[str | None]:
    """What the next `n` calls give: the row's number, or None."""
    records = [stream.next() for _ in range(n)]
    return [record and record["text"][:2] for record in records]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    return loaded


def test_permutation_is_one_and_depends_on_each_number_of_its_key():
    """Guards against repeated indices and against epochs or windows that share an order."""
    assert sorted(permutation(50, 1, 2, 3)) == list(range(50))
    assert permutation(50, 1, 2, 3) == permutation(50, 1, 2, 3)
    keys = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]
    assert len({tuple(permutation(50, *key)) for key in keys}) == len(keys)
    assert permutation(0, 1) == []


@pytest.mark.parametrize("window", WINDOWS)
def test_each_epoch_gives_each_record_once(shards: list[Shard], window: int):
    """Guards against records lost or repeated at the borders of shards, windows and epochs."""
    stream = RecordStream(shards, 7, window)
    for epoch in range(3):
        assert stream.epoch == epoch
        given = take(stream, PER_EPOCH)
        assert given[-1] is None
        assert sorted(map(str, given[:-1])) == [f"{i:02d}" for i in range(ROWS)]


@pytest.mark.parametrize("window", [3, 10000])
def test_the_order_differs_by_epoch_and_seed_only(shards: list[Shard], window: int):
    """Guards against the same order every epoch, and against a run that cannot be repeated."""
    first, again, other = (RecordStream(shards, seed, window) for seed in (7, 7, 8))
    epochs = [take(first, PER_EPOCH) for _ in range(3)]
    assert [take(again, PER_EPOCH) for _ in range(3)] == epochs
    assert take(other, PER_EPOCH) not in epochs
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_one_shard_alone_has_a_new_order_each_epoch(shards: list[Shard]):
    """Guards against a small corpus, of one shard, in the same order for ever."""
    whole = [replace(shards[0], stop=shards[-1].stop)]
    stream = RecordStream(whole, 7, 10000)
    epochs = [take(stream, PER_EPOCH) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(len(set(epoch)) == PER_EPOCH for epoch in epochs)


def test_without_a_window_records_come_as_they_stand(shards: list[Shard]):
    """Guards against a shuffle that `shuffle_window: 0` has switched off."""
    stream = RecordStream(shards, 7, 0)
    for _ in range(2):
        assert take(stream, PER_EPOCH) == [*(f"{i:02d}" for i in range(ROWS)), None]


def test_a_wide_window_shuffles_across_shards(shards: list[Shard]):
    """Guards against records that stay among those of their own shard."""
    shard_of = {
        record["text"][:2]: number
        for number, shard in enumerate(shards)
        for record in read_shards([shard])
    }
    for seed in range(10):
        order = [shard_of[str(row)] for row in take(RecordStream(shards, seed, 10000), ROWS)]
        runs = len(list(itertools.groupby(order)))
        assert runs > len(set(order))


@pytest.mark.parametrize("window", WINDOWS)
def test_restored_anywhere_it_goes_on_as_if_never_stopped(shards: list[Shard], window: int):
    """Guards against a resume that repeats or skips a record, at every place of two epochs."""
    length = 2 * PER_EPOCH + 4  # past the second epoch's border
    stream = RecordStream(shards, 7, window)
    states, bytes_read, whole = [], [], []
    for _ in range(length):
        states.append(through_json(stream.state()))
        bytes_read.append((stream.epoch, stream.epoch_bytes))
        whole += take(stream, 1)
    for cut, state in enumerate(states):
        resumed = RecordStream(shards, 7, window, state)
        assert (resumed.epoch, resumed.epoch_bytes) == bytes_read[cut]
        assert take(resumed, length - cut) == whole[cut:], f"cut before record {cut}"


@pytest.mark.parametrize("window", WINDOWS)
def test_restored_twice_in_a_row(shards: list[Shard], window: int):
    """Guards against a resumed stream whose own state is wrong: a run may be stopped often."""
    length = 2 * PER_EPOCH + 4
    whole = take(RecordStream(shards, 7, window), length)
    for first, second in [(0, 1), (1, 0), (2, 5), (6, 0), (4, ROWS - 4), (ROWS, 1), (20, 8)]:
        stream = RecordStream(shards, 7, window)
        given = take(stream, first)
        stream = RecordStream(shards, 7, window, through_json(stream.state()))
        assert stream.state()["epoch"] == first // PER_EPOCH
        given += take(stream, second)
        stream = RecordStream(shards, 7, window, through_json(stream.state()))
        given += take(stream, length - len(given))
        assert given == whole


def test_asking_for_the_state_changes_nothing(shards: list[Shard]):
    """Guards against a state that is a view of the cursor and moves on with it."""
    stream = RecordStream(shards, 7, 3)
    take(stream, 4)
    state = stream.state()
    before = json.dumps(state)
    assert json.dumps(stream.state()) == before
    rest = take(stream, 12)
    assert json.dumps(state) == before
    assert take(RecordStream(shards, 7, 3, state), 12) == rest
    assert json.dumps(state) == before


def test_a_window_is_limited_by_bytes_too(shards: list[Shard], monkeypatch: pytest.MonkeyPatch):
    """Guards against a window of 10000 long records that fills the memory."""
    monkeypatch.setattr(stream_module, "WINDOW_BYTES", 10)
    stream = RecordStream(shards, 7, 10000)
    states = []
    whole = []
    for _ in range(PER_EPOCH + 3):
        states.append(through_json(stream.state()))
        whole += take(stream, 1)
    assert max(state["position"] for state in states) < 6
    assert len({state["window"] for state in states}) > 2
    for cut, state in enumerate(states):
        resumed = RecordStream(shards, 7, 10000, state)
        assert take(resumed, PER_EPOCH + 3 - cut) == whole[cut:]


def test_reading_a_window_polls_the_stop_flag(shards: list[Shard]):
    """Guards against Ctrl-C that waits for a whole window."""
    stream = RecordStream(shards, 7, 10000)
    stop.request(2)
    with pytest.raises(stop.Stopped):
        stream.next()
