"""What the model reads: prompts into the cache of a batch, then the next tokens of every row."""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from gptcli import stop
from gptcli.generation.recorded import RecordedSteps
from gptcli.model.cache import KVCache
from gptcli.model.gpt import GPT

_LEAST_SHARED_TOKENS = 16  # shorter beginnings cost less to read again than to keep
_LEAST_SHARED_KEYS = 64  # fewer are read in each row as fast as they are read for all
_MOST_PREFIXES = 4  # beginnings that are kept, each with its keys and values
_READ_AT_ONCE_TOKENS = 4096  # of several texts, filled up to the longest of them; of one, half


class Reader:
    """A model and its cache for a batch of texts, which `fill` and `step` keep in agreement.

    Texts that begin alike are read once up to where they part, and those that come again once;
    which these are is found among `texts`, all that are to come, with how often each does.
    `decoder` is the model that takes the steps, which may be recorded: the same weights, where its
    linear layers are made for few rows. None: `model`, unrecorded, as one in training may be
    compiled.
    """

    def __init__(
        self,
        model: GPT,
        decoder: GPT | None,
        rows: int,
        capacity: int,
        most_new: int,
        texts: Mapping[tuple[int, ...], int],
    ) -> None:
        self._model, self._decoder = model, decoder or model
        self._cache = model.new_batch_cache(rows, capacity, most_new)
        self._recorded: RecordedSteps | None = None
        if decoder is not None:
            self._recorded = RecordedSteps(decoder, self._cache, rows, capacity)
        windows = [window for window in model.windows if window]
        self._narrowest = min(windows, default=capacity)
        self._prefixes = shared_prefixes(list(texts), _LEAST_SHARED_TOKENS, self._narrowest)
        self._repeated = {  # they cannot enter all at once
            text
            for text, count in texts.items()
            if count > rows and _LEAST_SHARED_TOKENS <= len(text) <= self._narrowest
        }
        self._kept: dict[tuple[int, ...], KVCache] = {}
        # Whether attention reads what rows begin with once for all of them, what each was filled
        # with, and of how many rows how many tokens were found to be shared.
        fp32 = (model.device.type, model.dtype) == ("cpu", torch.float32)
        self._can_share = fp32 and not windows
        self._held: dict[int, tuple[int, ...]] = {}
        self._shared = (0, 0)

    def fill(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Read the texts of the rows by whose numbers they go; equal ones are read once.

        Ends early when a stop is requested; then the cache does not hold them.
        """
        rows_of: dict[tuple[int, ...], list[int]] = {}
        self._held.update((row, tuple(text)) for row, text in texts.items())
        self._shared = (0, 0)
        for row, text in texts.items():
            if text:
                rows_of.setdefault(tuple(text), []).append(row)
        for group in self._groups(list(rows_of)):
            cache = self._read(group)
            if stop.requested():
                return
            for source_row, text in enumerate(group):
                for row in rows_of[text]:
                    self._cache.insert(row, cache, source_row, len(text))

    def step(
        self, tokens: Sequence[Sequence[int]], lengths: Sequence[int], steps: int = 1
    ) -> Tensor:
        """Logits (R, T, V) after each of the next `tokens` (R, T) of the first rows, which have
        `lengths` tokens (R,) in the cache. About so many `steps` of this kind are to come."""
        count, shared = len(tokens[0]), self._shared_tokens(len(lengths))
        shared = shared if shared <= min(lengths) else 0  # 0 of a row that is read again
        if self._recorded is not None and self._recorded.fit(lengths, count, shared, steps):
            return self._recorded.step(torch.tensor(tokens), lengths, shared)
        self._cache.begin(lengths, count, shared)
        ids = torch.tensor(tokens, device=self._model.device)
        logits: Tensor = self._decoder(ids, self._cache)
        return logits

    def read_again(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (R, 1, V) after whole texts, without a cache."""
        logits: list[Tensor] = [torch.empty(0)] * len(texts)
        for length in {len(text) for text in texts}:
            rows = [row for row, text in enumerate(texts) if len(text) == length]
            ids = torch.tensor([texts[row] for row in rows], device=self._model.device)
            for row, last in zip(rows, self._model(ids, last_only=True), strict=True):
                logits[row] = last
        return torch.stack(logits)

    def move(self, row: int, to: int, length: int) -> None:
        """Let row `to` hold the first `length` tokens, which are all, that `row` holds."""
        self._cache.move(row, to, length)
        self._held[to], self._shared = self._held.get(row, ()), (0, 0)

    def clear(self, row: int) -> None:
        """Forget what `row` holds, which is not finite: what a mask hides of it would be nan."""
        self._cache.clear(row)

    def _shared_tokens(self, rows: int) -> int:
        """What the first `rows` rows begin with alike, where that is worth a part of its own."""
        if self._shared[0] != rows:
            texts = {self._held.get(row, ()) for row in range(rows)}
            shared = len(reduce(_common, texts)) if self._can_share and rows > 1 else 0
            self._shared = rows, shared if shared >= _LEAST_SHARED_KEYS else 0
        return self._shared[1]

    def _groups(self, texts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Texts that are read together: they begin alike and are about as long.

        A text is filled up to the longest of its group. That must not reach into a layer's window,
        whose slots would be taken again.
        """
        groups: list[list[tuple[int, ...]]] = []
        for text in sorted(texts, key=lambda text: (self._prefix(text), len(text))):
            if groups:
                first, size = groups[-1][0], len(groups[-1]) + 1
                alike = self._prefix(first) == self._prefix(text)
                near = len(text) <= min(1.5 * len(first) + 8, self._narrowest)
                few = size * len(text) <= _READ_AT_ONCE_TOKENS
                if alike and few and (near or len(text) == len(first)):
                    groups[-1].append(text)
                    continue
            groups.append([text])
        return groups

    def _read(self, texts: list[tuple[int, ...]]) -> KVCache:
        """A cache with the texts, which have one prefix; the longest is the last."""
        length, prefix = len(texts[-1]), self._prefix(texts[0])
        cache = self._model.new_cache(len(texts), length)
        if prefix:
            cache.take(self._beginning(prefix))
        filled = [list(text[len(prefix) :]) + [0] * (length - len(text)) for text in texts]
        self._advance(filled, cache)
        return cache

    def _beginning(self, prefix: tuple[int, ...]) -> KVCache:
        cache = self._kept.pop(prefix, None)
        if cache is None:
            cache = self._model.new_cache(1, len(prefix))
            shorter = self._prefix(prefix[:-1])
            if shorter:
                cache.take(self._beginning(shorter))
            self._advance([list(prefix[len(shorter) :])], cache)
            if len(self._kept) == _MOST_PREFIXES:
                del self._kept[next(iter(self._kept))]  # the one that was used least recently
        self._kept[prefix] = cache
        return cache

    def _advance(self, tokens: list[list[int]], cache: KVCache) -> None:
        ids = torch.tensor(tokens, device=self._model.device)
        most = min(self._model.config.block_size, _READ_AT_ONCE_TOKENS // 2)
        for chunk in torch.split(ids, most, dim=1):
            if stop.requested() or not chunk.size(1):
                return
            self._model.hidden(chunk, cache)

    def _prefix(self, text: tuple[int, ...]) -> tuple[int, ...]:
        if text in self._repeated:
            return text
        fitting = (prefix for prefix in self._prefixes if text[: len(prefix)] == prefix)
        return max(fitting, key=len, default=())


def shared_prefixes(texts: Sequence[Sequence[int]], least: int, most: int) -> list[tuple[int, ...]]:
    """The beginnings of at least `least` tokens that neighbours in the order of the texts share,
    cut to `most`: one for each run of texts that begin alike, for as long as that is at least half
    of what the last two share."""
    found: list[tuple[int, ...]] = []
    run: tuple[int, ...] = ()
    ordered = sorted({tuple(text) for text in texts})
    for before, text in pairwise(ordered):
        shared = _common(before, text)[:most]
        common = _common(run, shared)
        if run and len(common) >= least and 2 * len(common) >= max(len(run), len(shared)):
            run = common
            continue
        if run:
            found.append(run)
        run = shared if len(shared) >= least else ()
    return [*found, run] if run else found


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """What both begin with."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[: min(len(a), len(b)) if length is None else length]
