"""Tokenizers: text to token ids and back. All of them are byte-level, so every text round-trips.

Text is always encoded as ordinary text: `<|endoftext|>` inside a document is just characters.
Only this program puts the end-of-text token `eot` between documents.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from gptcli import stop
from gptcli.config.schema import TokenizerConfig
from gptcli.config.units import parse_bytes
from gptcli.data.tiktoken_tables import (
    PATTERNS,
    byte_characters,
    format_tiktoken,
    named_encoding,
    parse_tiktoken,
)
from gptcli.errors import CheckpointError, DataError

EOT_TEXT = "<|endoftext|>"
_RANKS_FILE, _META_FILE = "ranks.tiktoken", "meta.json"


class Tokenizer:
    """Byte-level BPE through `tiktoken.Encoding`; `kind` bytes is the case without merges.

    `vocab_size` counts the end-of-text token; `bos` is None (no kind has one yet). ValueError when
    `ranks` lack a byte or share an id.
    """

    def __init__(self, kind: str, ranks: dict[bytes, int], pattern: str, eot: int) -> None:
        _check_ids(ranks, eot)
        self.kind, self.pattern, self.eot = kind, pattern, eot
        self.bos: int | None = None
        self.vocab_size = max(eot, max(ranks.values())) + 1
        self._ranks = ranks
        self._tokens = {rank: token for token, rank in ranks.items()}
        self._bytes_only = len(ranks) == 256 and all(rank == t[0] for t, rank in ranks.items())
        self._encoding = tiktoken.Encoding(
            kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT_TEXT: eot}
        )

    @classmethod
    def of_bytes(cls) -> "Tokenizer":
        """256 byte tokens and `eot` = 256."""
        return cls("bytes", {bytes([b]): b for b in range(256)}, r"[\s\S]", 256)

    @property
    def start(self) -> int | None:
        """The token that stands before a document: bos where there is one, else eot."""
        return self.bos if self.bos is not None else self.eot

    @property
    def identity(self) -> str:
        """sha256 over ranks, pattern and special tokens: equal means the same tokenizer."""
        meta = json.dumps(self._meta(), sort_keys=True).encode()
        return hashlib.sha256(format_tiktoken(self._ranks) + meta).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text; no special token is ever produced."""
        return [int(i) for i in self.encode_numpy(text)]

    def encode_numpy(self, text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """`encode` as a uint32 array; releases the GIL while it works."""
        try:
            if self._bytes_only:
                return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates, which UTF-8 cannot write
            return self.encode_numpy(
                text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            )
        return ids.astype(np.uint32, copy=False)

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one token (a part of a character, maybe); none for eot and unused ids."""
        return self._tokens.get(token, b"")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """UTF-8 bytes of the tokens."""
        return b"".join(self.token_bytes(token) for token in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; incomplete characters become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def save(self, directory: Path) -> None:
        """Write tiktoken's rank file and a JSON with pattern and special tokens."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _RANKS_FILE).write_bytes(format_tiktoken(self._ranks))
        meta = {**self._meta(), "identity": self.identity}
        (directory / _META_FILE).write_text(json.dumps(meta, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read what `save` wrote. CheckpointError when it is missing or damaged."""
        try:
            meta = json.loads((directory / _META_FILE).read_text())
            ranks = parse_tiktoken((directory / _RANKS_FILE).read_bytes())
            eot = int(meta["special_tokens"][EOT_TEXT])
            tokenizer = cls(meta["kind"], ranks, meta["pattern"], eot)
            if meta.get("identity", tokenizer.identity) != tokenizer.identity:
                raise ValueError(f"{_RANKS_FILE} and {_META_FILE} do not belong together")
            return tokenizer
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory}: not a saved tokenizer: {error}") from error

    def _meta(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "pattern": self.pattern,
            "special_tokens": {EOT_TEXT: self.eot},
        }


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` names; `texts` (training pieces) are read by kind bpe only.

    Raises DataError when a named table or file is not there, `stop.Stopped` on a stop request.
    """
    if config.kind == "bytes":
        return Tokenizer.of_bytes()
    if config.kind == "tiktoken":
        named = named_encoding(config.name)
        return Tokenizer(config.name, named.ranks, named.pattern, named.eot)
    if config.kind == "file":
        return _from_file(Path(str(config.path)), config)
    return train_bpe(texts, config.vocab_size, config.pattern, parse_bytes(config.train_bytes))


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str, max_bytes: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016) of `vocab_size` tokens, eot included.

    Learns from at most `max_bytes` of UTF-8; the same texts give the same tokenizer.
    """
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Trainee
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    trainee = Trainee(BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainee.train_from_iterator(_first_bytes(texts, max_bytes), trainer=trainer)
    characters = byte_characters()
    ranks = {
        bytes(characters[c] for c in token): rank for token, rank in trainee.get_vocab().items()
    }
    return Tokenizer("bpe", ranks, PATTERNS[pattern], len(ranks))


def _check_ids(ranks: dict[bytes, int], eot: int) -> None:
    """ValueError for what tiktoken answers with a panic, which is no Exception."""
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise ValueError(f"{len(missing)} of the 256 bytes have no token")
    ids = {*ranks.values(), eot}
    if len(ids) <= len(ranks):
        raise ValueError("two tokens have the same id")
    if min(ids) < 0 or max(ids) >= 2**31:
        raise ValueError("a token id is negative or above 2^31")


def _first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        stop.raise_if_requested()
        yield text
        left -= len(text.encode("utf-8", "replace"))
        if left <= 0:
            return


def _from_file(path: Path, config: TokenizerConfig) -> Tokenizer:
    if path.is_dir():
        return Tokenizer.load(path)
    if not path.is_file():
        raise DataError(f"tokenizer.path: no file or directory {path}")
    if path.suffix != ".tiktoken":
        raise DataError(
            f"tokenizer.path: {path} is neither a saved tokenizer directory nor a .tiktoken file"
        )
    try:
        ranks = parse_tiktoken(path.read_bytes())
        return Tokenizer(
            "file", ranks, PATTERNS[config.pattern], max(ranks.values(), default=0) + 1
        )
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: not a .tiktoken file: {error}") from error
