"""Several streams of records mixed by weight, with no randomness: a deficit rule on tokens."""

from typing import Any, Protocol

from gptcli.errors import DataError


class Stream(Protocol):
    """Records without end, None once at each epoch's end, with the place behind the last one."""

    @property
    def epochs(self) -> float:
        """Passes over the records so far, as a fraction by bytes."""

    def next(self) -> dict[str, Any] | None:
        """The next record, or None once at the end of each epoch."""

    def state(self) -> dict[str, Any]:
        """The place behind the last record, JSON-able."""


class Mixture:
    """Records (with "tokens") of the streams, tokens in proportion to `weights` (None: equal).

    Each record comes from the stream that is furthest behind its share of the tokens so far, the
    first one of equals; so after every record each share is right to within a record or two, and
    the order is a function of the streams alone. (Rows are shuffled in groups of about a million
    tokens later on: within a group that has been read in part, shares vary as in any sample.) A
    document counts one token more than it has, for its separator. One stream passes through, None
    at its epochs' ends included; several give none.

    Streams are restored by whoever makes them, from `state["streams"]`; `state` is what `state()`
    gave.
    """

    def __init__(
        self,
        streams: list[Any],
        weights: list[float] | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._streams: list[Stream] = streams
        weights = weights or [1.0] * len(streams)
        assert len(weights) == len(streams) > 0
        self._shares = [weight / sum(weights) for weight in weights]
        self.tokens: list[int] = list(state["tokens"]) if state else [0] * len(streams)
        if len(self.tokens) != len(streams) or (state and len(state["streams"]) != len(streams)):
            raise ValueError(f"the place is one in {len(self.tokens)} streams, not {len(streams)}")
        # Tokens since the last epoch's end; a stream that was restored may have given some before.
        self._since = [1] * len(streams)

    @property
    def epochs(self) -> float:
        """Passes over the stream that has made the fewest."""
        return min(self.stream_epochs)

    @property
    def single(self) -> bool:
        """Whether there is one stream, so that its epochs' ends are seen."""
        return len(self._streams) == 1

    @property
    def stream_epochs(self) -> list[float]:
        """Passes over each stream."""
        return [stream.epochs for stream in self._streams]

    def next(self) -> dict[str, Any] | None:
        """The next record. DataError when a stream has no text."""
        if self.single:
            return self._next_of(0)
        total = sum(self.tokens)
        behind = [
            share * total - tokens for share, tokens in zip(self._shares, self.tokens, strict=True)
        ]
        chosen = behind.index(max(behind))
        record = self._next_of(chosen)
        while record is None:
            record = self._next_of(chosen)
        return record

    def state(self) -> dict[str, Any]:
        """The place behind the last record, JSON-able."""
        return {
            "streams": [stream.state() for stream in self._streams],
            "tokens": list(self.tokens),
        }

    def _next_of(self, number: int) -> dict[str, Any] | None:
        record = self._streams[number].next()
        if record is None:
            if not self._since[number]:
                raise DataError("no text: an epoch of the training data gave no tokens")
            self._since[number] = 0
            return None
        tokens = len(record["tokens"])
        self._since[number] += tokens
        self.tokens[number] += tokens + (record["part"] == 0)
        return record
