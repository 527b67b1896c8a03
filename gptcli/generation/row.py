"""Texts in the making: their tokens, how they are spelled, and how they end."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptcli.data.tokenizer import Tokenizer
from gptcli.generation.grammar import Matcher
from gptcli.generation.lookup import Lookup
from gptcli.generation.sampling import Sampling
from gptcli.generation.text import StopScanner, Utf8Stream

FinishReason = Literal["length", "stop", "eot", "interrupted", "failed"]
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Generated:
    """One continuation of one prompt.

    `text` ends before a stop text; `tokens` holds the generated ids that it takes to spell `text`,
    none of the tokenizer's `ends` among them: finish_reason "eot" stands for whichever it was. With
    a constraint it is "stop" where nothing could follow, and "failed" where no token can go on with
    it, for which `failure` says why; `complete` tells whether `text` fulfils it, None without one.
    `logprobs` has one entry a token, `{"token", "text", "logprob", "top"}`, natural logarithms
    under the model's own distribution; `top` holds [id, text, logprob], likeliest first. Of
    `drafted` tokens that speculation guessed, `accepted` were right.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    seed: int
    sample: int
    logprobs: list[dict[str, Any]] | None
    drafted: int = 0
    accepted: int = 0
    complete: bool | None = None
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that `gpt generate --json` prints; `logprobs` only when asked for, the counts
        of speculation only where there are any, `complete` only with a constraint."""
        row: dict[str, Any] = {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "sample": self.sample,
        }
        if self.logprobs is not None:
            row["logprobs"] = self.logprobs
        if self.drafted:
            row |= {"drafted": self.drafted, "accepted": self.accepted}
        if self.complete is not None:
            row["complete"] = self.complete
        return row


@dataclass(frozen=True)
class Report:
    """Log-probability of a token and of the likeliest ones."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Row:
    """One sample in the making: its tokens, its text, and how it ended.

    `context` holds the tokens that the model sees, the last of which it has not read yet. Those
    before are in its cache, or with `unread` are not.
    """

    def __init__(
        self,
        sample: int,
        tokenizer: Tokenizer,
        prompt_tokens: Sequence[int],
        sampling: Sampling,
        on_text: OnText | None,
        speculate: bool = False,
    ) -> None:
        self.sample, self.sampling = sample, sampling
        self.prompt_tokens, self.context = prompt_tokens, list(prompt_tokens)
        self.tokens: list[int] = []
        self.begun, self.unread = False, True
        self.slot = 0  # of the sampler, which moves the matcher on with each token
        self.matcher: Matcher | None = None
        self.draft: list[int] = []
        self.drafted = self.accepted = 0
        self.finish_reason: FinishReason | None = None
        self._speculate = speculate
        self._lookup: Lookup | None = None
        self._tokenizer, self._on_text = tokenizer, on_text
        self._utf8, self._scanner = Utf8Stream(), StopScanner(sampling.stop)
        self._pieces: list[str] = []
        self._told = 0  # characters of the pieces
        self._decoded = [0]  # characters complete after 0, 1, ... tokens
        self._logprobs: list[dict[str, Any]] = []
        self._failure: str | None = None

    def begin(self, slot: int) -> None:
        """Enter a batch, with `slot` of its sampler."""
        self.begun, self.slot = True, slot
        self._lookup = Lookup(self.prompt_tokens) if self._speculate else None

    @property
    def left(self) -> int:
        """How many tokens it may still take."""
        return self.sampling.max_new_tokens - len(self.tokens)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; kept as `draft`."""
        most = min(most, self.left - 1)  # one comes without a guess
        self.draft = self._lookup.draft(most) if self._lookup is not None and most > 0 else []
        self.drafted += len(self.draft)
        return self.draft

    def accept(self, token: int, report: Report | None) -> None:
        """Take the next token; sets `finish_reason` if it is the last. -1: there is none."""
        if token < 0 or token in self._tokenizer.ends:
            self.finish("eot" if token >= 0 else self._without_a_token())
            return
        self.tokens.append(token)
        self.context.append(token)
        if self._lookup is not None:
            self._lookup.extend([token])
        if report is not None and self.sampling.logprobs:
            self._logprobs.append(self._entry(token, report))
        piece = self._utf8.feed(self._tokenizer.token_bytes(token))
        self._decoded.append(self._decoded[-1] + len(piece))
        self._emit(self._scanner.feed(piece))
        if self._scanner.stopped or (self.matcher is not None and self.matcher.done):
            self.finish("stop")
        elif self.matcher is not None and self.matcher.problem is not None:
            self.finish(self._without_a_token())
        elif not self.left:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the text: nothing stays held back, and what spells the stop text is dropped."""
        if not self._scanner.stopped:
            self._emit(self._scanner.feed(self._utf8.flush()))
            self._emit(self._scanner.flush())
        self.finish_reason = "stop" if self._scanner.stopped else reason
        self._lookup = None  # it is as large as the text
        if self._scanner.stopped:
            needed = bisect_left(self._decoded, self._told)
            self.tokens, self._logprobs = self.tokens[:needed], self._logprobs[:needed]

    def logprobs_from(self, start: int) -> list[dict[str, Any]]:
        """The entries from `start` on (see `Generated`) of the tokens that it takes to spell the
        text so far."""
        return self._logprobs[start : bisect_left(self._decoded, self._told)]

    def result(self, prompt: str) -> Generated:
        """The finished sample."""
        assert self.finish_reason is not None
        return Generated(
            prompt=prompt,
            text="".join(self._pieces),
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            seed=self.sampling.seed,
            sample=self.sample,
            logprobs=self._logprobs if self.sampling.logprobs else None,
            drafted=self.drafted,
            accepted=self.accepted,
            complete=self._complete(),
            failure=self._failure,
        )

    def _without_a_token(self) -> FinishReason:
        """How a text ends that no token goes on with."""
        if self.matcher is None or self.matcher.accepting:
            return "stop"
        self._failure = self.matcher.stuck()
        return "failed"

    def _complete(self) -> bool | None:
        """Whether the text fulfils its constraint."""
        if self.matcher is None:
            return None
        if self._scanner.stopped:
            return self.matcher.fulfilled_by("".join(self._pieces))
        return self.matcher.accepting

    def _emit(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            self._told += len(piece)
            if self._on_text is not None:
                self._on_text(self.sample, piece)

    def _entry(self, token: int, report: Report) -> dict[str, Any]:
        count = self.sampling.logprobs  # of the batch's, which may be more
        top = zip(report.top_ids[:count], report.top_logprobs[:count], strict=True)
        return {
            "token": token,
            "text": self._shown(token),
            "logprob": report.logprob,
            "top": [[i, self._shown(i), logprob] for i, logprob in top],
        }

    def _shown(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")
