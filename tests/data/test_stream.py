"""The stream of records: complete in each epoch, in an order of its own, exactly resumable."""

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptcli import stop
from gptcli.config.data_schema import SourceConfig
from gptcli.data import stream as stream_module
from gptcli.data.files import resolve
from gptcli.data.readers import read_shards
from gptcli.data.shards import Shard, Split
from gptcli.data.stream import RecordStream, ShardReader, permutation

ROWS = 13
WINDOWS = [0, 3, 10000]
PER_EPOCH = ROWS + 1  # a None ends it
SIZE = sum(2 + i % 3 for i in range(ROWS)) + 118  # bytes of text in an epoch: row 5 is long


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


def opened(
    shards: list[Shard], seed: int, window: int, state: dict[str, Any] | None = None
) -> RecordStream:
    return RecordStream(ShardReader(shards), SIZE, seed, window, state)


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
    stream = opened(shards, 7, window)
    for epoch in range(3):
        assert stream.epoch == epoch
        given = take(stream, PER_EPOCH)
        assert given[-1] is None
        assert sorted(map(str, given[:-1])) == [f"{i:02d}" for i in range(ROWS)]


@pytest.mark.parametrize("window", [3, 10000])
def test_the_order_differs_by_epoch_and_seed_only(shards: list[Shard], window: int):
    """Guards against the same order every epoch, and against a run that cannot be repeated."""
    first, again, other = (opened(shards, seed, window) for seed in (7, 7, 8))
    epochs = [take(first, PER_EPOCH) for _ in range(3)]
    assert [take(again, PER_EPOCH) for _ in range(3)] == epochs
    assert take(other, PER_EPOCH) not in epochs
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_one_shard_alone_has_a_new_order_each_epoch(shards: list[Shard]):
    """Guards against a small corpus, of one shard, in the same order for ever."""
    whole = [replace(shards[0], stop=shards[-1].stop)]
    stream = opened(whole, 7, 10000)
    epochs = [take(stream, PER_EPOCH) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(len(set(epoch)) == PER_EPOCH for epoch in epochs)


def test_without_a_window_records_come_as_they_stand(shards: list[Shard]):
    """Guards against a shuffle that `shuffle_window: 0` has switched off."""
    stream = opened(shards, 7, 0)
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
        order = [shard_of[str(row)] for row in take(opened(shards, seed, 10000), ROWS)]
        runs = len(list(itertools.groupby(order)))
        assert runs > len(set(order))


@pytest.mark.parametrize("window", WINDOWS)
def test_restored_anywhere_it_goes_on_as_if_never_stopped(shards: list[Shard], window: int):
    """Guards against a resume that repeats or skips a record, at every place of two epochs."""
    length = 2 * PER_EPOCH + 4  # past the second epoch's border
    stream = opened(shards, 7, window)
    states, bytes_read, whole = [], [], []
    for _ in range(length):
        states.append(through_json(stream.state()))
        bytes_read.append((stream.epoch, stream.epoch_bytes))
        whole += take(stream, 1)
    for cut, state in enumerate(states):
        resumed = opened(shards, 7, window, state)
        assert (resumed.epoch, resumed.epoch_bytes) == bytes_read[cut]
        assert take(resumed, length - cut) == whole[cut:], f"cut before record {cut}"


@pytest.mark.parametrize("window", WINDOWS)
def test_restored_twice_in_a_row(shards: list[Shard], window: int):
    """Guards against a resumed stream whose own state is wrong: a run may be stopped often."""
    length = 2 * PER_EPOCH + 4
    whole = take(opened(shards, 7, window), length)
    for first, second in [(0, 1), (1, 0), (2, 5), (6, 0), (4, ROWS - 4), (ROWS, 1), (20, 8)]:
        stream = opened(shards, 7, window)
        given = take(stream, first)
        stream = opened(shards, 7, window, through_json(stream.state()))
        assert stream.state()["epoch"] == first // PER_EPOCH
        given += take(stream, second)
        stream = opened(shards, 7, window, through_json(stream.state()))
        given += take(stream, length - len(given))
        assert given == whole


def test_asking_for_the_state_changes_nothing(shards: list[Shard]):
    """Guards against a state that is a view of the cursor and moves on with it."""
    stream = opened(shards, 7, 3)
    take(stream, 4)
    state = stream.state()
    before = json.dumps(state)
    assert json.dumps(stream.state()) == before
    rest = take(stream, 12)
    assert json.dumps(state) == before
    assert take(opened(shards, 7, 3, state), 12) == rest
    assert json.dumps(state) == before


def test_a_window_is_limited_by_bytes_too(shards: list[Shard], monkeypatch: pytest.MonkeyPatch):
    """Guards against a window of 10000 long records that fills the memory."""
    monkeypatch.setattr(stream_module, "WINDOW_BYTES", 10)
    stream = opened(shards, 7, 10000)
    states = []
    whole = []
    for _ in range(PER_EPOCH + 3):
        states.append(through_json(stream.state()))
        whole += take(stream, 1)
    assert max(state["position"] for state in states) < 6
    assert len({state["window"] for state in states}) > 2
    for cut, state in enumerate(states):
        resumed = opened(shards, 7, 10000, state)
        assert take(resumed, PER_EPOCH + 3 - cut) == whole[cut:]


def test_epochs_grow_with_the_bytes_handed_out(shards: list[Shard]):
    """Guards against a share of the epoch that jumps back, or beyond its end."""
    stream = opened(shards, 7, 3)
    sizes, epochs = [], [stream.epochs]
    for _ in range(2 * PER_EPOCH):
        record = stream.next()
        sizes.append(0 if record is None else len(record["text"]))
        epochs.append(stream.epochs)
    assert sum(sizes) == 2 * SIZE
    assert epochs == pytest.approx([0, *itertools.accumulate(size / SIZE for size in sizes)])
    low = RecordStream(ShardReader(shards), 10, 7, 3)  # the size is a little too low
    take(low, PER_EPOCH - 1)
    assert low.epochs == pytest.approx(1.0)
    assert low.epochs < 1.0  # a whole one only at its end


def test_the_reader_goes_on_at_every_place(shards: list[Shard]):
    """Guards against a cursor that is off at the border of a shard, behind one without rows, in
    front of the first row, or after the last."""
    counts = [len(list(read_shards([shard]))) for shard in shards]
    assert 0 in counts
    order = [3, 0, 1, 4, 2]
    assert len(order) == len(shards)
    expected = [r["text"] for i in order for r in read_shards([shards[i]])]
    reader = ShardReader(shards)
    reader.open(order, (0, 0))
    cursors = [reader.cursor()]
    while reader.next() is not None:
        cursors.append(reader.cursor())
    cursors.append(reader.cursor())  # behind the last record, having found no more
    expected_rest = [*(expected[k:] for k in range(len(expected) + 1)), []]
    places = [(i, k) for i, shard in enumerate(order) for k in range(counts[shard] + 1)]
    for place, skip in places:  # as another reader may write them
        cursors.append((place, skip))
        expected_rest.append(expected[sum(counts[shard] for shard in order[:place]) + skip :])
    for cursor, rest in zip(cursors, expected_rest, strict=True):
        resumed = ShardReader(shards)
        resumed.open(order, cursor)
        assert resumed.cursor() == cursor
        given = []
        while (record := resumed.next()) is not None:
            given.append(record["text"])
        assert given == rest, f"from {cursor}"


def test_opening_an_epoch_does_not_depend_on_the_number_of_shards(shards: list[Shard]):
    """Guards against seconds at each epoch's start: `datasets` hashes the arguments it is given."""
    reader = ShardReader(shards * 5000)
    begin = time.monotonic()
    reader.open(range(reader.shards), (reader.shards - 10, 0))
    assert reader.next() is not None
    assert time.monotonic() - begin < 3


def test_reading_a_window_polls_the_stop_flag(shards: list[Shard]):
    """Guards against Ctrl-C that waits for a whole window."""
    stream = opened(shards, 7, 10000)
    stop.request(2)
    with pytest.raises(stop.Stopped):
        stream.next()
