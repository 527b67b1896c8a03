"""The objects that OpenAI's clients read: completions and chat completions, whole and in chunks."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from gptcli.data.tokenizer import Tokenizer
from gptcli.generation.row import FinishReason, Generated
from gptcli.serve.asked import Asked
from gptcli.serve.worker import News

_REASONS: dict[FinishReason, str] = {
    "length": "length",
    "stop": "stop",
    "eot": "stop",
    "interrupted": "length",  # OpenAI has no word for these two; theirs stands beside it
    "failed": "length",
}


class Answer:
    """What one request is answered with, under one id."""

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        kind = "chat.completion" if asked.chat else "text_completion"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._whole = {"object": kind, **self._head}
        self._chunk = {"object": "chat.completion.chunk" if asked.chat else kind, **self._head}
        if asked.include_usage:
            self._chunk["usage"] = None
        # Where the next token of each text begins in it, for `text_offset`.
        self._offsets = [0] * sum(request.n for request in asked.requests)

    def whole(self, results: Sequence[Generated]) -> dict[str, Any]:
        """All texts at once. `seed` is what repeats them."""
        choices = [self._choice(number, result) for number, result in enumerate(results)]
        usage = self._usage(results)
        return {**self._whole, "choices": choices, "usage": usage, "seed": self._asked.seed}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks that come before anything is generated."""
        count, n = len(self._offsets), self._asked.requests[0].n
        if self._asked.chat:
            delta = {"role": "assistant", "content": ""}
            return [self._of({"index": i, "delta": delta, **_OPEN}) for i in range(count)]
        if not self._asked.echo:
            return []
        prompts = [self._asked.requests[i // n].prompt for i in range(count)]
        return [self._of({"index": i, "text": text, **_OPEN}) for i, text in enumerate(prompts)]

    def chunk(self, news: News) -> dict[str, Any]:
        """What a text goes on with."""
        choice: dict[str, Any] = {"index": news.number}
        if self._asked.chat:
            choice["delta"] = {"content": news.piece} if news.piece else {}
        else:
            choice["text"] = news.piece
        choice["logprobs"] = self._logprobs(news.number, news.logprobs) if news.logprobs else None
        choice |= _ended(news.finish_reason)
        return self._of(choice)

    def usage_chunk(self, results: Sequence[Generated]) -> dict[str, Any]:
        """The chunk that `stream_options.include_usage` asks for, behind all others."""
        return {**self._chunk, "choices": [], "usage": self._usage(results)}

    def _of(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._chunk, "choices": [choice]}

    def _choice(self, number: int, result: Generated) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number}
        if self._asked.chat:
            choice["message"] = {"role": "assistant", "content": result.text, "refusal": None}
        else:
            prompt = self._asked.requests[number // self._asked.requests[0].n].prompt
            choice["text"] = prompt + result.text if self._asked.echo else result.text
        entries = result.logprobs
        choice["logprobs"] = None if entries is None else self._logprobs(number, entries)
        return choice | _ended(result.finish_reason)

    def _usage(self, results: Sequence[Generated]) -> dict[str, int]:
        new, prompt = sum(len(result.tokens) for result in results), self._asked.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
        }

    def _logprobs(self, number: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
        if self._asked.chat:
            return {"content": [self._chat_entry(entry) for entry in entries], "refusal": None}
        names = [self._name(entry["token"]) for entry in entries]
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(entry["text"])
        return {
            "tokens": names,
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {self._name(i): logprob for i, logprob in self._alternatives(entry)}
                | {name: entry["logprob"]}
                for name, entry in zip(names, entries, strict=True)
            ],
            "text_offset": offsets,
        }

    def _chat_entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        top = [self._token(i, logprob) for i, logprob in self._alternatives(entry)]
        return {**self._token(entry["token"], entry["logprob"]), "top_logprobs": top}

    def _alternatives(self, entry: dict[str, Any]) -> list[tuple[int, float]]:
        return [(i, logprob) for i, _, logprob in entry["top"][: self._asked.logprobs]]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {"token": self._name(token), "logprob": logprob, "bytes": list(data)}

    def _name(self, token: int) -> str:
        """A token as text; one that is a part of a character, or none, by OpenAI's notation."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode() or f"token:{token}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


_OPEN: dict[str, Any] = {"logprobs": None, "finish_reason": None}


def _ended(reason: FinishReason | None) -> dict[str, Any]:
    if reason is None:
        return {"finish_reason": None}
    cut: dict[str, Any] = {reason: True} if reason in ("interrupted", "failed") else {}
    return {"finish_reason": _REASONS[reason], **cut}
