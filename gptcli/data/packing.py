"""Documents packed into rows of block_size tokens without dropping any.

The token sequence is `eot` before each document, pieces of one document that follow each other
without one. It is made into rows in groups of about a million tokens, whose rows are shuffled,
because neighbouring rows of one piece are alike and a step made of them would be a poor sample.

concat: row k has the inputs [kT, kT + T) and the targets one further, so each token is a target
once. best_fit: documents stay together as far as a row holds them, and rows end in padding.
"""

from typing import Any, Literal

import numpy as np

from gptcli.data.groups import Group, Pieces, concatenated, fitted, smallest
from gptcli.data.mixture import Mixture
from gptcli.data.rows import Rows
from gptcli.data.stream import philox
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError

GROUP_TOKENS = 1 << 20


class PackedRows:
    """Rows packed from a mixture of records with tokens; exactly resumable from `state()`.

    With concat and one stream, each epoch's token sequence begins at a random offset below
    block_size; what stands before it comes at the epoch's end, so block borders move from epoch to
    epoch. Several streams have no common epoch, so there they move by themselves. With best_fit a
    document that is longer than a row is cut, and pieces of a document that the shuffle has parted
    are documents of their own. `sources` is how many there are to count in `seen`.

    DataError for a token id outside the vocabulary, with the document's name, and for a tokenizer
    without eot.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        block_size: int,
        seed: int,
        shuffle: bool,
        packing: Literal["concat", "best_fit"],
        document_mask: bool,
        sources: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        if tokenizer.eot is None:
            raise DataError(
                "the tokenizer has no end-of-text token to stand between documents",
                hint="name one as eos_token in the tokenizer_config.json beside the tokenizer.json"
                " of the model that you start from",
            )
        self._mixture, self._block_size, self._sources = mixture, block_size, sources
        self._eot, self._vocab_size = tokenizer.eot, tokenizer.vocab_size
        self._eot_array = smallest(tokenizer.eot)
        self._seed, self._shuffle, self._best_fit = seed, shuffle, packing == "best_fit"
        self._document_mask = document_mask
        self._rest, self._head = Pieces(), Pieces()  # behind the last row; for the epoch's end
        self._last: list[Any] | None = None  # document, part and number of the last piece
        self._epoch, self._epoch_begins = 0, True  # epochs ended, of a single stream
        self._number = 0  # of the next group
        self._group: Group | None = None
        self._order = np.empty(0, dtype=np.int64)  # of its rows
        self._counts = np.zeros((1, sources, 2), dtype=np.int64)  # before each of them, in order
        self._position = 0  # rows of it handed out
        self._group_start: dict[str, Any] = {}
        self._seen = np.zeros((sources, 2), dtype=np.int64)  # tokens and documents of each source
        self._span = (mixture.stream_epochs, mixture.stream_epochs)  # at the group's start and end
        if state is not None:
            self._restore(state)

    @property
    def epochs(self) -> float:
        """Passes over the training data up to the last row, as a fraction by bytes."""
        return min(self._stream_epochs())

    @property
    def seen(self) -> list[dict[str, Any]]:
        """What the rows so far held of each source: targets with loss, documents, epochs."""
        epochs = self._stream_epochs()
        return [
            {"tokens": tokens, "documents": documents, "epochs": epochs[i % len(epochs)]}
            for i, (tokens, documents) in enumerate(self._seen.tolist())
        ]

    def take(self, n: int) -> Rows:
        """The next n rows, block_size wide."""
        shape = (n, self._block_size)
        inputs, targets = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        starts = np.empty(shape, dtype=np.bool_) if self._document_mask else None
        done = count = 0
        while done < n:
            while self._group is None or self._position == len(self._order):
                self._group = self._next_group()
            chosen = self._order[self._position : self._position + n - done]
            part = slice(done, done + len(chosen))
            # Rows are copied as they are: clip, because another mode would buffer them.
            np.take(self._group.inputs, chosen, axis=0, out=inputs[part], mode="clip")
            np.take(self._group.targets, chosen, axis=0, out=targets[part], mode="clip")
            if starts is not None:
                starts[part] = self._group.begins[chosen]
                starts[part, 0] = True
            before = self._counts[self._position]
            self._position += len(chosen)
            given = self._counts[self._position] - before
            self._seen += given
            count += int(given[:, 0].sum()) if self._sources > 1 else int(given[0, 0])
            done += len(chosen)
        return Rows(inputs, targets, starts, count)

    def state(self) -> dict[str, Any]:
        """The place behind the last row, JSON-able; "seen" in it is `seen`."""
        if self._position == len(self._order):
            return {**self._mark(), "row": 0, "seen": self.seen}
        return {**self._group_start, "row": self._position, "seen": self.seen}

    def _stream_epochs(self) -> list[float]:
        """Passes over each stream behind the last row, as its share of the group."""
        start, end = self._span
        if self._position == len(self._order):
            return end
        share = self._position / len(self._order)
        return [a + (b - a) * share for a, b in zip(start, end, strict=True)]

    def _mark(self) -> dict[str, Any]:
        return {
            "mixture": self._mixture.state(),
            "rest": self._rest.state(),
            "head": self._head.state(),
            "last": self._last,
            "epoch": self._epoch,
            "epoch_begins": self._epoch_begins,
            "group": self._number,
        }

    def _next_group(self) -> Group:
        """Read records until the group is full or the epoch ends (it may then have no row yet)."""
        self._group_start = self._mark()
        start = self._mixture.stream_epochs
        pieces, self._rest = self._rest, Pieces()
        full = max(1, GROUP_TOKENS // self._block_size) * self._block_size
        closed = False
        while pieces.size <= full and not closed:
            record = self._mixture.next()
            if record is not None:
                self._add(pieces, record)
                continue
            closed = True
            pieces.extend(self._head)
            self._head, self._last = Pieces(), None
            self._epoch, self._epoch_begins = self._epoch + 1, True
        tokens = pieces.tokens()
        pieces.check(tokens, self._vocab_size)
        if self._best_fit:
            group = fitted(pieces, tokens, self._block_size, self._sources, self._eot, closed)
        else:
            group = concatenated(pieces, tokens, self._block_size, self._sources, self._eot)
        rows = len(group.counts)
        self._rest, self._order, self._position = group.rest, np.arange(rows), 0
        if self._shuffle:
            self._order = philox(self._seed, 1, self._number).permutation(rows)
        self._counts = np.zeros((rows + 1, self._sources, 2), dtype=np.int64)
        np.cumsum(group.counts[self._order], axis=0, out=self._counts[1:])
        self._number += 1
        self._span = (start, self._mixture.stream_epochs)
        return group

    def _add(self, pieces: Pieces, record: dict[str, Any]) -> None:
        """Add the record, `eot` before it where a document begins, the epoch's head cut off."""
        tokens, name, source = record["tokens"], record["document"], record["source"]
        part, number = record["part"], record["number"]
        if not len(tokens):
            return
        loose = not self._best_fit and not record.get("mixed", False)
        goes_on = part > 0 and self._follows(name, part, number, loose)
        self._last = [name, part, number]
        arrays = [tokens]
        if not goes_on and int(tokens[0]) != self._eot:
            arrays = [self._eot_array, tokens]
        mark = Pieces.BEGINS if part == 0 else Pieces.GOES_ON if goes_on else Pieces.PARTED
        if self._epoch_begins:
            self._epoch_begins = False
            if self._shuffle and self._mixture.single and not self._best_fit:
                offset = int(philox(self._seed, 2, self._epoch).integers(self._block_size))
                joined = np.concatenate(arrays)
                self._head.add([joined[:offset]], source, mark, name)
                arrays = [joined[offset:]]
                mark = Pieces.GOES_ON if offset else mark
        pieces.add(arrays, source, mark, name)

    def _follows(self, name: str, part: int, number: int, loose: bool) -> bool:
        """Whether a piece continues the one before it. Where `loose` it is enough that both are of
        one document, since eot stands only between documents. Otherwise (best_fit, which keeps
        runs of text whole; tokenised files, whose name is that of many documents) it must be the
        next piece: by part within a row, which has one number, and by number within a file."""
        if self._last is None or self._last[0] != name:
            return False
        if loose:
            return True
        _, last_part, last_number = self._last
        return bool(part == last_part + 1 if number == last_number else number == last_number + 1)

    def _restore(self, state: dict[str, Any]) -> None:
        self._rest, self._head = Pieces.of(state["rest"]), Pieces.of(state["head"])
        self._last = state["last"]
        self._epoch, self._epoch_begins = state["epoch"], state["epoch_begins"]
        self._number = state["group"]
        self._check(state)
        if state["row"]:
            self._group = self._next_group()
            # Changed data, where that is allowed, may have given fewer rows.
            self._position = min(state["row"], len(self._order))
        self._seen[:] = [[source["tokens"], source["documents"]] for source in state["seen"]]

    def _check(self, state: dict[str, Any]) -> None:
        """ValueError for what is outside the vocabulary or of no source."""
        if len(state["seen"]) != self._sources:
            raise ValueError(f"seen of {len(state['seen'])} sources, not {self._sources}")
        for name in ("rest", "head"):
            if max(state[name]["tokens"], default=0) >= self._vocab_size:
                raise ValueError(f"{name} has a token outside the vocabulary")
            if any(source >= self._sources for _, source, _ in state[name]["runs"]):
                raise ValueError(f"{name} has a run of no source")
