"""How much of the validation text also occurs in the training text, in bounded memory.

After Brown et al. 2020, appendix C: texts are compared by their 13-grams of lower-case words,
without punctuation. Scripts that are written without spaces are compared by characters.
"""

import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from gptcli import stop

N_GRAM = 13
NEAR_SHARE = 0.8  # of a validation document's n-grams, for it to count as known from training
MAX_GRAMS = 4_000_000  # validation n-grams kept; of more, an even sample by hash
_PLACES = 5  # documents named in the result

Hashes: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]

# Thai to Myanmar, Khmer, kana, bopomofo and Han: no spaces stand between their words.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31f0-\u31ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
# Odd 64-bit multiplier of the rolling polynomial (from the golden ratio, as in Knuth's hashing).
_MULTIPLIER = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class OverlapCounts:
    """Validation n-grams (distinct, maybe a sample) and those found in training; validation
    documents, those that are training documents letter for letter (`exact`), and those of which
    `NEAR_SHARE` of the n-grams are found (`near`, the exact ones left out); some of their names."""

    grams: int
    found: int
    sampled: bool
    documents: int
    exact: int
    near: int
    names: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the validation n-grams found in training."""
        return self.found / self.grams if self.grams else 0.0


class Overlap:
    """Holds the n-grams of `documents` (name, text); `add` looks each training text up in them."""

    def __init__(self, documents: Sequence[tuple[str, str]], max_grams: int = MAX_GRAMS) -> None:
        self._documents = documents
        self._digests = {content_digest(text) for _, text in documents}
        self._whole: set[bytes] = set()  # digests of validation documents met in training
        self._limit = np.uint64(2**64 - 1)
        keys: Hashes = np.empty(0, dtype=np.uint64)
        parts: list[Hashes] = []
        waiting = 0
        for _, text in documents:
            stop.raise_if_requested()
            grams = self._sample(gram_hashes(words(text)))
            parts.append(grams)
            waiting += len(grams)
            if waiting > max_grams:
                keys, parts, waiting = self._merge(keys, parts, max_grams), [], 0
        self._keys = self._merge(keys, parts, max_grams)
        self._found = np.zeros(len(self._keys), dtype=np.bool_)
        self._tail: list[int] = []  # the last words of the document that is being read

    def add(self, text: str, begins: bool) -> None:
        """A training document's next piece; `begins` at its first one."""
        hashed = words(text)
        hashed = hashed if begins else self._tail + hashed
        self._tail = hashed[-(N_GRAM - 1) :]
        grams = self._sample(gram_hashes(hashed))
        if len(grams) and len(self._keys):
            places = np.searchsorted(self._keys, grams)
            places[places == len(self._keys)] = 0
            self._found[places[self._keys[places] == grams]] = True

    def end(self, digest: bytes) -> None:
        """A training document ends; `digest` is its `ContentDigest`."""
        if digest in self._digests:
            self._whole.add(digest)

    def counts(self) -> OverlapCounts:
        """What was found so far."""
        exact, near, names = 0, 0, []
        for name, text in self._documents:
            stop.raise_if_requested()
            if content_digest(text) in self._whole:
                exact += 1
            elif self._share(text) >= NEAR_SHARE:
                near += 1
            else:
                continue
            names.append(name)
        return OverlapCounts(
            grams=len(self._keys),
            found=int(self._found.sum()),
            sampled=bool(self._limit < np.uint64(2**64 - 1)),
            documents=len(self._documents),
            exact=exact,
            near=near,
            names=tuple(names[:_PLACES]),
        )

    def _share(self, text: str) -> float:
        grams = self._sample(gram_hashes(words(text)))
        if not len(grams):
            return 0.0
        return float(self._found[np.searchsorted(self._keys, grams)].mean())

    def _sample(self, grams: Hashes) -> Hashes:
        return grams[grams <= self._limit]

    def _merge(self, keys: Hashes, parts: list[Hashes], max_grams: int) -> Hashes:
        """Sorted distinct keys; halves the sampled range of hashes until they are few enough."""
        keys = np.unique(np.concatenate([keys, *parts]))
        while len(keys) > max_grams:
            self._limit = self._limit // np.uint64(2)
            keys = self._sample(keys)
        return keys


class ContentDigest:
    """Identity of a document's text, given in pieces; surrounding blanks do not count."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._blanks = ""  # that end the text so far: they count only if more follows
        self._begun = False

    def add(self, text: str) -> None:
        """The next piece."""
        text = text if self._begun else text.lstrip()
        body = text.rstrip()
        if body:
            self._hash.update((self._blanks + body).encode("utf-8", "surrogatepass"))
            self._blanks, self._begun = text[len(body) :], True
        elif self._begun:
            self._blanks += text

    def digest(self) -> bytes:
        """16 bytes for the text so far."""
        return self._hash.digest()


def content_digest(text: str) -> bytes:
    """`ContentDigest` of a whole text."""
    whole = ContentDigest()
    whole.add(text)
    return whole.digest()


def words(text: str) -> list[int]:
    """Hashes of the words of `text`, of the characters where its script has no spaces."""
    encoded = (word.encode("utf-8", "surrogatepass") for word in _WORD.findall(text.lower()))
    return [zlib.crc32(word) for word in encoded]


def gram_hashes(hashed: list[int]) -> Hashes:
    """64-bit hashes of the n-grams of a text whose words hash to `hashed`."""
    values = np.array(hashed, dtype=np.uint64)
    count = len(values) - N_GRAM + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(N_GRAM):  # wraps around modulo 2^64, as it should
        grams = grams * np.uint64(_MULTIPLIER) + values[i : i + count]
    # A polynomial of 32-bit words is not spread evenly: mix the high half in (splitmix64).
    grams = (grams ^ (grams >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    grams = (grams ^ (grams >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = grams ^ (grams >> np.uint64(31))
    return mixed
