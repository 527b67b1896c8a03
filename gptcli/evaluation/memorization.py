"""How much of its training text a model can say by heart.

Verbatim continuation: given the first tokens of a passage, does the model, greedily, write the next
ones exactly as they stand (Carlini et al. 2023, "Quantifying Memorization Across Neural Language
Models")? The same on held-out text tells what of it is mere predictability. And the other way
round: the longest run of bytes that texts share with the training text.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gptcli import stop
from gptcli.device import Device
from gptcli.evaluation.likelihoods import batches
from gptcli.evaluation.statistics import share_interval
from gptcli.evaluation.token_scores import score_tokens
from gptcli.model.gpt import GPT

CONTINUATION = 32  # tokens that must be equal
PREFIXES = (8, 16, 32, 64)  # tokens given
_GRAM = 16  # bytes looked up at once
_POLL_BYTES = 256 * _GRAM  # between looks at whether to stop
LEAST_RUN = 2 * _GRAM - 1  # bytes; every run that long holds a gram at a multiple of its length


@dataclass(frozen=True)
class VerbatimRate:
    """Of `passages`, how many the model continued `verbatim` after `prefix_tokens`; their share,
    its 95 % interval, and how many tokens it got right on average before the first wrong one."""

    prefix_tokens: int
    passages: int
    verbatim: int
    share: float
    share_ci95: tuple[float, float]
    right_tokens: float


@dataclass(frozen=True)
class SharedRun:
    """The longest run of bytes that a text shares with the training text, and its document."""

    data: bytes
    document: str


def passage_sizes(block_size: int) -> tuple[list[int], int]:
    """Prefix lengths and the length of the continuation, in tokens, that fit into a block."""
    continuation = min(CONTINUATION, max(1, block_size // 2))
    fitting = [prefix for prefix in PREFIXES if prefix + continuation <= block_size]
    return fitting or [block_size - continuation], continuation


class PassageSample:
    """Up to `most` passages of `length` tokens, evenly from all the tokens that `add` is given.

    Tokens are cut into passages one behind the other, each of which draws a random number; those
    with the least are kept. What is shorter than a passage has none.
    """

    def __init__(self, most: int, length: int, seed: int = 0) -> None:
        self._most, self._length = most, length
        self._rng = np.random.default_rng(seed)
        self._kept: list[tuple[float, int, NDArray[np.int64]]] = []  # a heap, the largest first
        self._count = 0

    def add(self, tokens: NDArray[Any]) -> None:
        """A text's tokens (n,)."""
        draws = self._rng.random(len(tokens) // self._length)
        for place in np.flatnonzero(draws < self._limit).tolist():
            draw, begin = float(draws[place]), place * self._length
            passage = tokens[begin : begin + self._length].astype(np.int64)
            self._count += 1
            heapq.heappush(self._kept, (-draw, self._count, passage))
            if len(self._kept) > self._most:
                heapq.heappop(self._kept)

    @property
    def _limit(self) -> float:
        return -self._kept[0][0] if len(self._kept) == self._most else 1.0

    @property
    def passages(self) -> NDArray[np.int64]:
        """(N, length)."""
        kept = [passage for _, _, passage in sorted(self._kept, key=lambda entry: -entry[0])]
        return np.array(kept, dtype=np.int64).reshape(-1, self._length)


@torch.no_grad()
def verbatim_rates(
    model: GPT,
    passages: NDArray[np.int64],
    prefixes: Sequence[int],
    continuation: int,
    device: Device,
    precision: str = "fp32",
) -> list[VerbatimRate]:
    """For each prefix length, how the model, in eval mode, continues the passages (N, at least
    prefix + continuation). All lengths are asked for the same last `continuation` tokens.

    Nothing is generated: greedy decoding writes the passage if, and only if, each of its tokens is
    the likeliest after the true ones before it, which one pass over the passage tells (up to
    rounding ties). Raises `stop.Stopped`.
    """
    rates = []
    for prefix in prefixes:
        rows = torch.from_numpy(passages[:, passages.shape[1] - prefix - continuation :])
        targets = rows[:, 1:].clone()
        targets[:, : prefix - 1] = -1  # not asked
        right = torch.zeros(len(rows), continuation, dtype=torch.bool)
        for numbers in batches([rows.shape[1]] * len(rows), device):
            stop.raise_if_requested()
            found = score_tokens(model, rows[numbers, :-1], targets[numbers], device, precision)
            right[numbers] = (found.likeliest.cpu() == targets[numbers])[:, prefix - 1 :]
        rates.append(_rate(prefix, right.numpy()))
    return rates


def _rate(prefix: int, right: NDArray[np.bool_]) -> VerbatimRate:
    """From whether each token (N, continuation) is the likeliest."""
    leading = np.logical_and.accumulate(right, axis=1).sum(axis=1)
    verbatim, passages = int(right.all(axis=1).sum()), len(right)
    return VerbatimRate(
        prefix_tokens=prefix,
        passages=passages,
        verbatim=verbatim,
        share=verbatim / passages,
        share_ci95=share_interval(verbatim, passages),
        right_tokens=float(leading.mean()),
    )


class SharedRuns:
    """The longest run of bytes that each of `texts` shares with the texts that `add` is given.

    Runs below `LEAST_RUN` bytes count as none. Every 16th place of a text is looked up among all
    16-byte grams of `texts` and a hit is extended to both sides, once for each run, so that
    a megabyte takes milliseconds.
    """

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._texts = texts
        self._found: list[SharedRun | None] = [None] * len(texts)
        self._longest = max(map(len, texts), default=0)
        self._tail = b""
        self._grams: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        for number, text in enumerate(texts):
            for place in range(len(text) - _GRAM + 1):
                self._grams[text[place : place + _GRAM]].append((number, place))

    @property
    def found(self) -> list[SharedRun | None]:
        """The longest run of each text so far; None: none of `LEAST_RUN` bytes."""
        return list(self._found)

    def add(self, data: bytes, document: str, begins: bool) -> None:
        """The next piece of a document; `begins` at its first one. Raises `stop.Stopped`."""
        data = data if begins else self._tail + data
        self._tail = data[-self._longest :] if self._longest else b""
        ends: dict[tuple[int, int], int] = {}  # of runs, by text and how far it lies behind data
        for place in range(0, len(data) - _GRAM + 1, _GRAM):
            if place % _POLL_BYTES == 0:
                stop.raise_if_requested()
                ends = {run: end for run, end in ends.items() if end > place}
            for number, at in self._grams.get(data[place : place + _GRAM], ()):
                run = (number, place - at)
                if place < ends.get(run, 0) or self._is_whole(number):
                    continue
                text = self._texts[number]
                behind = data[max(0, place - at) : place]
                before = _common_prefix(behind[::-1], text[:at][::-1])
                after = _common_prefix(data[place : place + len(text) - at], text[at:])
                ends[run] = place + after
                self._take(number, text[at - before : at + after], document)

    def _is_whole(self, number: int) -> bool:
        best = self._found[number]
        return best is not None and len(best.data) == len(self._texts[number])

    def _take(self, number: int, run: bytes, document: str) -> None:
        best = self._found[number]
        if len(run) >= LEAST_RUN and (best is None or len(run) > len(best.data)):
            self._found[number] = SharedRun(run, document)


def _common_prefix(one: bytes, other: bytes) -> int:
    """How many bytes at the beginning are equal: halving finds where they part."""
    equal, unequal = 0, min(len(one), len(other)) + 1
    while unequal - equal > 1:
        middle = (equal + unequal) // 2
        if one[equal:middle] == other[equal:middle]:
            equal = middle
        else:
            unequal = middle
    return equal
