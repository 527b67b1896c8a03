"""Measures of a corpus while it is read once: sizes, scripts, lengths, repetitions, oddities.

Memory stays bounded whatever the corpus: lengths go into a histogram, lines of one document into a
limited set, examples into short lists.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from gptcli.data.overlap import ContentDigest, Overlap
from gptcli.data.tokenizer import Tokenizer

EXACT_DOCUMENTS = 10_000_000  # among which exact duplicates are looked for: about 1 GB
HEAD_CHARACTERS = 1 << 20  # of a document, by which duplicates are recognised
MAX_LINES = 1 << 18  # of a document, among which repeated ones are counted
MIN_LINES = 4  # fewer lines say nothing about repetition
LANGUAGE_DOCUMENTS = 1000  # whose language is told, about a millisecond each
NON_LETTERS = "non-letters"
EXAMPLES = 5  # places named of each kind of finding
_EXACT_LENGTHS = 1024

# As in reports: tab, newline and carriage return are text; the rest of C0, DEL and C1 are not.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

Codes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


class Lengths:
    """Document lengths in tokens: exact up to 1,024, within 1 % above."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.shortest = self.longest = 0

    def add(self, length: int) -> None:
        """Count one document."""
        self.shortest = min(self.shortest, length) if self._counts else length
        self.longest = max(self.longest, length)
        shift = max(0, length.bit_length() - _EXACT_LENGTHS.bit_length() + 1)
        self._counts[length >> shift << shift] += 1

    def quantile(self, share: float) -> int:
        """The shortest length that `share` of the documents do not exceed; 0 without documents."""
        left = share * self._counts.total()
        for length in sorted(self._counts):
            left -= self._counts[length]
            if left <= 0:
                return max(length, self.shortest)
        return 0

    def summary(self) -> dict[str, int]:
        """Minimum, median, 95th percentile and maximum."""
        return {
            "min": self.shortest,
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "max": self.longest,
        }


class ScriptTable:
    """Code points -> numbers of Unicode scripts, filled in as they are met.

    `script_of` names a character's script, None for what belongs to none (spaces, digits, marks).
    """

    def __init__(self, script_of: Callable[[str], str | None]) -> None:
        self._script_of = script_of
        self._codes = np.full(0x110000, 255, dtype=np.uint8)  # 255: not met yet
        self.names = [NON_LETTERS]

    def codes(self, text: str) -> tuple[Codes, Codes]:
        """Each character's script as an index into `names`, and its width in UTF-8 bytes."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        found = self._codes[points]
        unmet = points[found == 255]
        if len(unmet):
            for point in np.unique(unmet).tolist():
                self._codes[point] = self._code(chr(point))
            found = self._codes[points]
        widths = (1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)).astype(np.uint8)
        return found, widths

    def _code(self, character: str) -> int:
        name = self._script_of(character)
        if name is None:
            return 0
        if name not in self.names:
            if len(self.names) == 254:
                return 0
            self.names.append(name)
        return self.names.index(name)


class ScriptCounts:
    """Letters, bytes and tokens by script. A token's count is shared out over its bytes."""

    def __init__(self, tokenizer: Tokenizer, script_of: Callable[[str], str | None]) -> None:
        self._table = ScriptTable(script_of)
        lengths = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
        self._token_bytes = np.array(lengths, dtype=np.int64)
        self._sums = np.zeros((3, 255))

    def add(self, text: str, tokens: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Count a piece of text that was encoded as `tokens`."""
        scripts, widths = self._table.codes(text)
        per_byte = np.repeat(scripts, widths)
        sizes = self._token_bytes[tokens]
        if sizes.sum() == len(per_byte):
            weights = np.repeat(1.0 / np.maximum(sizes, 1), sizes)
        else:  # a tokenizer that rewrites blanks: shared out evenly over the piece
            weights = np.full(len(per_byte), len(tokens) / max(len(per_byte), 1))
        self._sums[0] += np.bincount(scripts, minlength=255)
        self._sums[1] += np.bincount(per_byte, minlength=255)
        self._sums[2] += np.bincount(per_byte, weights=weights, minlength=255)

    def summary(self) -> dict[str, dict[str, float]]:
        """By script, the most frequent first: letters (characters), bytes, tokens, bytes_per_token;
        `NON_LETTERS` (spaces, digits, punctuation) last."""
        rows = {
            name: {
                "letters": int(letters),
                "bytes": int(size),
                "tokens": round(float(tokens), 1),
                "bytes_per_token": float(size / tokens) if tokens else 0.0,
            }
            for name, (letters, size, tokens) in zip(self._table.names, self._sums.T, strict=False)
            if letters
        }
        order = sorted(rows, key=lambda name: (name == NON_LETTERS, -rows[name]["letters"]))
        return {name: rows[name] for name in order}


@dataclass
class Tally:
    """How often something was found, in how many documents, and the names of the first few."""

    count: int = 0
    documents: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, name: str, count: int) -> None:
        """`count` more in the document (or piece of it) `name`."""
        if not count:
            return
        self.count += count
        if not self.places or self.places[-1] != name:
            self.documents += 1
            if len(self.places) < EXAMPLES:
                self.places.append(name)

    def summary(self) -> dict[str, Any]:
        """For a report."""
        return {"count": self.count, "documents": self.documents, "places": self.places}


@dataclass
class _Open:
    """The document that is being read."""

    name: str
    source: int
    tokens: int = 0
    characters: int = 0
    head: list[str] = field(default_factory=list)
    digest: ContentDigest = field(default_factory=ContentDigest)
    lines: set[int] = field(default_factory=set)
    line_count: int = 0
    repeated: int = 0
    blank: bool = True
    data: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))  # that is no text


@dataclass(frozen=True)
class Probes:
    """Measures made elsewhere, each None where it does not apply: `script_of` a character,
    `duplicate` ("exact", "near" or None) of a document's text, `personal` data of a text by kind,
    `overlap` with the validation documents, `language` of a text (ISO 639-1, None if unclear)."""

    script_of: Callable[[str], str | None]
    duplicate: Callable[[str], str | None]
    personal: Callable[[str], Mapping[str, int]]
    overlap: Overlap | None
    language: Callable[[str], str | None]


class Survey:
    """Counts over the training records, given in file order to `add`, then `end`.

    Of documents that are no text (token ids, binary data) only sizes, exact duplicates and ids
    outside the vocabulary are counted; each eot in a record of token ids begins one.
    """

    def __init__(self, tokenizer: Tokenizer, block_size: int, probes: Probes) -> None:
        self._tokenizer, self._probes = tokenizer, probes
        self.block_size = block_size
        self._open: _Open | None = None
        self.documents = self.bytes = self.characters = self.tokens = 0
        self.text_bytes = self.text_tokens = 0  # of text in UTF-8 as it was encoded, without eot
        self.shorter = 0  # documents of fewer than block_size tokens
        self.lengths = Lengths()
        self.scripts = ScriptCounts(tokenizer, probes.script_of)
        self.sources: dict[int, Counter[str]] = {}
        self.empty, self.repetitive, self.controls = Tally(), Tally(), Tally()
        self.replacement = Tally()
        self.data_documents = self.largest_id = 0  # of documents that are no text
        self.data_duplicates, self.outside = Tally(), Tally()
        self._data_seen: set[bytes] = set()
        self.control_codes: Counter[str] = Counter()
        self.duplicates = {"exact": Tally(), "near": Tally()}
        self.personal: dict[str, Tally] = {}
        self.repeated_lines = self.lines = 0
        self.languages: Counter[str] = Counter()  # of the first documents

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one record."""
        if "tokens" not in record:
            self._add(record)
            return
        tokens = record["tokens"]
        begins = np.flatnonzero(tokens == self._tokenizer.eot)
        first, *others = np.split(tokens, begins)
        self._add({**record, "tokens": first})
        for document in others:
            self._add({**record, "part": 0, "bytes": 0, "tokens": document[1:]})

    def _add(self, record: Mapping[str, Any]) -> None:
        name = record["document"]
        begins = record["part"] == 0 or self._open is None or self._open.name != name
        if begins:
            self.end()
            self._open = _Open(name, record.get("source", 0))
        assert self._open is not None
        text = record.get("text")
        tokens = self._encode(record)
        self._open.tokens += len(tokens)
        self.bytes += record["bytes"]
        source = self.sources.setdefault(self._open.source, Counter())
        source["bytes"] += record["bytes"]
        source["tokens"] += len(tokens) + begins  # eot before each document
        source["documents"] += begins
        if isinstance(text, str):
            self._add_text(self._open, text, tokens, begins)
        else:
            self._add_data(self._open, tokens, begins)

    def end(self) -> None:
        """The last document ends."""
        document, self._open = self._open, None
        if document is None:
            return
        self.documents += 1
        self.tokens += document.tokens + 1
        self.lengths.add(document.tokens)
        self.shorter += document.tokens < self.block_size
        if document.tokens <= 1 or (document.characters and document.blank):
            self.empty.add(document.name, 1)
        self.lines += document.line_count
        self.repeated_lines += document.repeated
        if document.line_count >= MIN_LINES and document.repeated > 0.3 * document.line_count:
            self.repetitive.add(document.name, 1)
        if document.tokens and not document.characters:
            self._end_data(document)
        if document.head:
            if self.documents <= LANGUAGE_DOCUMENTS:
                self.languages[self._probes.language(document.head[0]) or "unclear"] += 1
            kind = self._probes.duplicate("".join(document.head))
            if kind is not None:
                self.duplicates[kind.removesuffix("_duplicates")].add(document.name, 1)
            if self._probes.overlap is not None:
                self._probes.overlap.end(document.digest.digest())

    def _encode(self, record: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[Any]]:
        if "tokens" in record:
            tokens: np.ndarray[Any, np.dtype[Any]] = record["tokens"]
            return tokens
        text = record["text"]
        if isinstance(text, bytes):
            return np.frombuffer(text, dtype=np.uint8)
        return self._tokenizer.encode_numpy(text)

    def _add_data(
        self, document: _Open, tokens: np.ndarray[Any, np.dtype[Any]], begins: bool
    ) -> None:
        self.data_documents += begins
        document.data.update(tokens.astype("<u4").tobytes())
        if len(tokens):
            self.largest_id = max(self.largest_id, int(tokens.max()))
            bad = np.count_nonzero(tokens >= self._tokenizer.vocab_size)
            self.outside.add(document.name, int(bad))

    def _end_data(self, document: _Open) -> None:
        digest = document.data.digest()
        if digest in self._data_seen:
            self.data_duplicates.add(document.name, 1)
        elif len(self._data_seen) < EXACT_DOCUMENTS:
            self._data_seen.add(digest)

    def _add_text(
        self, document: _Open, text: str, tokens: np.ndarray[Any, np.dtype[Any]], begins: bool
    ) -> None:
        if document.characters < HEAD_CHARACTERS:
            document.head.append(text[: HEAD_CHARACTERS - document.characters])
        document.characters += len(text)
        document.blank = document.blank and text.isspace()
        document.digest.add(text)
        self.characters += len(text)
        self.text_bytes += len(text.encode("utf-8", "surrogatepass"))
        self.text_tokens += len(tokens)
        self.scripts.add(text, tokens)
        self._count_lines(document, text)
        found = _CONTROL.findall(text)
        self.controls.add(document.name, len(found))
        self.control_codes.update(f"U+{ord(c):04X}" for c in found)
        self.replacement.add(document.name, text.count("\ufffd"))
        for kind, count in self._probes.personal(text).items():
            self.personal.setdefault(kind, Tally()).add(document.name, count)
        if self._probes.overlap is not None:
            self._probes.overlap.add(text, begins)

    def _count_lines(self, document: _Open, text: str) -> None:
        for line in text.splitlines():
            if line and document.line_count < MAX_LINES and not line.isspace():
                document.line_count += 1
                key = hash(line.strip())
                document.repeated += key in document.lines
                document.lines.add(key)
