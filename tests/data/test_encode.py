"""Encoding ahead in threads: the order, the position, errors, and threads that end."""

import gc
import json
import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from gptcli import stop
from gptcli.data import encode
from gptcli.data.encode import EncodedStream
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError

TOKENIZER = Tokenizer.of_bytes()


class Texts:
    """Epochs of the given texts; an exception among them is raised, and again if asked again."""

    def __init__(self, texts: list[Any], given: int = 0) -> None:
        self.texts, self.given = texts, given

    @property
    def epochs(self) -> float:
        whole, rest = divmod(self.given, len(self.texts) + 1)
        return whole + rest / len(self.texts)

    def next(self) -> dict[str, Any] | None:
        at = self.given % (len(self.texts) + 1)
        text = self.texts[at] if at < len(self.texts) else None
        if isinstance(text, Exception):
            raise text
        self.given += 1
        if text is None:
            return None
        record = {"document": str(at), "part": 0, "number": at, "bytes": len(text), "source": 0}
        return {**record, ("tokens" if isinstance(text, np.ndarray) else "text"): text}

    def state(self) -> dict[str, Any]:
        return {"given": self.given}


def tokens_of(stream: EncodedStream, n: int) -> list[list[int] | None]:
    records = [stream.next() for _ in range(n)]
    return [None if record is None else record["tokens"].tolist() for record in records]


def encoding_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("encode")}


@pytest.fixture
def texts() -> list[str]:
    """Texts of very different lengths, so that threads finish out of order."""
    chosen = random.Random(5)
    return [f"{i} " * chosen.choice([1, 5, 2000, 60_000]) for i in range(60)]


@pytest.mark.parametrize("threads", [1, 4])
def test_records_come_in_order_with_their_own_tokens(texts: list[str], threads: int):
    """Guards against the tokens of another record, and against epochs' ends that are lost."""
    stream = EncodedStream(Texts(texts), TOKENIZER, threads)
    expected = [*(list(text.encode()) for text in texts), None]
    assert tokens_of(stream, 2 * len(expected)) == expected * 2
    stream.close()


def test_bytes_are_encoded_as_they_are():
    """Guards against raw files that are decoded on the way to the bytes tokenizer."""
    raw = bytes(range(256))
    stream = EncodedStream(Texts([raw]), TOKENIZER, 1)
    assert tokens_of(stream, 1) == [list(range(256))]


def test_tokens_pass_as_they_are():
    """Guards against a tokenised corpus that is encoded again, or loses its place among texts."""
    ids = np.array([7, 300, 9], dtype=np.uint16)
    stream = EncodedStream(Texts(["ab", ids, "c"]), TOKENIZER, 2)
    assert tokens_of(stream, 4) == [[97, 98], [7, 300, 9], [99], None]


def test_the_state_is_that_behind_the_last_record_handed_out(texts: list[str]):
    """Guards against a position that counts what was only read ahead."""
    source = Texts(texts)
    stream = EncodedStream(source, TOKENIZER, 2)
    assert (stream.state(), stream.epochs) == ({"given": 0}, 0.0)
    for n in range(1, 100):
        record = stream.next()
        assert stream.state() == {"given": n}
        assert stream.epochs == Texts(texts, n).epochs
        if n % 13 == 0:
            resumed = EncodedStream(Texts(texts, stream.state()["given"]), TOKENIZER, 2)
            following = Texts(texts, n).next()
            assert following is not None
            assert tokens_of(resumed, 1) == [list(following["text"].encode())]
        assert record is None or record["text"] == Texts(texts, n - 1).next()["text"]
    assert source.given > n
    assert len(json.dumps(stream.state())) < 100


def test_reading_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """Guards against a corpus that is read into memory: by size, and by number where texts are
    short, and where an epoch is next to nothing."""
    monkeypatch.setattr(encode, "AHEAD_BYTES", 1 << 20)
    for size, most in ((100_000, 14), (1, 1300)):
        source = Texts(["x" * size] * 5000)
        stream = EncodedStream(source, TOKENIZER, 2)
        for n in range(1, 40):
            stream.next()
            assert n < source.given <= n + most
    source = Texts(["x"])
    EncodedStream(source, TOKENIZER, 2).next()
    assert source.epochs <= 3


@pytest.mark.parametrize("error", [DataError("the row is broken"), stop.Stopped()])
@pytest.mark.parametrize("at", [0, 3])
def test_an_error_of_the_reader_comes_at_its_place(at: int, error: Exception):
    """D17: guards against records in front of a broken row that are lost, a step that waits for
    ever behind it, and a stop request that ends in a traceback."""
    stream = EncodedStream(Texts([*"abcdef"[:at], error, "g"]), TOKENIZER, 2)
    assert tokens_of(stream, at) == [[97 + i] for i in range(at)]
    for _ in range(3):
        with pytest.raises(type(error)) as caught:
            stream.next()
        assert caught.value is error
        assert stream.state() == {"given": at}


def test_an_error_of_the_tokenizer_comes_at_its_place():
    """Guards against an error in a thread that nobody sees, or that hides what came before it."""
    stream = EncodedStream(Texts(["a", "b", 5 * ["no text"], "c"]), TOKENIZER, 2)
    assert tokens_of(stream, 2) == [[97], [98]]
    for _ in range(2):
        with pytest.raises(AttributeError, match="encode"):
            stream.next()
        assert stream.state() == {"given": 2}


@pytest.mark.parametrize("how", ["close", "collect", "error"])
def test_no_thread_outlives_the_stream(how: str):
    """Guards against threads that keep encoding, and hold memory, behind a run's end."""
    before = encoding_threads()
    tail = [DataError("broken")] if how == "error" else []
    stream = EncodedStream(Texts([*["word " * 20_000] * 300, *tail]), TOKENIZER, 3)
    stream.next()
    assert encoding_threads() - before
    if how == "close":
        stream.close()
        assert not encoding_threads() - before
    elif how == "error":
        with pytest.raises(DataError):
            tokens_of(stream, 300)
    del stream
    gc.collect()
    end = time.monotonic() + 20
    while encoding_threads() - before:
        assert time.monotonic() < end
        time.sleep(0.01)
