"""Duplicate documents: the same text, or nearly the same (MinHash; Broder 1997).

Exact: the same text in Unicode NFC with white space runs as one space, by a 128-bit hash.
Near: documents as sets of 5-grams, of words, and in scripts written without spaces (Chinese,
Japanese, Thai, ...) of characters. Sketches of 128 minima (datasketch) are filed in bands; those
that share a band with an earlier kept document are compared, and at `near` or more equal minima
(the estimate of the sets' Jaccard similarity; standard error 0.035 at 0.8) the later one is a
duplicate. The result depends on the order of the documents and on nothing else: no hash is seeded
by the process or the machine.

Memory per kept document: about 0.1 KB exact; near 0.5 KB for the sketch and 0.07 KB for each of 9
(threshold 0.9) to 26 bands (0.5): 1.7 KB in all at 0.8, measured.
"""

import hashlib
import re
import unicodedata
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np

from gptcli.data import extras
from gptcli.errors import ConfigError

MINIMA = 128
SHINGLE = 5  # words or characters
_SEED = 1
# Shingles permuted at a time: 4096 x 128 x 4 bytes.
_BATCH = 4096
# Thai to Lao, Tibetan, Myanmar, Khmer, kana and Bopomofo, Han, Yi, half-width kana, rarer Han.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
_TOKENS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_ASCII_TOKENS = re.compile(rb"[0-9a-z_]+")
# Odd 64-bit constants, one for each place in a shingle (from the digits of pi, made odd).
_FACTORS = np.array(
    [
        0x243F6A8885A308D3,
        0x13198A2E03707345,
        0xA4093822299F31D1,
        0x082EFA98EC4E6C89,
        0x452821E638D01377,
    ],
    np.uint64,
)


class Duplicates:
    """Remembers documents. Not for several threads at once."""

    def __init__(self, exact: bool, near: float | None) -> None:
        """near: least Jaccard similarity of a near duplicate, above 0. Raises ConfigError for 0,
        DataError if the package datasketch is missing."""
        self._exact = exact
        self._digests: set[bytes] = set()
        self._near = _Sketches(near) if near is not None else None

    def seen(self, text: str) -> str | None:
        """The filter that finds an earlier text the same ("exact_duplicates") or alike
        ("near_duplicates"), or None; then the text is remembered. Texts of fewer than 5 words are
        only compared exactly."""
        if self._exact:
            digest = text_digest(text)
            if digest in self._digests:
                return "exact_duplicates"
            self._digests.add(digest)
        if self._near is not None:
            shingles = shingle_hashes(text)
            if len(shingles) and self._near.seen(shingles):
                return "near_duplicates"
        return None


def text_digest(text: str) -> bytes:
    """128-bit hash of the text in NFC with white space runs as one space, the same everywhere."""
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def shingle_hashes(text: str) -> np.ndarray:
    """(n,) uint32: hashes of the text's 5-grams of words or characters, without regard to case
    and punctuation; none for fewer than 5. The same on every machine."""
    words = _words(text)
    if len(words) < SHINGLE:
        return np.zeros(0, np.uint32)
    hashes = np.fromiter(map(crc32, words), np.uint64, len(words))
    n = len(words) - SHINGLE + 1
    mixed = np.zeros(n, np.uint64)
    for place, factor in enumerate(_FACTORS):
        # Each word is scrambled before the sum, or words in one place could cancel each other.
        word = hashes[place : place + n] * factor
        mixed += (word ^ (word >> np.uint64(29))) * factor
    return (mixed >> np.uint64(32)).astype(np.uint32)


def _words(text: str) -> list[bytes]:
    if text.isascii():
        return _ASCII_TOKENS.findall(text.lower().encode())
    words = _TOKENS.findall(unicodedata.normalize("NFC", text).casefold())
    return [word.encode("utf-8", "surrogatepass") for word in words]


@cache
def _bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many minima, by datasketch."""
    datasketch: Any = extras.load("datasketch", "datasketch", "filters.near_duplicates")
    # Candidates are compared anyway, so a missed one costs more than a needless one.
    lsh = datasketch.MinHashLSH(min(threshold, 0.95), num_perm=MINIMA, weights=(0.05, 0.95))
    return int(lsh.b), int(lsh.r)


class _Sketches:
    """MinHash sketches of the kept documents, filed in bands (locality-sensitive hashing).

    The bands are datasketch's for the threshold, their tables our own: its sets of keys took 4 KB a
    document beside the sketches (16 bands, measured), these 1.1 KB. A table maps a band's hash to
    the last document filed there; `_before` leads from a document to the one filed there before.
    """

    def __init__(self, threshold: float) -> None:
        if threshold <= 0:
            raise ConfigError("filters.near_duplicates must be above 0: all documents are 0 alike")
        datasketch: Any = extras.load("datasketch", "datasketch", "filters.near_duplicates")
        self._threshold = threshold
        self._bands, self._width = _bands(threshold)
        self._empty = datasketch.MinHash(MINIMA, seed=_SEED, hashfunc=int, scheme="affine32")
        self._tables: list[dict[int, int]] = [{} for _ in range(self._bands)]
        self._before = np.zeros((1024, self._bands), np.int32)
        self._minima = np.zeros((1024, MINIMA), np.uint32)
        self._size = 0

    def seen(self, shingles: np.ndarray) -> bool:
        """Whether a kept document is alike; if not, this one is kept."""
        minima = self._sketch(shingles)
        keys = self._keys(minima)
        candidates = set[int]()
        for band, key in enumerate(keys):
            document = self._tables[band].get(key, -1)
            while document >= 0:
                candidates.add(document)
                document = int(self._before[document, band])
        if candidates:
            equal = (self._minima[sorted(candidates)] == minima).mean(axis=1)
            if equal.max() >= self._threshold:
                return True
        self._keep(minima, keys)
        return False

    def _sketch(self, shingles: np.ndarray) -> np.ndarray:
        minhash = self._empty.copy()
        for start in range(0, len(shingles), _BATCH):
            minhash.update_batch(shingles[start : start + _BATCH].tolist())
        minima: np.ndarray = minhash.hashvalues
        return minima

    def _keys(self, minima: np.ndarray) -> list[int]:
        used = minima[: self._bands * self._width].astype("<u4")
        data, step = used.tobytes(), self._width * 4
        return [
            int.from_bytes(hashlib.blake2b(data[at : at + step], digest_size=8).digest(), "little")
            for at in range(0, len(data), step)
        ]

    def _keep(self, minima: np.ndarray, keys: list[int]) -> None:
        number = self._size
        if number == len(self._minima):
            self._minima = np.concatenate([self._minima, np.zeros_like(self._minima)])
            self._before = np.concatenate([self._before, np.zeros_like(self._before)])
        self._minima[number] = minima
        for band, key in enumerate(keys):
            self._before[number, band] = self._tables[band].get(key, -1)
            self._tables[band][key] = number
        self._size += 1
