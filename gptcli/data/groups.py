"""Groups of rows: a piece of the token sequence made into rows of block_size, all at once."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gptcli.data.best_fit import Chunks, Ints, Placement, best_fit, cut_documents
from gptcli.data.rows import Array
from gptcli.errors import DataError
from gptcli.model.loss import IGNORED


class Pieces:
    """A part of the token sequence, put together from runs of one source and document each.

    A run's mark is BEGINS where a document begins with it, GOES_ON where it continues one, PARTED
    where an eot stands before it although its document began earlier.
    """

    GOES_ON, BEGINS, PARTED = range(3)

    def __init__(self) -> None:
        self.size = 0
        self._arrays: list[Array] = []
        self._lengths: list[int] = []
        self._sources: list[int] = []
        self._marks: list[int] = []
        self._names: list[str] = []

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Pieces":
        """What `state()` gave."""
        pieces = cls()
        tokens = np.array(state["tokens"], dtype=np.uint32)
        for length, source, mark in state["runs"]:
            pieces.add([tokens[pieces.size : pieces.size + length]], source, mark, "")
        return pieces

    def state(self) -> dict[str, Any]:
        """Tokens and runs [length, source, mark], JSON-able. Names are left out."""
        runs = zip(self._lengths, self._sources, self._marks, strict=True)
        return {"tokens": self.tokens().tolist(), "runs": [list(run) for run in runs]}

    def add(self, arrays: list[Array], source: int, mark: int, name: str) -> None:
        """Add one run, given in arrays that follow each other; nothing if they are empty."""
        length = sum(map(len, arrays))
        if not length:
            return
        self._arrays += arrays
        self._lengths.append(length)
        self._sources.append(source)
        self._marks.append(mark)
        self._names.append(name)
        self.size += length

    def extend(self, other: "Pieces") -> None:
        """Add the runs of `other`."""
        self._arrays += other._arrays
        self._lengths += other._lengths
        self._sources += other._sources
        self._marks += other._marks
        self._names += other._names
        self.size += other.size

    def tokens(self) -> Array:
        """The sequence (N,), uint16 or uint32."""
        return np.concatenate(self._arrays) if self._arrays else np.empty(0, dtype=np.uint16)

    def cut(self, tokens: Array, place: int) -> "Pieces":
        """The runs from `place` on; `tokens` is what `tokens()` gave."""
        rest, end = Pieces(), self.size
        kept = []
        for i in range(len(self._lengths) - 1, -1, -1):
            if end <= place:
                break
            begin = end - self._lengths[i]
            kept.append((max(begin, place), end, i))
            end = begin
        for begin, end, i in reversed(kept):
            whole = end - begin == self._lengths[i]
            mark = self._marks[i] if whole else self.GOES_ON
            rest.add([tokens[begin:end].copy()], self._sources[i], mark, self._names[i])
        return rest

    def ends(self) -> Ints:
        """The place behind each run (runs,)."""
        return np.cumsum(np.array(self._lengths, dtype=np.int64))

    def sources(self) -> Ints:
        """The source of each run (runs,)."""
        return np.array(self._sources, dtype=np.int64)

    def source_at(self, places: Ints) -> Ints:
        """The source of the token at each place."""
        sources = np.array(self._sources, dtype=np.int64)
        return sources[np.searchsorted(self.ends(), places, side="right")]

    def documents(self, eots: Array) -> Ints:
        """The places where documents begin: `eots` (N,) bool, but not those of parted pieces."""
        marks, ends = np.array(self._marks, dtype=np.int64), self.ends()
        begins = ends - np.array(self._lengths, dtype=np.int64)
        begin = eots.copy()
        begin[begins[marks == self.BEGINS]] = True
        begin[begins[marks == self.PARTED]] = False
        return np.flatnonzero(begin)

    def check(self, tokens: Array, vocab_size: int) -> None:
        """DataError for a token id outside the vocabulary, with its document's name."""
        if len(tokens) and int(tokens.max()) >= vocab_size:
            place = int(np.argmax(tokens >= vocab_size))
            name = self._names[int(np.searchsorted(self.ends(), place, side="right"))]
            raise DataError(
                f"{name}: token id {int(tokens[place])} is outside the vocabulary of {vocab_size}",
                hint="the tokens were made with another tokenizer",
            )


@dataclass(frozen=True)
class Group:
    """Rows: `inputs` and `targets` (n, T) int64, targets IGNORED in padding; `begins`
    (n, T) bool, where documents (concat) or chunks (best fit) begin; `counts` (n, sources, 2) are
    the targets and documents of each source. `rest` is left for the next group."""

    inputs: Array
    targets: Array
    begins: Array
    counts: Ints
    rest: Pieces


def concatenated(pieces: Pieces, tokens: Array, block_size: int, sources: int, eot: int) -> Group:
    """Row k has inputs tokens[kT : kT + T] and targets one further."""
    rows = max(0, (len(tokens) - 1) // block_size)
    used = rows * block_size
    flags = tokens == eot
    ends = pieces.ends()
    counts = np.empty((rows, sources, 2), dtype=np.int64)
    borders = np.arange(rows + 1) * block_size + 1
    for source in range(sources):
        lengths = np.where(pieces.sources() == source, np.diff(ends, prepend=0), 0)
        # Targets of the source before each place grow linearly within a run.
        before = np.interp(borders, np.append(0, ends), np.append(0, np.cumsum(lengths)))
        counts[:, source, 0] = np.diff(np.rint(before).astype(np.int64))
    documents = pieces.documents(flags)
    documents = documents[documents < used]
    cell = documents // block_size * sources + pieces.source_at(documents)
    counts[:, :, 1] = np.bincount(cell, minlength=rows * sources).reshape(rows, sources)
    wide = tokens[: used + 1].astype(np.int64)  # once for all rows, which then are only copied
    return Group(
        wide[:used].reshape(rows, block_size),
        wide[1:].reshape(rows, block_size),
        flags[:used].reshape(rows, block_size),
        counts,
        pieces.cut(tokens, used),
    )


def fitted(
    pieces: Pieces, tokens: Array, block_size: int, sources: int, eot: int, closed: bool
) -> Group:
    """Documents, cut where they are longer than a row, packed by `best_fit`. `closed`: nothing
    comes behind the last document."""
    documents = pieces.documents(tokens == eot)
    if closed and len(tokens):
        tokens = np.append(tokens, smallest(eot))
    chunks = cut_documents(tokens, eot, block_size, closed)
    placement = best_fit(chunks.lengths, block_size)
    inputs, targets, begins = _cells(tokens, chunks, placement, block_size)
    counts = np.empty((placement.rows, sources, 2), dtype=np.int64)
    cell = placement.row * sources + pieces.source_at(chunks.starts)
    first = np.isin(chunks.starts, documents)
    for kind, weights in enumerate((chunks.lengths, first)):
        total = np.bincount(cell, weights, minlength=placement.rows * sources)
        counts[:, :, kind] = np.rint(total).reshape(-1, sources)
    return Group(
        inputs, targets, begins, counts, Pieces() if closed else pieces.cut(tokens, chunks.rest)
    )


def _cells(
    tokens: Array, chunks: Chunks, placement: Placement, block_size: int
) -> tuple[Array, Array, Array]:
    """Inputs, targets and beginnings (rows, T) of the placed chunks."""
    size = placement.rows * block_size
    inputs, targets = np.zeros(size, dtype=np.int64), np.full(size, IGNORED, dtype=np.int64)
    begins = np.zeros(size, dtype=np.bool_)
    shape = (placement.rows, block_size)
    place = placement.row * block_size + placement.offset
    begins[place] = True
    full = chunks.lengths == block_size
    if full.any():  # whole rows at once: most of a long text
        windows = np.lib.stride_tricks.sliding_window_view(tokens, block_size)
        rows, starts = placement.row[full], chunks.starts[full]
        inputs.reshape(shape)[rows] = windows[starts]
        targets.reshape(shape)[rows] = windows[starts + 1]
    lengths = chunks.lengths[~full]
    within = _ranges(lengths)
    there = np.repeat(place[~full], lengths) + within
    here = np.repeat(chunks.starts[~full], lengths) + within
    inputs[there], targets[there] = tokens[here], tokens[here + 1]
    return inputs.reshape(shape), targets.reshape(shape), begins.reshape(shape)


def smallest(token: int) -> Array:
    """One token as an array that leaves uint16 tokens as they are if it can."""
    return np.array([token], dtype=np.uint16 if token < 1 << 16 else np.uint32)


def _ranges(lengths: Ints) -> Ints:
    """0, 1, ..., lengths[0] - 1, 0, 1, ..., lengths[1] - 1, ..."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
