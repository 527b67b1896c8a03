"""Mixtures: the shares of the tokens, their order, empty streams, resuming."""

import itertools
import json
from typing import Any

import numpy as np
import pytest

from gptcli.data.mixture import Mixture
from gptcli.errors import DataError


class Numbered:
    """Epochs of records with the given numbers of tokens; each token is the stream's name."""

    def __init__(self, name: int, lengths: list[int], state: dict[str, Any] | None = None) -> None:
        self.name, self.lengths = name, lengths
        self.given = state["given"] if state else 0  # None at the epochs' ends counted

    @property
    def epochs(self) -> float:
        whole, rest = divmod(self.given, len(self.lengths) + 1)
        return whole + rest / max(len(self.lengths), 1)

    def next(self) -> dict[str, Any] | None:
        at = self.given % (len(self.lengths) + 1)
        self.given += 1
        if at == len(self.lengths):
            return None
        tokens = np.full(self.lengths[at], self.name, dtype=np.uint16)
        return {"document": f"{self.name}", "part": 1, "number": at, "bytes": 4, "tokens": tokens}

    def state(self) -> dict[str, Any]:
        return {"given": self.given}


def names(mixture: Mixture, n: int) -> list[int]:
    records = [mixture.next() for _ in range(n)]
    return [int(record["tokens"][0]) for record in records if record is not None]


@pytest.mark.parametrize(
    "weights", [[1.0, 1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1.0, 2.0, 3.0, 994.0]]
)
def test_every_share_is_right_all_the_time(weights: list[float]):
    """Guards against shares by records instead of tokens, weights that must add up to one, and a
    source that is starved or comes in long blocks."""
    lengths = [[1], [50, 3], [7, 7, 100], [20]]
    mixture = Mixture([Numbered(i, lengths[i]) for i in range(len(weights))], weights)
    tokens = np.zeros(len(weights))
    for _ in range(3000):
        record = mixture.next()
        assert record is not None
        tokens[int(record["tokens"][0])] += len(record["tokens"])
        off = np.abs(tokens - tokens.sum() * np.array(weights) / sum(weights))
        assert off.max() <= 100 * (len(weights) - 1)
    assert mixture.tokens == tokens.tolist()


def test_without_weights_the_shares_are_equal_and_ties_go_to_the_first():
    """Guards against an order that depends on anything but the streams."""
    mixture = Mixture([Numbered(i, [10]) for i in range(3)])
    assert names(mixture, 9) == [0, 1, 2] * 3


def test_a_document_counts_its_separator():
    """Guards against too many one-token documents: each brings an eot that the model trains on."""

    class Documents(Numbered):
        def next(self) -> dict[str, Any] | None:
            record = super().next()
            return record and {**record, "part": 0}

    mixture = Mixture([Documents(0, [1]), Numbered(1, [2])])
    assert names(mixture, 8) == [0, 1] * 4
    assert mixture.tokens == [8, 8]


def test_one_stream_passes_through_with_its_epochs_ends():
    """Guards against an epoch that nobody sees the end of, so that its last rows wait."""
    mixture = Mixture([Numbered(0, [5, 6])], [2.5])
    given = [record and len(record["tokens"]) for record in (mixture.next() for _ in range(6))]
    assert given == [5, 6, None, 5, 6, None]
    assert mixture.single
    assert mixture.epochs == 2.0


def test_ends_of_epochs_are_skipped_and_epochs_are_the_fewest():
    """Guards against a None among the records, and a run that ends with the smallest source."""
    mixture = Mixture([Numbered(0, [10]), Numbered(1, [10] * 8)])
    assert not mixture.single
    for _ in range(40):
        assert mixture.next() is not None
        assert mixture.epochs == min(mixture.stream_epochs)
    assert mixture.stream_epochs[0] > 5 * mixture.stream_epochs[1] > 10


@pytest.mark.parametrize("streams", [[[]], [[0, 0]], [[5], []], [[5], [0]]])
def test_a_stream_without_text_is_an_error(streams: list[list[int]]):
    """D3: guards against a run that searches an empty source for ever."""
    mixture = Mixture([Numbered(i, lengths) for i, lengths in enumerate(streams)])
    with pytest.raises(DataError, match="no text"):
        names(mixture, 20)


@pytest.mark.parametrize("now", [1, 3])
def test_a_place_in_another_number_of_streams_is_none(now: int):
    """Guards against a mixture that goes on with the shares of other sources."""
    state = json.loads(json.dumps(Mixture([Numbered(0, [5]), Numbered(1, [7])]).state()))
    streams = [Numbered(i, [5], (state["streams"] * 2)[i]) for i in range(now)]
    with pytest.raises(ValueError, match=f"one in 2 streams, not {now}"):
        Mixture(streams, None, state)


@pytest.mark.parametrize("lengths", [[[3, 4]], [[3], [4, 9, 1], [2, 2]]])
def test_restored_anywhere_it_goes_on_as_if_never_stopped(lengths: list[list[int]]):
    """Guards against a mixture that begins to balance anew, or takes the end of an epoch just
    behind a resume for an empty source."""
    weights = [1.0, 2.0, 3.5][: len(lengths)]
    mixture = Mixture(list(itertools.starmap(Numbered, enumerate(lengths))), weights)
    states, whole = [], []
    for _ in range(40):
        states.append(json.dumps(mixture.state()))
        record = mixture.next()
        whole.append(record and (int(record["tokens"][0]), len(record["tokens"])))
    for cut in range(40):
        state = json.loads(states[cut])
        streams = [Numbered(i, n, state["streams"][i]) for i, n in enumerate(lengths)]
        resumed = Mixture(streams, weights, state)
        rest = [resumed.next() for _ in range(cut, 40)]
        assert [r and (int(r["tokens"][0]), len(r["tokens"])) for r in rest] == whole[cut:]
