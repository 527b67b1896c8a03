"""The decode engine: one prefill of the prompt, then all samples token by token as one batch.

The window. A model whose layers all attend to a window of tokens (`ModelConfig.rolls`) reads texts
of any length with a cache of fixed size, exactly as without one. Every other model sees at most
block_size tokens. When a text outgrows them, the window starts again with the last block_size // 2
tokens at positions 0, 1, ... and is prefilled anew; the cached and the uncached path share this
schedule and so give the same text. (To drop only the oldest keys instead ruins dense models
that rest their attention on the first tokens: Xiao et al. 2023, "Efficient Streaming Language
Models with Attention Sinks".)
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gptcli import stop
from gptcli.data.tokenizer import Tokenizer
from gptcli.generation import sampling as pick
from gptcli.generation.text import StopScanner, Utf8Stream
from gptcli.model.gpt import GPT

OnText = Callable[[int, str], None]
FinishReason = Literal["length", "stop", "eot", "interrupted"]

# Key-value caches of samples decoded together; more samples than fit are decoded in turn.
_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults sample from the model's own distribution.

    `temperature` 0 takes the likeliest token. `logprobs` is the number of alternatives reported
    for each token. Generation ends at eot or another of the tokenizer's `ends`, at the first of the
    `stop` texts, or after `max_new_tokens`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    max_new_tokens: int = 200
    logprobs: int = 0


@dataclass(frozen=True)
class Generated:
    """One continuation of one prompt.

    `text` ends before a stop text; `tokens` holds the generated ids that it takes to spell `text`,
    none of the tokenizer's `ends` among them: finish_reason "eot" stands for whichever it was.
    `logprobs` has one entry a token, `{"token", "text", "logprob", "top"}`, natural logarithms
    under the model's own distribution; `top` holds [id, text, logprob], likeliest first.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    seed: int
    sample: int
    logprobs: list[dict[str, Any]] | None

    def to_json(self) -> dict[str, Any]:
        """The object that `gpt generate --json` prints; `logprobs` only when asked for."""
        row = {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "sample": self.sample,
        }
        return row if self.logprobs is None else {**row, "logprobs": self.logprobs}


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
    """Continue `prompt_tokens` `n` times; `prompt` is only passed on.

    There are 1 to block_size ids, or any number for a model that rolls.

    Sample k depends on (sampling, k, prompt_tokens) alone, up to rounding. `on_text(sample, piece)`
    receives the texts as they grow, in whole characters. When a stop is requested, the texts begun
    are returned as they are, "interrupted". Raises CheckpointError for non-finite logits.
    """
    block_size, rolls = model.config.block_size, model.config.rolls
    if not prompt_tokens or (len(prompt_tokens) > block_size and not rolls):
        raise ValueError(f"{len(prompt_tokens)} prompt tokens, not 1 to {block_size}")
    capacity = len(prompt_tokens) + sampling.max_new_tokens
    if not rolls:
        capacity = min(block_size, capacity)
    at_once = max(1, _CACHE_BYTES // model.new_cache(0, capacity).row_bytes)
    rows = [_Row(sample, tokenizer, sampling, on_text) for sample in range(n)]
    with torch.inference_mode(), _evaluating(model):
        for first in range(0, n, at_once):
            window = _Window(model, prompt_tokens, capacity if use_cache else None)
            _decode(window, rows[first : first + at_once], tokenizer, sampling, prompt_tokens)
            if stop.requested():
                rows = rows[: first + at_once]
                break
    return [row.result(prompt) for row in rows]


def restart_tokens(block_size: int) -> int:
    """How many of the last tokens a full window starts again with."""
    return max(1, block_size // 2)


def _decode(
    window: "_Window",
    rows: list["_Row"],
    tokenizer: Tokenizer,
    sampling: Sampling,
    prompt_tokens: list[int],
) -> None:
    """Run `rows` to their end as one batch; a finished row leaves it."""
    key = pick.stream_key(sampling.seed, prompt_tokens)
    vocab_size = min(tokenizer.vocab_size, window.model.vocab_size)  # without padding of the head
    logits = window.prefill(len(rows))
    seen = _seen(prompt_tokens, len(rows), logits) if sampling.repetition_penalty != 1.0 else None
    for position in range(sampling.max_new_tokens):
        if stop.requested():
            break
        logits = _on_sampling_device(logits[:, :vocab_size].float())
        pick.check_finite(logits)
        tokens = _choose(logits, rows, key, position, seen, sampling)
        reports = _logprobs(logits, tokens, sampling.logprobs)
        for row, token, report in zip(rows, tokens.tolist(), reports, strict=True):
            row.accept(token, report)
        if all(row.finish_reason for row in rows):
            return
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        alive = [i for i, row in enumerate(rows) if row.finish_reason is None]
        if len(alive) < len(rows):
            rows = [rows[i] for i in alive]
            kept = torch.tensor(alive, device=tokens.device)
            tokens, seen = tokens[kept], None if seen is None else seen[kept]
            window.keep_rows(kept)
        if position + 1 < sampling.max_new_tokens:
            logits = window.advance(tokens)
    for row in rows:
        row.finish("length" if len(row.tokens) == sampling.max_new_tokens else "interrupted")


def _choose(
    logits: Tensor,
    rows: list["_Row"],
    key: int,
    position: int,
    seen: Tensor | None,
    sampling: Sampling,
) -> Tensor:
    """Next token ids (B,) for logits (B, V)."""
    if seen is not None:
        seen = seen[:, : logits.size(1)]
        logits = pick.penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = pick.filter_logits(
        logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    )
    samples = np.array([row.sample for row in rows], dtype=np.int64)
    uniforms = torch.from_numpy(pick.uniform_numbers(key, samples, position))
    return pick.draw(logits, uniforms.to(logits.device))


def _logprobs(logits: Tensor, tokens: Tensor, count: int) -> list["_Report | None"]:
    """For each row the log-probability of its token and the `count` likeliest ids with theirs."""
    if not count:
        return [None] * len(tokens)
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    top = logprobs.topk(min(count, logprobs.size(1)), dim=-1)
    return [
        _Report(*r) for r in zip(chosen, top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _seen(prompt_tokens: list[int], rows: int, logits: Tensor) -> Tensor:
    """Which tokens (rows, V) the prompt holds."""
    seen = torch.zeros(rows, logits.size(1), dtype=torch.bool)
    seen[:, torch.tensor(prompt_tokens)] = True
    return _on_sampling_device(seen.to(logits.device))


def _on_sampling_device(x: Tensor) -> Tensor:
    """`x` where tokens are chosen: MPS has no float64, which inverse-CDF sampling needs."""
    return x.cpu() if x.device.type == "mps" else x


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """No dropout inside; the training mode comes back after (samples are drawn during training)."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _Window:
    """The tokens in the model's view (B, T) and their keys and values if cached.

    T <= block_size, or any number for a model that rolls.
    """

    def __init__(self, model: GPT, prompt_tokens: list[int], capacity: int | None) -> None:
        self.model, self._rolls = model, model.config.rolls
        self.ids = torch.tensor([prompt_tokens], device=model.device)
        self.cache = None if capacity is None else model.new_cache(1, capacity)

    def prefill(self, rows: int) -> Tensor:
        """Logits (rows, V) after the prompt, which is read once and then repeated.

        When a stop is requested meanwhile, they are those after a part of it.
        """
        size = self.ids.size(1) if self.cache is None else self.model.config.block_size
        for chunk in torch.split(self.ids, size, dim=1):
            logits: Tensor = self.model(chunk, self.cache, last_only=True)[:, -1]
            if stop.requested():
                break
        self.keep_rows(torch.zeros(rows, dtype=torch.long))
        return logits.expand(rows, -1)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep (or repeat) the rows whose indices are given."""
        rows = rows.to(self.ids.device)
        self.ids = self.ids[rows]
        if self.cache is not None:
            self.cache.keep_rows(rows)

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B,) a row."""
        unread = tokens.to(self.ids.device)[:, None]
        if self._rolls and self.cache is not None:
            self.ids = unread  # the cache holds all that is needed of the others
        else:
            self.ids = torch.cat([self.ids, unread], dim=1)
        block_size = self.model.config.block_size
        if self.ids.size(1) > block_size and not self._rolls:
            self.ids = unread = self.ids[:, -restart_tokens(block_size) :]
            if self.cache is not None:
                self.cache.length = 0
        if self.cache is None:
            unread = self.ids
        logits: Tensor = self.model(unread, self.cache, last_only=True)[:, -1]
        return logits


@dataclass(frozen=True)
class _Report:
    """Log-probability of a token and of the likeliest ones."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class _Row:
    """One sample in the making: its tokens, its text, and how it ended."""

    def __init__(
        self, sample: int, tokenizer: Tokenizer, sampling: Sampling, on_text: OnText | None
    ) -> None:
        self.sample, self.tokens = sample, list[int]()
        self.finish_reason: FinishReason | None = None
        self._tokenizer, self._sampling, self._on_text = tokenizer, sampling, on_text
        self._utf8, self._scanner = Utf8Stream(), StopScanner(sampling.stop)
        self._pieces: list[str] = []
        self._decoded = [0]  # characters complete after 0, 1, ... tokens
        self._logprobs: list[dict[str, Any]] = []

    def accept(self, token: int, report: _Report | None) -> None:
        """Take the next token; sets `finish_reason` if it is the last."""
        if token in self._tokenizer.ends:
            self.finish("eot")
            return
        self.tokens.append(token)
        if report is not None:
            self._logprobs.append(self._entry(token, report))
        piece = self._utf8.feed(self._tokenizer.token_bytes(token))
        self._decoded.append(self._decoded[-1] + len(piece))
        self._emit(self._scanner.feed(piece))
        if self._scanner.stopped:
            self.finish("stop")
        elif len(self.tokens) == self._sampling.max_new_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the text: nothing stays held back, and what spells the stop text is dropped."""
        if not self._scanner.stopped:
            self._emit(self._scanner.feed(self._utf8.flush()))
            self._emit(self._scanner.flush())
        self.finish_reason = "stop" if self._scanner.stopped else reason
        if self._scanner.stopped:
            needed = bisect_left(self._decoded, sum(map(len, self._pieces)))
            self.tokens, self._logprobs = self.tokens[:needed], self._logprobs[:needed]

    def result(self, prompt: str) -> Generated:
        """The finished sample."""
        assert self.finish_reason is not None
        return Generated(
            prompt=prompt,
            text="".join(self._pieces),
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            seed=self._sampling.seed,
            sample=self.sample,
            logprobs=self._logprobs if self._sampling.logprobs else None,
        )

    def _emit(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._on_text is not None:
                self._on_text(self.sample, piece)

    def _entry(self, token: int, report: _Report) -> dict[str, Any]:
        top = zip(report.top_ids, report.top_logprobs, strict=True)
        return {
            "token": token,
            "text": self._shown(token),
            "logprob": report.logprob,
            "top": [[i, self._shown(i), logprob] for i, logprob in top],
        }

    def _shown(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")
