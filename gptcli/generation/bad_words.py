"""Texts that a continuation must not contain, byte for byte, however it is cut into tokens."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from gptcli.data.tokenizer import Tokenizer


class Vocabulary:
    """The tokens that spell something, in the order of their bytes.

    Those that end a text are not among them: they add nothing to it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        ids = [token for token in range(vocab_size) if token not in tokenizer.ends]
        spelled = sorted((tokenizer.token_bytes(token), token) for token in ids)
        self._texts = [text for text, _ in spelled if text]
        self._ids = [token for text, token in spelled if text]

    def starting(self, start: bytes) -> list[int]:
        """Ids of the tokens that begin with `start`."""
        first = bisect_left(self._texts, start)
        last = bisect_right(self._texts, start, key=lambda text: text[: len(start)])
        return self._ids[first:last]

    def containing(self, word: bytes) -> list[int]:
        """Ids of the tokens that have `word` in them."""
        return [i for i, text in zip(self._ids, self._texts, strict=True) if word in text]


class BadWords:
    """Which tokens would complete a bad word after a text.

    All that matters of the text is its pending end: the longest that begins a bad word. Texts in
    different batch rows share one object. ValueError for an empty word, which every text contains.
    """

    def __init__(self, words: Sequence[str], vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
        self.words = tuple(words)
        self._words = [_bytes_of(word) for word in words]
        if b"" in self._words:
            raise ValueError("an empty bad word")
        self._vocabulary, self._tokenizer = vocabulary, tokenizer
        self._within = {i for word in self._words for i in vocabulary.containing(word)}
        self._banned: dict[bytes, Tensor] = {}  # there are as many pending ends as bytes in words

    def banned(self, pending: bytes) -> Tensor:
        """Ids (N,) int64, ascending, of the tokens that must not follow."""
        if pending not in self._banned:
            ids = set(self._within)
            for word in self._words:
                for size in range(1, len(word)):
                    if pending.endswith(word[:size]):
                        ids.update(self._vocabulary.starting(word[size:]))
            self._banned[pending] = torch.tensor(sorted(ids), dtype=torch.int64)
        return self._banned[pending]

    def advance(self, pending: bytes, token: int) -> bytes:
        """The pending end once `token` has followed."""
        text = pending + self._tokenizer.token_bytes(token)
        longest = max(map(len, self._words), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(word.startswith(text[start:]) for word in self._words):
                return text[start:]
        return b""


def _bytes_of(word: str) -> bytes:
    """UTF-8, or the bytes that an argument was before its invalid ones became lone surrogates."""
    try:
        return word.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair, from JSON: no text has it
        return word.encode("utf-8", "surrogatepass")
