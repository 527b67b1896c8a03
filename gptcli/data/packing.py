"""Documents packed into rows of block_size + 1 tokens without dropping any.

The token sequence is `eot` before each document, pieces of one document following each other
without one. Row k covers tokens [kT, kT + T], so each token is a target once. Rows are shuffled
in groups of about a million tokens, because neighbouring rows of one piece are alike and a step
made of them would be a poor sample.
"""

from typing import Any

import numpy as np

from gptcli.data.rows import Row, Tokens
from gptcli.data.stream import RecordStream, permutation
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError

GROUP_TOKENS = 1 << 20


class PackedRows:
    """Rows packed from a stream of text records; exactly resumable from `state()`.

    Each epoch's token sequence begins at a random offset below block_size; what stands before it
    comes at the epoch's end, so block borders move from epoch to epoch.
    """

    def __init__(
        self,
        stream: RecordStream,
        tokenizer: Tokenizer,
        block_size: int,
        seed: int,
        shuffle: bool,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._stream, self._tokenizer = stream, tokenizer
        self._block_size, self._seed, self._shuffle = block_size, seed, shuffle
        self._group_rows = max(1, GROUP_TOKENS // block_size)
        self._group: list[Tokens] = []  # rows of block_size + 1 tokens, shuffled
        self._position = 0  # rows of the group handed out
        self._group_start: dict[str, Any] = {}
        self._rest = np.empty(0, dtype=np.uint32)  # tokens behind the last whole row
        self._head = np.empty(0, dtype=np.uint32)  # tokens kept for the end of the epoch
        self._document: str | None = None
        self._epoch_begins = True
        self._number = 0
        self._span = (0, 0.0, 0.0)  # epoch, and bytes of it at the start and end of the group
        if state is not None:
            self._restore(state)

    def next(self) -> Row:
        """The next row."""
        while self._position == len(self._group):
            self._fill_group()
        tokens = self._group[self._position]
        self._position += 1
        return Row(tokens, None)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the last row came from."""
        return self._span[0]

    @property
    def epoch_bytes(self) -> float:
        """Bytes of the current epoch behind the last row, as a share of its group's bytes."""
        _, start, end = self._span
        return start + (end - start) * self._position / max(len(self._group), 1)

    def state(self) -> dict[str, Any]:
        """The place behind the last row, JSON-able."""
        if self._position == len(self._group):
            return {**self._mark(), "row": 0}
        return {**self._group_start, "row": self._position}

    def _mark(self) -> dict[str, Any]:
        return {
            "stream": self._stream.state(),
            "rest": self._rest.tolist(),
            "head": self._head.tolist(),
            "document": self._document,
            "epoch_begins": self._epoch_begins,
            "group": self._number,
        }

    def _fill_group(self) -> None:
        """Read records until the group is full or the epoch ends (it may then have no row yet)."""
        self._group_start = self._mark()
        start, epoch = self._stream.epoch_bytes, self._stream.epoch
        parts, count = [self._rest], len(self._rest)
        end = float(start)
        while count <= self._group_rows * self._block_size:
            record = self._stream.next()
            if record is None:
                parts.append(self._head)
                self._head = np.empty(0, dtype=np.uint32)
                self._document, self._epoch_begins = None, True
                break
            end = float(self._stream.epoch_bytes)
            tokens = self._tokens(record)
            parts.append(tokens)
            count += len(tokens)
        tokens = np.concatenate(parts)
        rows = max(0, (len(tokens) - 1) // self._block_size)
        cut = [tokens[i * self._block_size :][: self._block_size + 1] for i in range(rows)]
        self._rest = tokens[rows * self._block_size :].copy()
        if self._shuffle:
            order = permutation(rows, self._seed, 1, self._number)
            cut = [cut[i] for i in order]
        self._group, self._position = cut, 0
        self._number += 1
        self._span = (epoch, float(start), end)

    def _tokens(self, record: dict[str, Any]) -> Tokens:
        """The record's tokens, `eot` before a document's first piece, the epoch's head cut off."""
        tokens = self._tokenizer.encode_numpy(record["text"])
        if len(tokens) and int(tokens.max()) >= self._tokenizer.vocab_size:
            raise DataError(f"{record['document']}: a token id is outside the vocabulary")
        if record["part"] == 0 or record["document"] != self._document:
            tokens = np.concatenate([np.array([self._tokenizer.eot], dtype=np.uint32), tokens])
        self._document = record["document"]
        if self._epoch_begins:
            key = np.random.SeedSequence((self._seed, 2, self._stream.epoch))
            generator = np.random.Generator(np.random.Philox(key))
            offset = int(generator.integers(self._block_size)) if self._shuffle else 0
            self._head, tokens = tokens[:offset].copy(), tokens[offset:]
            self._epoch_begins = False
        return tokens

    def _restore(self, state: dict[str, Any]) -> None:
        self._rest = np.array(state["rest"], dtype=np.uint32)
        self._head = np.array(state["head"], dtype=np.uint32)
        self._document, self._epoch_begins = state["document"], state["epoch_begins"]
        self._number = state["group"]
        if state["row"]:
            self._fill_group()
            self._position = state["row"]
