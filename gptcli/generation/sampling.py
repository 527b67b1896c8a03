"""Choosing tokens: what a text asks for (`Sampling`), and the texts of a batch (`Sampler`).

The mathematics is in filters.py (which tokens stay) and draw.py (which of them is taken).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError
from gptcli.generation import filters
from gptcli.generation.bad_words import BadWords, Vocabulary
from gptcli.generation.constraint import Constraint
from gptcli.generation.draw import invert_cdf, stream, uniforms
from gptcli.generation.grammar import Matcher, vocabulary_of

_MOST_BATCHES = 256  # whose settings are kept ready: a few KB each


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults sample from the model's own distribution.

    `temperature` 0 takes the likeliest token. `repetition_penalty` divides the logits of tokens
    that prompt or continuation have; `presence_penalty` (once) and `frequency_penalty` (each time)
    are taken off the logits of those that the continuation has. A continuation has none of the
    `bad_words` in it, and fulfils the `constraint` unless it is cut. `logprobs` is the number of
    alternatives reported for each token, with the model's own probabilities. Generation ends at eot
    or another of the tokenizer's `ends`, at the first of the `stop` texts, where a constraint lets
    nothing follow, or after `max_new_tokens`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    seed: int = 0
    max_new_tokens: int = 200
    logprobs: int = 0

    @property
    def counts(self) -> bool:
        """Whether it matters how often a text has a token."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


DIVERGED = "its weights are damaged or its training diverged; take an earlier checkpoint"


def check_finite(logits: Tensor) -> None:
    """Raise CheckpointError if any of the logits is nan or infinite."""
    # One pass over them; the sum of finite ones may overflow, which the exact test then tells.
    if not bool(logits.sum().isfinite()) and not bool(logits.isfinite().all()):
        raise CheckpointError("the checkpoint produces non-finite logits", hint=DIVERGED)


class Sampler:
    """The next tokens of texts that share a batch, each with settings of its own.

    A text has a slot from its `begin` to the next `begin` there. What it gets depends on its
    settings, prompt, logits and tokens so far, never on the batch.
    """

    def __init__(
        self, slots: int, tokenizer: Tokenizer, vocab_size: int, device: torch.device
    ) -> None:
        """Room for `slots` texts; `vocab_size` is without padding, `device` that of the logits."""
        self._tokenizer, self._vocab_size, self._device = tokenizer, vocab_size, device
        self._settings = [Sampling()] * slots
        self._streams = np.zeros(slots, dtype=np.uint64)
        self._seen: Tensor | None = None  # (slots, V) bool: the prompt or the text has the token
        self._counts: Tensor | None = None  # (slots, V) fp32: how often the text has it
        self._vocabulary: Vocabulary | None = None
        self._bad_words: dict[int, BadWords] = {}  # by slot
        self._pending = [b""] * slots  # see BadWords
        self._matchers: dict[int, Matcher] = {}  # by slot
        self._rows: dict[bytes, _Rows] = {}  # by the slots of a batch, since the last `begin`

    def begin(
        self, slot: int, sampling: Sampling, prompt_tokens: Sequence[int], sample: int
    ) -> Matcher | None:
        """A new text has the slot: number `sample` of the continuations of `prompt_tokens`.

        Returns how it stands with its constraint, if it has one, after each token that is chosen.
        ValueError for an empty bad word.
        """
        self._settings[slot] = sampling
        self._streams[slot] = stream(sampling.seed, prompt_tokens, sample)
        self._rows.clear()
        shape = (len(self._settings), self._vocab_size)
        if sampling.repetition_penalty != 1.0:
            if self._seen is None:
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            known = [token for token in prompt_tokens if token < self._vocab_size]
            self._seen[slot] = False
            self._seen[slot, torch.tensor(known, dtype=torch.int64, device=self._device)] = True
        if sampling.counts:
            if self._counts is None:
                self._counts = torch.zeros(shape, device=self._device)
            self._counts[slot] = 0.0
        self._pending[slot] = b""
        if sampling.bad_words:
            self._bad_words[slot] = self._shared_bad_words(sampling.bad_words)
        self._matchers.pop(slot, None)
        if sampling.constraint is not None:
            vocabulary = vocabulary_of(self._tokenizer, self._vocab_size)
            self._matchers[slot] = vocabulary.matcher(sampling.constraint)
        return self._matchers.get(slot)

    def choose(
        self, logits: Tensor, slots: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> Tensor:
        """Token ids (R,) int64; row r of `logits` (R, V) fp32 is for the text in `slots[r]`.

        The id becomes token number `positions[r]` of that text (0 is the first after the prompt)
        and counts from now on for its penalties, bad words and constraint. -1 (ids are on the CPU)
        stands where these leave no token: there the text is over.
        """
        rows = self._rows_in(slots)
        logits, dead = self._without_banned(self._penalised(logits, rows), rows)
        ids = torch.from_numpy(_pick(logits, rows, uniforms(self._streams[slots], positions)))
        if dead:
            ids[dead] = -1
        self._note(ids, rows)
        return ids

    def _rows_in(self, slots: NDArray[np.int64]) -> "_Rows":
        """What those texts ask for. Batches come back while guesses are checked."""
        key = slots.tobytes()
        if key not in self._rows:
            if len(self._rows) == _MOST_BATCHES:
                self._rows.clear()
            settings = [self._settings[slot] for slot in slots]
            self._rows[key] = _rows_of(slots.copy(), settings, self._vocab_size, self._device)
        return self._rows[key]

    def _shared_bad_words(self, words: tuple[str, ...]) -> BadWords:
        """Those of another text if it has the same: they know the tokens of the vocabulary."""
        for known in self._bad_words.values():
            if known.words == words:
                return known
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._tokenizer, self._vocab_size)
        return BadWords(words, self._vocabulary, self._tokenizer)

    def _penalised(self, logits: Tensor, rows: "_Rows") -> Tensor:
        if self._seen is not None and len(rows.repeating):
            some, ids = self._seen[rows.where[rows.repeating]].nonzero(as_tuple=True)
            at = (rows.repeating[some], ids)
            values = filters.penalise_repetition(logits[at], rows.repetition[some])
            logits = logits.index_put(at, values)
        if self._counts is not None and len(rows.counting):
            counts = self._counts[rows.where[rows.counting]]
            some, ids = counts.nonzero(as_tuple=True)
            at = (rows.counting[some], ids)
            presence, frequency = rows.presence[some], rows.frequency[some]
            values = filters.penalise_counts(logits[at], counts[some, ids], presence, frequency)
            logits = logits.index_put(at, values)
        return logits

    def _without_banned(self, logits: Tensor, rows: "_Rows") -> tuple[Tensor, list[int]]:
        """Logits, -inf for what would complete a bad word and for what a constraint does not allow;
        the rows in which nothing is left."""
        dead: list[int] = []
        if not rows.banning and not rows.constrained:
            return logits, dead
        logits = logits.clone()
        for row in rows.constrained:
            banned = torch.from_numpy(self._matchers[int(rows.slots[row])].banned)
            logits[row].masked_fill_(banned.to(self._device), -math.inf)
        for row in rows.banning:
            slot = int(rows.slots[row])
            ids = self._bad_words[slot].banned(self._pending[slot])
            logits[row, ids.to(self._device)] = -math.inf
        for row in {*rows.constrained, *rows.banning}:
            if float(logits[row].amax()) == -math.inf:
                logits[row] = 0.0  # anything that can be drawn from
                dead.append(row)
        return logits, dead

    def _note(self, ids: Tensor, rows: "_Rows") -> None:
        """The texts go on with `ids` (R,)."""
        if self._seen is not None and len(rows.repeating):
            some = ids.to(self._device)[rows.repeating]
            self._seen[rows.where[rows.repeating], some] = True
        if self._counts is not None and len(rows.counting):
            some = ids.to(self._device)[rows.counting]
            self._counts[rows.where[rows.counting], some] += 1.0
        for row in rows.banning:
            slot = int(rows.slots[row])
            words = self._bad_words[slot]
            self._pending[slot] = words.advance(self._pending[slot], int(ids[row]))
        for row in rows.constrained:
            self._matchers[int(rows.slots[row])].advance(int(ids[row]))


@dataclass(frozen=True)
class _Rows:
    """What the R rows of a batch ask for, in a form that serves as long as the rows stay."""

    slots: NDArray[np.int64]  # (R,)
    where: Tensor  # (R,) the slots on the device
    repeating: Tensor  # (P,) rows with a repetition penalty
    repetition: Tensor  # (P,)
    counting: Tensor  # (Q,) rows with a presence or frequency penalty
    presence: Tensor  # (Q,)
    frequency: Tensor  # (Q,)
    banning: list[int]  # rows with bad words
    constrained: list[int]  # rows with a constraint
    drawn: Tensor  # (D,) rows that are not greedy
    temperature: Tensor  # (D, 1)
    top_k: NDArray[np.int64]  # (D,) V for all
    top_p: NDArray[np.float64]  # (D,) infinity for all
    lowest: NDArray[np.float32]  # (D,) log of min_p
    limits: bool  # some row has top-k or top-p
    filtered: bool  # or min-p
    scaled: bool  # or another temperature than 1


def _rows_of(
    slots: NDArray[np.int64], settings: list[Sampling], vocab_size: int, device: torch.device
) -> _Rows:
    """`settings` of the texts in `slots` (R,)."""

    def rows(chosen: list[bool]) -> Tensor:
        return torch.from_numpy(np.flatnonzero(chosen)).to(device)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    repeating = [s for s in settings if s.repetition_penalty != 1.0]
    counting = [s for s in settings if s.counts]
    drawn = [s for s in settings if s.temperature > 0.0]
    limits = any(s.top_k is not None or s.top_p < 1.0 for s in drawn)
    filtered = limits or any(s.min_p > 0.0 for s in drawn)
    top_k = [vocab_size if s.top_k is None else min(s.top_k, vocab_size) for s in drawn]
    top_p = [s.top_p if s.top_p < 1.0 else math.inf for s in drawn]
    lowest = [math.log(s.min_p) if s.min_p > 0.0 else -math.inf for s in drawn]
    return _Rows(
        slots=slots,
        where=torch.from_numpy(slots).to(device),
        repeating=rows([s.repetition_penalty != 1.0 for s in settings]),
        repetition=column([s.repetition_penalty for s in repeating]),
        counting=rows([s.counts for s in settings]),
        presence=column([s.presence_penalty for s in counting]),
        frequency=column([s.frequency_penalty for s in counting]),
        banning=[i for i, s in enumerate(settings) if s.bad_words],
        constrained=[i for i, s in enumerate(settings) if s.constraint is not None],
        drawn=rows([s.temperature > 0.0 for s in settings]),
        temperature=column([s.temperature for s in drawn])[:, None],
        top_k=np.array(top_k, dtype=np.int64),
        top_p=np.array(top_p, dtype=np.float64),
        lowest=np.array(lowest, dtype=np.float32),
        limits=limits,
        filtered=filtered,
        scaled=filtered or any(s.temperature != 1.0 for s in drawn),
    )


def _pick(logits: Tensor, rows: _Rows, numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """Token ids (R,) for logits (R, V); `numbers` (R,) are the rows' uniforms."""
    drawn = len(rows.drawn)
    if drawn == len(logits):
        return _draw(logits, rows, numbers)
    ids = filters.argmax(logits)
    if drawn:
        where = rows.drawn.cpu().numpy()
        ids[where] = _draw(logits[rows.drawn], rows, numbers[where])
    return ids


def _draw(logits: Tensor, rows: _Rows, numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """Token ids (D,) for logits (D, V): temperature, top-k, top-p, min-p as transformers orders."""
    if not rows.scaled:
        return invert_cdf(logits.softmax(dim=-1), numbers)
    scaled = filters.scale(logits, rows.temperature)
    weights = scaled.softmax(dim=-1)
    if rows.filtered:
        smallest = rows.lowest
        if rows.limits:
            best = weights.amax(dim=-1).cpu().numpy()
            kept = filters.smallest_kept(scaled, best, rows.top_k, rows.top_p)
            smallest = np.maximum(smallest, kept)
        # In place and in fp32: to fill by a mask takes torch four times as long.
        weights *= scaled.ge_(torch.from_numpy(smallest).to(scaled.device)[:, None])
    return invert_cdf(weights, numbers)
