"""Rows of a finetuning task's examples: packed, several in a row, or one a row."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np

from gptcli.data.best_fit import best_fit
from gptcli.data.examples import Example, HeadExample, PreferencePair, RowCounts
from gptcli.data.mixture import Mixture
from gptcli.data.rows import Array, Rows
from gptcli.data.stream import RecordStream, philox
from gptcli.errors import DataError
from gptcli.model.loss import IGNORED

GROUP_ROWS = 128  # rows that are packed together: more are fuller, and a resume reads them again

Encoded: TypeAlias = Example | HeadExample | PreferencePair


class Encoder(Protocol):
    """What makes an example of a row: `TaskEncoder`, and `ShotEncoder` for rows to score."""

    @property
    def counts(self) -> RowCounts:
        """What became of the rows so far."""

    def encode(self, row: dict[str, Any], where: str) -> Encoded | None:
        """One row; None when it is left out."""


class ExampleStream:
    """A stream of row records as one of examples, those that fit: records of a `Mixture`.

    One that is longer than `block_size` comes in parts. `state` is what `state()` gave, from which
    `stream` was restored.
    """

    def __init__(
        self,
        stream: RecordStream,
        encoder: Encoder,
        block_size: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._stream, self._encoder, self._block_size = stream, encoder, block_size
        self._found = True  # an example since the last epoch's end; before a resume, maybe
        self._row_start: dict[str, Any] = {}
        self._parts: list[Encoded] = []  # of the last row
        self._given = 0  # of these
        if part := (state or {}).get("part", 0):
            self.next()
            self._given = min(part, len(self._parts))  # changed data may have given fewer

    @property
    def epochs(self) -> float:
        """Passes over the rows so far, as a fraction by bytes."""
        return self._stream.epochs

    def next(self) -> dict[str, Any] | None:
        """The next "example", all its "tokens" and which "part" of its row it is, or None once at
        the end of each epoch. DataError when an epoch has no row that fits."""
        while self._given == len(self._parts):
            self._row_start = self._stream.state()
            record = self._stream.next()
            if record is None:
                if not self._found:
                    raise DataError("no row fits: every one is empty or longer than block_size")
                self._found = False
                return None
            example = self._encoder.encode(record["row"], record["document"])
            self._parts = [] if example is None else parts_of(example, self._block_size)
            self._given = 0
        self._found = True
        part, self._given = self._given, self._given + 1
        example = self._parts[part]
        return {"example": example, "tokens": _tokens(example), "part": part}

    def state(self) -> dict[str, Any]:
        """The place behind the last part, JSON-able: before its row, and how many were given."""
        if self._given < len(self._parts):
            return {**self._row_start, "part": self._given}
        return self._stream.state()


def parts_of(example: Encoded, block_size: int) -> list[Encoded]:
    """Examples of at most `block_size` inputs, which together train each token once: a text that is
    longer goes on in the next one, which begins with its last token."""
    if not isinstance(example, Example) or len(example.tokens) <= block_size + 1:
        return [example]
    parts = [slice(i, i + block_size + 1) for i in range(0, len(example.tokens) - 1, block_size)]
    return [replace(example, tokens=example.tokens[p], trained=example.trained[p]) for p in parts]


class ExampleRows:
    """One row an example, of any kind, from a mixture of `ExampleStream`s; the short ones padded.

    Exactly resumable: the streams are restored from `state()["mixture"]`.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    @property
    def epochs(self) -> float:
        """Passes over the training rows so far, as a fraction by bytes."""
        return self._mixture.epochs

    @property
    def seen(self) -> list[dict[str, Any]]:
        """Nothing: examples are not counted by source."""
        return []

    def take(self, n: int) -> Rows:
        """The next n examples. DataError when an epoch has none that fit."""
        return collate_examples([self._next() for _ in range(n)])

    def state(self) -> dict[str, Any]:
        """The place behind the last row, JSON-able."""
        return {"mixture": self._mixture.state()}

    def _next(self) -> Encoded:
        record = None
        while record is None:  # None once at an epoch's end
            record = self._mixture.next()
        example: Encoded = record["example"]
        return example


class PackedExamples:
    """Examples packed whole into rows of `block_size`, `starts` telling where each begins.

    Rows are filled by best fit (see `best_fit.py`) in groups of about 128 of them, which end with
    an epoch at the latest; so each epoch has each example once. With `shuffle` a group's rows come
    in an order that depends on `seed`. `state` is what `state()` gave.
    """

    def __init__(
        self,
        mixture: Mixture,
        block_size: int,
        seed: int,
        shuffle: bool,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._mixture, self._block_size = mixture, block_size
        self._seed, self._shuffle = seed, shuffle
        self._number = state["group"] if state else 0  # of the next group
        self._rows: list[list[Example]] = []  # of the current group, in their order
        self._position = 0  # rows of it handed out
        self._group_start: dict[str, Any] = {}
        self._span = (mixture.epochs, mixture.epochs)  # at the group's start and end
        if state and state["row"]:
            self._read_group()
            # Changed data, where that is allowed, may have given fewer rows.
            self._position = min(state["row"], len(self._rows))

    @property
    def epochs(self) -> float:
        """Passes over the training rows so far, as a fraction by bytes."""
        start, end = self._span
        share = self._position / len(self._rows) if self._rows else 1.0
        return end if share == 1.0 else start + (end - start) * share

    @property
    def seen(self) -> list[dict[str, Any]]:
        """Nothing: examples are not counted by source."""
        return []

    def take(self, n: int) -> Rows:
        """The next n rows, as wide as the longest. DataError when no example fits."""
        taken: list[list[Example]] = []
        while len(taken) < n:
            if self._position == len(self._rows):
                self._read_group()
            chosen = self._rows[self._position : self._position + n - len(taken)]
            self._position += len(chosen)
            taken += chosen
        return collate_packed(taken)

    def state(self) -> dict[str, Any]:
        """The place behind the last row, JSON-able."""
        if self._position == len(self._rows):
            return {**self._mark(), "row": 0}
        return {**self._group_start, "row": self._position}

    def _mark(self) -> dict[str, Any]:
        return {"mixture": self._mixture.state(), "group": self._number}

    def _read_group(self) -> None:
        self._group_start, start = self._mark(), self._mixture.epochs
        examples: list[Example] = []
        size = 0
        while size < GROUP_ROWS * self._block_size:
            record = self._mixture.next()
            if record is not None:
                examples.append(record["example"])
                size += len(record["tokens"]) - 1
            elif examples:
                break
        lengths = np.array([len(example.tokens) - 1 for example in examples], dtype=np.int64)
        placement = best_fit(lengths, self._block_size)
        rows: list[list[Example]] = [[] for _ in range(placement.rows)]
        for place in np.argsort(placement.offset, kind="stable").tolist():
            rows[placement.row[place]].append(examples[place])
        order = np.arange(len(rows))
        if self._shuffle:
            order = philox(self._seed, 1, self._number).permutation(len(rows))
        self._rows, self._position = [rows[i] for i in order], 0
        self._number += 1
        self._span = (start, self._mixture.epochs)


def collate_packed(rows: Sequence[Sequence[Example]]) -> Rows:
    """Rows of examples that follow each other; padding behind them is a segment of its own."""
    lengths = [[len(example.tokens) - 1 for example in row] for row in rows]
    shape = (len(rows), max(map(sum, lengths)))
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    starts = np.zeros(shape, np.bool_)
    for i, row in enumerate(rows):
        place = 0
        for example, length in zip(row, lengths[i], strict=True):
            part = slice(place, place + length)
            inputs[i, part], targets[i, part] = _shifted(example.tokens, example.trained)
            starts[i, place] = True
            place += length
        if place < shape[1]:
            starts[i, place] = True
    return Rows(inputs, targets, starts, sum(map(sum, lengths)))


def collate_examples(examples: Sequence[Encoded]) -> Rows:
    """One row an example, all of one kind, padded behind their ends, where causal attention needs
    no mask.

    Of head examples and pairs, inputs and targets are (n, S, T). `labels` are the heads' labels or
    the pairs' keys; `ends` are of head examples only, -1 where an example has fewer sequences.
    """
    first = examples[0]
    if isinstance(first, Example):
        texts = [[_shifted(e.tokens, e.trained)] for e in examples if isinstance(e, Example)]
        inputs, targets, count = _padded(texts)
        return Rows(inputs[:, 0], targets[:, 0], None, count)
    if isinstance(first, PreferencePair):
        pairs = [pair for pair in examples if isinstance(pair, PreferencePair)]
        sides = [[pair.chosen, pair.rejected] for pair in pairs]
        inputs, targets, count = _padded(
            [[_shifted(e.tokens, e.trained) for e in side] for side in sides]
        )
        keys = np.array([pair.key for pair in pairs], dtype=np.int64)
        return Rows(inputs, targets, None, count, labels=keys)
    heads = [example for example in examples if isinstance(example, HeadExample)]
    inputs, targets, count = _padded([[_whole(s) for s in e.sequences] for e in heads])
    ends = np.full(inputs.shape[:2], -1, dtype=np.int64)
    for i, example in enumerate(heads):
        ends[i, : len(example.sequences)] = [len(s) - 1 for s in example.sequences]
    labels = np.array([example.label for example in heads], dtype=np.int64)
    return Rows(inputs, targets, None, count, ends, labels)


def _shifted(tokens: list[int], trained: list[bool]) -> tuple[Array, Array]:
    """Inputs, and the targets one further, of which only those that are trained."""
    ids = np.array(tokens, dtype=np.int64)
    return ids[:-1], np.where(trained[1:], ids[1:], IGNORED)


def _whole(tokens: list[int]) -> tuple[Array, Array]:
    """All tokens as inputs, the last of which, read by a head, has no target."""
    ids = np.array(tokens, dtype=np.int64)
    return ids, np.append(ids[1:], IGNORED)


def _padded(rows: list[list[tuple[Array, Array]]]) -> tuple[Array, Array, int]:
    """Inputs and targets (n, S, T) of rows of texts, and how many tokens they have."""
    width = max(len(inputs) for row in rows for inputs, _ in row)
    shape = (len(rows), max(map(len, rows)), width)
    all_inputs, all_targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for i, row in enumerate(rows):
        for k, (inputs, targets) in enumerate(row):
            all_inputs[i, k, : len(inputs)] = inputs
            all_targets[i, k, : len(targets)] = targets
    return all_inputs, all_targets, sum(len(inputs) for row in rows for inputs, _ in row)


def _tokens(example: Encoded) -> list[int]:
    if isinstance(example, Example):
        return example.tokens
    if isinstance(example, PreferencePair):
        return example.chosen.tokens + example.rejected.tokens
    return [token for sequence in example.sequences for token in sequence]
