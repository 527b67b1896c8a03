"""Tokenizers: text to token ids and back.

Text is always encoded as ordinary text: `<|endoftext|>` inside a document is just characters.
Only this program puts the end-of-text token `eot` between documents.
"""

import copy
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tiktoken

from gptcli.data.bpe import learn_ranks
from gptcli.data.probe import probe_text
from gptcli.data.published_files import TOKENIZER_JSON
from gptcli.data.special_tokens import EOT_TEXT, SpecialTokens, check_ids
from gptcli.data.tiktoken_tables import PATTERNS, format_tiktoken, parse_tiktoken
from gptcli.data.tokenizer_json import TokenText, byte_ranks, parse, read_tokenizer_json
from gptcli.data.tokenizer_source import load_source, read_source, save_source
from gptcli.errors import CheckpointError, DataError

_RANKS_FILE, META_FILE = "ranks.tiktoken", "meta.json"
_BYTES_PATTERN = r"[\s\S]"

Ids: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]


class Tokenizer:
    """Byte-level BPE through `tiktoken.Encoding`; `kind` bytes is the case without merges.

    Every text round-trips (but for `nfc`). `vocab_size` counts the special tokens. `eot` stands
    between documents; it is None for published tokenizers that have none, as `bos` is where
    documents begin without one. `ends` holds all ids that end a generated text, eot among them.
    `special` tells of more special tokens than `eot`; with `nfc` texts are normalised first.
    `unknown` is the id that stands for characters without a token, where there is one.
    `source` is what a published folder says of its tokenizer (see `read_source`), for exports only.
    ValueError when `ranks` lack a byte or ids are shared.
    """

    nfc: bool = False
    unknown: int | None = None

    def __init__(
        self,
        kind: str,
        ranks: dict[bytes, int],
        pattern: str,
        eot: int | None,
        special: SpecialTokens | None = None,
        nfc: bool = False,
    ) -> None:
        if special is None:
            special = SpecialTokens({}, None) if eot is None else SpecialTokens({EOT_TEXT: eot})
        check_ids(ranks, special)
        self._set_special(kind, special, max(ranks.values()))
        self.pattern = pattern
        self.nfc, self._in_text = nfc, frozenset(special.in_text)
        self._ranks = ranks
        self._tokens = {rank: token for token, rank in ranks.items()}
        self._tokens |= {special.ids[name]: name.encode() for name in special.in_text}
        plain = len(ranks) == 256 and not nfc and not special.in_text
        self._bytes_only = plain and all(rank == t[0] for t, rank in ranks.items())
        self._encoding = tiktoken.Encoding(
            kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special.ids
        )

    def _set_special(self, kind: str, special: SpecialTokens, highest: int) -> None:
        self.kind, self.special = kind, special
        self.eot, self.bos, self.ends = special.eot_id, special.bos_id, special.ends
        self.vocab_size = max([highest, *special.ids.values()]) + 1
        self.source: dict[str, Any] = {}

    @classmethod
    def of_bytes(cls) -> "Tokenizer":
        """256 byte tokens and `eot` = 256."""
        return Tokenizer("bytes", {bytes([b]): b for b in range(256)}, _BYTES_PATTERN, 256)

    @classmethod
    def of_ids(cls, vocab_size: int) -> "Tokenizer":
        """For models that come without a tokenizer: see `IdsTokenizer`. No id ends a text."""
        return IdsTokenizer(vocab_size)

    @property
    def start(self) -> int | None:
        """The token that stands before a document: bos where there is one, else eot."""
        return self.bos if self.bos is not None else self.eot

    @property
    def prompt_start(self) -> int | None:
        """The token that prompts begin with: `start`, but none for bare tokenizers."""
        return self.bos if self.special.bare else self.start

    def begin(self, ids: list[int]) -> list[int]:
        """A prompt of the ids of a text, which begins once; one of no ids is `start`, if any."""
        start = self.prompt_start if ids else self.start
        return ids if start is None or ids[:1] == [start] else [start, *ids]

    @property
    def original_json(self) -> bytes | None:
        """The tokenizer.json that the library `tokenizers` runs; None where tiktoken runs it."""
        return None

    @cached_property
    def identity(self) -> str:
        """sha256 over what tokens there are, pattern and special tokens: equal means the same."""
        meta = json.dumps(self._meta(), sort_keys=True).encode()
        return hashlib.sha256(self._content() + meta).hexdigest()

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of ordinary text; no special token is ever produced.

        Bytes are data that are no text; DataError unless the tokenizer has a token a byte.
        """
        return [int(i) for i in self.encode_numpy(text)]

    def encode_numpy(self, text: str | bytes) -> Ids:
        """`encode` as a uint32 array; with tiktoken, the GIL is released meanwhile."""
        if isinstance(text, bytes):
            if not self._bytes_only:
                raise DataError("binary data need tokenizer.kind: bytes")
            return np.frombuffer(text, dtype=np.uint8).astype(np.uint32)
        try:
            return self._encode(text)
        except UnicodeEncodeError:  # lone surrogates, which UTF-8 cannot write
            return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def _encode(self, text: str) -> Ids:
        if self._bytes_only:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
        if self.nfc and not unicodedata.is_normalized("NFC", text):
            text = self._normalized(text)
        ids = self._encoding.encode_to_numpy(
            text, allowed_special=self._in_text, disallowed_special=()
        )
        return ids.astype(np.uint32, copy=False)

    def _normalized(self, text: str) -> str:
        """NFC of what is between added tokens, which are looked for first.

        By the library that trained the tokenizer: its Unicode version may be another than Python's.
        """
        from tokenizers import normalizers

        nfc = normalizers.NFC()
        added = f"({'|'.join(re.escape(name) for name in self._in_text)})"
        parts = re.split(added, text) if self._in_text else [text]
        parts[::2] = [nfc.normalize_str(part) for part in parts[::2]]
        return "".join(parts)

    def ending_at(self, tokens: frozenset[int]) -> "Tokenizer":
        """This one, or a copy for which `tokens` end a generated text too."""
        if tokens <= self.ends:
            return self
        ending = copy.copy(self)
        ending.ends = self.ends | tokens
        return ending

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one token (a part of a character, maybe); none for eot and unused ids."""
        return self._tokens.get(token, b"")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """UTF-8 bytes of the tokens of a text."""
        return b"".join(self.token_bytes(token) for token in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; incomplete characters become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def save(self, directory: Path) -> None:
        """Write tiktoken's rank file (or the tokenizer.json) and a JSON with pattern and special
        tokens."""
        directory.mkdir(parents=True, exist_ok=True)
        if self._file:
            (directory / self._file).write_bytes(self._content())
        meta = {**self._meta(), "identity": self.identity}
        (directory / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")
        save_source(directory, self.source)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read what `save` wrote. CheckpointError when it is missing or damaged."""
        try:
            meta = json.loads((directory / META_FILE).read_text())
            special = SpecialTokens.from_json(meta)
            tokenizer: Tokenizer
            if meta["kind"] == IdsTokenizer.KIND:
                tokenizer = IdsTokenizer(int(meta["vocab_size"]))
            elif meta["kind"] == LibraryTokenizer.KIND:
                content = (directory / LibraryTokenizer._file).read_bytes()
                tokenizer = LibraryTokenizer(content, special)
            else:
                ranks = parse_tiktoken((directory / Tokenizer._file).read_bytes())
                pattern, nfc = meta["pattern"], meta.get("normalizer") == "NFC"
                tokenizer = Tokenizer(
                    meta["kind"], ranks, pattern, special.eot_id, special, nfc=nfc
                )
            if meta.get("identity", tokenizer.identity) != tokenizer.identity:
                raise ValueError(f"{tokenizer._file} and {META_FILE} do not belong together")
            tokenizer.source = load_source(directory)
            return tokenizer
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory}: not a saved tokenizer: {error}") from error

    _file = _RANKS_FILE  # "": there is nothing to store but the JSON

    def _content(self) -> bytes:
        return format_tiktoken(self._ranks)

    def _meta(self) -> dict[str, Any]:
        meta = {"kind": self.kind, "pattern": self.pattern, **self.special.to_json()}
        return {**meta, "normalizer": "NFC"} if self.nfc else meta


class LibraryTokenizer(Tokenizer):
    """Any `tokenizer.json` through the library `tokenizers`: sentencepiece-style BPE and others.

    What its normaliser changes does not come back in decoding; the space that it puts before a text
    is left out at a text's start. ValueError when `content` is no tokenizer.json.
    """

    KIND = "hf"
    _file = TOKENIZER_JSON

    def __init__(self, content: bytes, special: SpecialTokens) -> None:
        from tokenizers import Tokenizer as Library

        raw = parse(content)
        try:
            self._library = Library.from_str(json.dumps(raw))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"the library tokenizers says: {error}") from error
        self._library.encode_special_tokens = True  # they are ordinary text inside a text
        self._json, self._text = content, TokenText(raw)
        self._bytes_only = False
        highest = max(self._library.get_vocab().values(), default=-1)
        self._set_special(self.KIND, special, highest)
        self._no_text = {special.ids[n] for n in special.ids.keys() - set(special.in_text)}
        unknown = raw["model"].get("unk_token")
        self.unknown = None if unknown is None else self._library.token_to_id(unknown)

    @property
    def original_json(self) -> bytes:
        """The tokenizer.json as it was read."""
        return self._json

    def _encode(self, text: str) -> Ids:
        text.encode()  # for lone surrogates the library has another error than UnicodeEncodeError
        try:
            ids = self._library.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing more special
            raise DataError(
                f"{TOKENIZER_JSON} cannot encode a text that begins with {text[:40]!r}: {error}"
            ) from error
        return np.array(ids, dtype=np.uint32)

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one token; U+FFFD for the unknown one, none for special and unused ids."""
        if token == self.unknown:
            return b"\xef\xbf\xbd"
        if token < 0 or token in self._no_text:
            return b""
        name = self._library.id_to_token(token)
        return b"" if name is None else self._text.bytes_of(name)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """UTF-8 bytes of the tokens of a text, without the space put before it."""
        data = super().decode_bytes(tokens)
        return data.removeprefix(b" ") if self._text.strips_start else data

    def _content(self) -> bytes:
        return self._json

    def _meta(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.special.to_json()}


class IdsTokenizer(Tokenizer):
    """No tokenizer: a text is token ids in decimal, separated by white space.

    It has neither eot nor bos, and no id ends a text, whatever eos_token_id a config names: there
    are published models without a tokenizer in which that id is an ordinary token. ValueError for a
    `vocab_size` below 1.
    """

    KIND = "ids"
    _file = ""

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"a vocabulary of {vocab_size} tokens")
        self._bytes_only = False
        self._set_special(self.KIND, SpecialTokens({}, None), vocab_size - 1)

    def _encode(self, text: str) -> Ids:
        words = text.split()
        # isascii: int() also reads digits of other scripts; it refuses numbers of 4300 digits.
        good = [word.isascii() and word.isdigit() and len(word) < 20 for word in words]
        ids = [int(word) if fine else -1 for word, fine in zip(words, good, strict=True)]
        for word, token in zip(words, ids, strict=True):
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    "the model has no tokenizer: its texts are token ids from 0 to"
                    f" {self.vocab_size - 1}, separated by spaces, but here is {word[:60]!r}",
                    hint="a prompt of ids is given as: --prompt-tokens 0,2,1",
                )
        return np.array(ids, dtype=np.uint32)

    def token_bytes(self, token: int) -> bytes:
        """The id in decimal and a space; nothing for ids outside the vocabulary."""
        return b"%d " % token if 0 <= token < self.vocab_size else b""

    def _content(self) -> bytes:
        return b""

    def _meta(self) -> dict[str, Any]:
        meta = {"kind": self.kind, "vocab_size": self.vocab_size}
        return {**meta, **self.special.to_json()}


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str, max_bytes: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` tokens, eot included, from at most `max_bytes` of the texts.

    The same texts give the same tokenizer. See `learn_ranks`.
    """
    ranks = learn_ranks(texts, vocab_size, pattern, max_bytes)
    return Tokenizer("bpe", ranks, PATTERNS[pattern], len(ranks))


def load_tokenizer_json(
    path: Path, *, needs_eot: bool = False, content: bytes | None = None
) -> Tokenizer:
    """A Hugging Face `tokenizer.json`, special tokens as it and the configs beside it say.

    `content` stands for what the file holds, which then need not be there. A tokenizer that names
    no end-of-text token has none, as a published model's must (its embedding has no row for another
    id), and is bare if it has no bos; with `needs_eot`, for training from scratch, it gets an eot
    behind its last id, and texts begin with that.
    Byte-level BPE runs in tiktoken where that gives the same ids, everything else in the library
    `tokenizers`. DataError when the file is none, or for kinds whose tokens have no text.
    """
    content, special = read_tokenizer_json(path, needs_eot, content)
    try:
        tokenizer = _fastest(content, special)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a tokenizer.json that can be used: {error}") from error
    if not needs_eot:
        tokenizer.source = read_source(path.parent, parse(content), tokenizer.vocab_size)
    return tokenizer


def _fastest(content: bytes, special: SpecialTokens) -> Tokenizer:
    library = LibraryTokenizer(content, special)
    found = byte_ranks(content, special)
    if found is not None:
        try:
            fast = Tokenizer("file", found.ranks, found.pattern, special.eot_id, special, found.nfc)
        except ValueError:  # a regex that tiktoken does not take, a byte without a token
            return library
        probe = probe_text()
        if np.array_equal(fast.encode_numpy(probe), library.encode_numpy(probe)):
            return fast
    return library
