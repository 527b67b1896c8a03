"""The decode engine: texts of any lengths grow as one batch, token by token.

A row of the batch is one text. Prompts are read once, whatever the number of samples, and what
several prompts begin with is read once for all. Rows that are finished leave the batch and waiting
ones take their places.

The window. A model whose layers all attend to a window of tokens (`ModelConfig.rolls`) reads texts
of any length with a cache of fixed size, exactly as without one. Every other model sees at most
block_size tokens. When a text outgrows them, the window starts again with the last block_size // 2
tokens at positions 0, 1, ... and is prefilled anew; the cached and the uncached path share this
schedule and so give the same text. (To drop only the oldest keys instead ruins dense models
that rest their attention on the first tokens: Xiao et al. 2023, "Efficient Streaming Language
Models with Attention Sinks".)

Speculation (Leviathan et al. 2023) by prompt lookup: what followed the last tokens earlier in the
text is read together with them as a guess. A guess counts where it is the token that would have
been chosen without it, by the same logits and the same random number; so the text stays the same.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gptcli import stop
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, free_memory_bytes
from gptcli.errors import CheckpointError
from gptcli.generation.reader import Reader
from gptcli.generation.row import Generated, OnText, Report, Row
from gptcli.generation.sampling import Sampler, Sampling, check_finite
from gptcli.model.gpt import GPT

# The key-value caches of a batch get this much memory, or a quarter of what is free; texts that do
# not fit wait. More rows than 64 gain little: then products are at their peak speed already.
_CACHE_BYTES = 2**30
MOST_ROWS = 64
_MOST_DRAFTED = 8  # tokens read ahead in one step; each costs little while weights are the load


@dataclass(frozen=True)
class Request:
    """A prompt as text, which is only passed on, and as ids, to be continued `n` times.

    There are 1 to block_size ids, or any number for a model that rolls.
    """

    prompt: str
    tokens: list[int]
    sampling: Sampling
    n: int = 1


@dataclass(frozen=True)
class BatchSize:
    """How many `rows` grow at once, and the tokens that each has room for in the cache, 0 without
    one, of which up to `most_new` come in one step."""

    rows: int
    capacity: int
    most_new: int

    @classmethod
    def of(cls, model: GPT, requests: Sequence[Request], speculate: bool = False) -> "BatchSize":
        """As many rows as the memory for their keys and values holds."""
        most_new = 1 + (_MOST_DRAFTED if speculate else 0)
        # Guesses, and what fills rows up to the longest of them, lie beyond a text's last token.
        capacity = max(len(r.tokens) + r.sampling.max_new_tokens for r in requests) + most_new - 1
        if not model.config.rolls:
            capacity = min(capacity, model.config.block_size)
        row_bytes = model.new_batch_cache(1, capacity, most_new).row_bytes
        free = free_memory_bytes(Device(model.device.type, model.device.index, "", 1, True))
        room = _CACHE_BYTES if free is None else min(max(_CACHE_BYTES, free // 4), free // 2)
        fitting = room // row_bytes
        texts = sum(request.n for request in requests)
        return cls(max(1, min(MOST_ROWS, texts, fitting)), capacity, most_new)


def decode(
    model: GPT,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    on_text: Callable[[int, int, str], None] | None = None,
    on_sample: Callable[[Generated], None] | None = None,
    speculate: bool = False,
    use_cache: bool = True,
    decoder: GPT | None = None,
    size: BatchSize | None = None,
) -> Iterator[tuple[int, list[Generated]]]:
    """Continue all prompts; yields the number of each request and its samples, in their order.

    Sample k of a request depends on (sampling, k, its tokens) alone, up to rounding.
    `on_text(request, sample, piece)` receives the texts as they grow, in whole characters, those of
    later requests among them. `on_sample` receives each sample of the request at hand when it and
    those before it are done, but for interrupted ones. `decoder` is a model of the same weights, or
    `model` itself, that is there to take steps: they are recorded where many come. `size` is what
    `BatchSize.of` gave, if that was asked before. When a stop is requested, the texts begun are
    yielded as they are, "interrupted". Raises CheckpointError for non-finite logits, ValueError for
    tokens that do not fit.
    """
    for request in requests:
        _check(model, request)
    if not use_cache:
        size = BatchSize(sum(request.n for request in requests), 0, 1)
    with _evaluating(model):
        size = size or BatchSize.of(model, requests, speculate)
        shown = _Shown(on_text, on_sample or (lambda sample: None))
        yield from _decode(model, decoder, tokenizer, requests, shown, speculate, size)


def _decode(
    model: GPT,
    decoder: GPT | None,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    shown: "_Shown",
    speculate: bool,
    size: BatchSize,
) -> Iterator[tuple[int, list[Generated]]]:
    begun: list[list[Row]] = [[] for _ in requests]

    def waiting() -> Iterator[Row]:  # made when there is a place: there may be millions
        for number, rows in enumerate(_rows(tokenizer, requests, shown.on_text, speculate)):
            for row in rows:
                begun[number].append(row)
                yield row

    with torch.inference_mode():  # never across a yield: it would go on in the caller
        texts = Counter[tuple[int, ...]]()
        for request in requests:
            texts[tuple(request.tokens[:-1])] += request.n  # the last token goes with the first
        reader = Reader(model, decoder, size.rows, size.capacity, size.most_new, texts)
        batch = Batch(model, tokenizer, reader, partial(next, waiting(), None), size)
    for number, request in enumerate(requests):
        rows, samples = begun[number], list[Generated]()
        while len(samples) < request.n:
            done = len(samples)
            if done < len(rows) and rows[done].finish_reason not in (None, "interrupted"):
                samples.append(rows[done].result(request.prompt))
                shown.on_sample(samples[-1])
                continue
            with torch.inference_mode():
                going_on = batch.step()
            if not going_on:
                break
        begun[number] = []  # nobody keeps them when they are told
        samples += [row.result(request.prompt) for row in rows[len(samples) :] if row.begun]
        if not samples:
            return
        yield number, samples


def generate_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompt_tokens: list[int],
    n: int,
    sampling: Sampling,
    *,
    prompt: str = "",
    on_text: OnText | None = None,
    use_cache: bool = True,
) -> list[Generated]:
    """Continue `prompt_tokens` `n` times; see `decode`. `on_text(sample, piece)`."""
    shown = None if on_text is None else lambda _, sample, piece: on_text(sample, piece)
    request = Request(prompt, prompt_tokens, sampling, n)
    batches = decode(model, tokenizer, [request], on_text=shown, use_cache=use_cache)
    return [sample for _, samples in batches for sample in samples]


def restart_tokens(block_size: int) -> int:
    """How many of the last tokens a full window starts again with."""
    return max(1, block_size // 2)


def _check(model: GPT, request: Request) -> None:
    block_size, count = model.config.block_size, len(request.tokens)
    if not count or (count > block_size and not model.config.rolls):
        raise ValueError(f"{count} prompt tokens, not 1 to {block_size}")


def _rows(
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    on_text: Callable[[int, int, str], None] | None,
    speculate: bool,
) -> Iterator[Iterator[Row]]:
    """Those of each request."""
    for number, r in enumerate(requests):
        shown: OnText | None = None
        if on_text is not None:
            shown = lambda sample, piece, number=number: on_text(number, sample, piece)  # noqa: E731
        yield (Row(k, tokenizer, r.tokens, r.sampling, shown, speculate) for k in range(r.n))


@dataclass(frozen=True)
class _Shown:
    """Who receives texts as they grow, and samples that are done."""

    on_text: Callable[[int, int, str], None] | None
    on_sample: Callable[[Generated], None]


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """No dropout inside; the training mode comes back after (samples are drawn during training)."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Batch:
    """The rows that grow together, and those that wait for a place.

    `waiting` gives the next of these, None while there is none: more may come later. Whoever calls
    `step` and `cancel` does so in `torch.inference_mode`, from one thread.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        reader: Reader,
        waiting: Callable[[], Row | None],
        size: BatchSize,
        on_broken: Callable[[Row], None] | None = None,
    ) -> None:
        """`on_broken` is told of a row for which the model gives what is not finite, and which
        ends; without it that is a CheckpointError for all."""
        self._model, self._reader, self._size = model, reader, size
        self._waiting, self._rows, self._on_broken = waiting, list[Row](), on_broken
        self._vocab_size = min(tokenizer.vocab_size, model.vocab_size)  # the head may be padded
        self._sampler = Sampler(size.rows, tokenizer, self._vocab_size, model.device)
        self._free = list(range(size.rows))

    def step(self) -> bool:
        """One more token, with good guesses several, for every row; False when there is none, or a
        stop is requested, for which they are "interrupted"."""
        if not (stop.requested() and self._rows):
            self._admit()
        self._renew()
        if stop.requested():
            for row in self._rows:
                row.finish("interrupted")
            return False
        if not self._rows:
            return False
        self._choose(self._read())
        self._leave()
        return True

    def cancel(self, row: Row) -> None:
        """End a row that grows: "interrupted", unless it ended by itself. The others go on."""
        if row.finish_reason is None:
            row.finish("interrupted")
            self._leave()

    def _admit(self) -> None:
        while self._free and (row := self._waiting()) is not None:
            row.begin(self._free.pop())
            given = row.sampling, row.prompt_tokens, row.sample
            row.matcher = self._sampler.begin(row.slot, *given)
            self._rows.append(row)

    def _renew(self) -> None:
        """Read the texts that are new, and those whose window starts again."""
        block_size = self._model.config.block_size
        for row in self._rows:
            if len(row.context) > block_size and not self._model.config.rolls:
                row.context = row.context[-restart_tokens(block_size) :]
                row.unread = True
        unread = {i: row.context[:-1] for i, row in enumerate(self._rows) if self._is_unread(row)}
        if unread:
            self._reader.fill(unread)
        for row in self._rows:
            row.unread = False

    def _is_unread(self, row: Row) -> bool:
        return row.unread and not self._is_read_whole(row)

    def _is_read_whole(self, row: Row) -> bool:
        """Whether all of its text is read each time: where there is no cache, and where rotations
        depend on its length."""
        return not self._size.capacity or len(row.context) > self._model.cacheable_tokens

    def _read(self) -> Tensor:
        """Logits (R, T, V) after the last token of each row and after its guesses."""
        whole = [i for i, row in enumerate(self._rows) if self._is_read_whole(row)]
        if len(whole) == len(self._rows):
            logits = self._reader.read_again([row.context for row in self._rows])
        else:
            tokens = self._guesses(0 if whole else self._size.most_new - 1)
            lengths = [len(row.context) - 1 for row in self._rows]
            for i in whole:
                lengths[i] = 0  # computed for nothing, but in its own row
            left = min(row.left for row in self._rows)  # until one leaves
            logits = self._reader.step(tokens, lengths, left)
            if whole:
                logits[whole] = self._reader.read_again([self._rows[i].context for i in whole])
        return logits[..., : self._vocab_size].float()

    def _guesses(self, most: int) -> list[list[int]]:
        """The last token of each row and the guesses of what follows, filled up to one length."""
        longest = max(len(row.context) for row in self._rows)
        most = min(most, self._model.cacheable_tokens - longest)  # rotations change beyond
        if not self._model.config.rolls:  # there is room for the longest row's too
            most = min(most, self._size.capacity - longest)
        tokens = [[row.context[-1], *row.guess(most)] for row in self._rows]
        count = max(map(len, tokens))
        return [part + [0] * (count - len(part)) for part in tokens]

    def _choose(self, logits: Tensor) -> None:
        """Take the next token of every row, and go on with those that had guessed it."""
        going = self._unbroken(logits)
        if not going:
            return
        for ahead in range(logits.size(1)):
            rows = [self._rows[i] for i in going]
            last = logits[:, ahead] if len(going) == len(self._rows) else logits[going, ahead]
            slots = np.array([row.slot for row in rows])
            positions = np.array([len(row.tokens) for row in rows])
            tokens = self._sampler.choose(last, slots, positions).tolist()
            reports = _reports(last, tokens, max(row.sampling.logprobs for row in rows))
            still = []
            for i, row, token, report in zip(going, rows, tokens, reports, strict=True):
                row.accept(token, report)
                if ahead < len(row.draft) and row.draft[ahead] == token:
                    row.accepted += 1
                    if row.finish_reason is None:
                        still.append(i)
            going = still
            if not going:
                return

    def _unbroken(self, logits: Tensor) -> list[int]:
        """The rows with finite logits (R, T, V); the others end."""
        try:
            check_finite(logits)
        except CheckpointError:
            if self._on_broken is None:
                raise
        else:
            return list(range(len(self._rows)))
        sound = logits.flatten(1).isfinite().all(dim=1).tolist()
        for i, row in enumerate(self._rows):
            if not sound[i]:
                self._reader.clear(i)
                row.finish("failed")
                self._on_broken(row)
        return [i for i, is_sound in enumerate(sound) if is_sound]

    def _leave(self) -> None:
        """Give the places of finished rows to the last ones."""
        for i in reversed(range(len(self._rows))):
            if self._rows[i].finish_reason is not None:
                self._free.append(self._rows[i].slot)
                last = self._rows.pop()
                if i < len(self._rows):
                    self._rows[i] = last
                    self._reader.move(len(self._rows), i, len(last.context))


def _reports(logits: Tensor, tokens: list[int], count: int) -> Sequence[Report | None]:
    """For each row the log-probability of its token and the `count` likeliest ids with theirs."""
    if not count:
        return [None] * len(tokens)
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device).clamp(min=0)[:, None])
    top = logprobs.topk(min(count, logprobs.size(1)), dim=-1)
    entries = zip(chosen[:, 0].tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [Report(*entry) for entry in entries]
