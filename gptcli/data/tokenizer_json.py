"""Hugging Face's `tokenizer.json`: what it says, and whether tiktoken can do the same exactly."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcli.data.json_file import bounded_bytes, read_json_object
from gptcli.data.published_files import CONFIG, GENERATION_CONFIG, SPECIAL_TOKENS, TOKENIZER_CONFIG
from gptcli.data.special_tokens import EOT_TEXT, SpecialTokens
from gptcli.data.tiktoken_tables import GPT2_PATTERN, byte_characters
from gptcli.errors import DataError

# Configs beside tokenizer.json that speak of special tokens, by their names and by their ids.
NAMING, NUMBERING = (TOKENIZER_CONFIG, SPECIAL_TOKENS), (GENERATION_CONFIG, CONFIG)
MAX_TOKENIZER_BYTES = 64 * 2**20  # twice the largest published one, and what a checkpoint may hold

# How models call their end of text, where no file beside tokenizer.json says it.
_EOT_NAMES = (EOT_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[EOS]")
_WORD_PIECES = {"WordPiece", "CTC"}  # decoders whose tokens have no bytes of their own


@dataclass(frozen=True)
class ByteRanks:
    """A byte-level BPE as tiktoken takes it; `nfc` when texts are normalised to NFC first."""

    ranks: dict[bytes, int]
    pattern: str
    nfc: bool


def read_tokenizer_json(
    path: Path, needs_eot: bool, content: bytes | None = None
) -> tuple[bytes, SpecialTokens]:
    """The file's bytes (or `content`) and its special tokens, by it and the configs beside it.

    A tokenizer without an end-of-text token has none, or with `needs_eot` gets one behind its last
    id; one without bos is bare, but not with `needs_eot`. All the ids that the configs name as ends
    are ends. DataError when it cannot be read.
    """
    try:
        content = bounded_bytes(path, MAX_TOKENIZER_BYTES) if content is None else content
        raw = parse(content)
        ids = _vocabulary(raw) | {t["content"]: t["id"] for t in raw["added_tokens"]}
        beside = _Beside(path.parent)
        eot, bos = _eot(ids, beside), _bos(raw, ids, beside)
        if eot is None and needs_eot:
            eot, ids = EOT_TEXT, ids | {EOT_TEXT: max(ids.values(), default=-1) + 1}
        special = {str(t["content"]) for t in raw["added_tokens"] if t.get("special")}
        special |= {name for name in (eot, bos) if name is not None}
        added = {str(t["content"]) for t in raw["added_tokens"]} - special
        names = sorted(special | added, key=lambda name: (ids[name], name))
        found = {name: ids[name] for name in names}
        ends = set(beside.ids("eos_token_id")) & set(ids.values())
        more = tuple(sorted(ends - {None if eot is None else ids[eot]}))
        in_text, bare = tuple(n for n in names if n in added), bos is None and not needs_eot
        return content, SpecialTokens(found, eot, bos, in_text, more, bare)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a tokenizer.json: {_reason(error)}") from error


def parse(content: bytes) -> dict[str, Any]:
    """The JSON object with its lists in place, without settings that are not for our encoding.

    ValueError when it is none.
    """
    raw = json.loads(content)
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise ValueError("it holds no tokenizer model")
    raw["truncation"] = raw["padding"] = None
    if "dropout" in raw["model"]:
        raw["model"]["dropout"] = None  # random merges, for training translation models
    raw["added_tokens"] = raw.get("added_tokens") or []
    return raw


class TokenText:
    """What bytes a token of a tokenizer.json stands for, by its decoder.

    Byte-level: each character one byte. Else UTF-8, where a replaced character (`▁`) or the end of
    a word (`</w>`) is a space and `<0x41>` a byte.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        parts = list(flat(raw.get("decoder"), "decoders"))
        kinds = {str(part.get("type")) for part in parts}
        if kinds & _WORD_PIECES:
            raise ValueError(f"its decoder ({', '.join(sorted(kinds & _WORD_PIECES))}) is unknown")
        self._characters = byte_characters() if "ByteLevel" in kinds else None
        self._byte_tokens = "ByteFallback" in kinds
        self._replaced: list[tuple[str, str]] = []
        self.strips_start = False  # the space that encoding puts before a text
        for part in parts:
            if part.get("type") == "Replace" and "String" in part["pattern"]:
                self._replaced.append((part["pattern"]["String"], part["content"]))
            elif part.get("type") == "Metaspace":
                self._replaced.append((part.get("replacement", "▁"), " "))
                self.strips_start |= part.get("prepend_scheme", "always") != "never"
            elif part.get("type") == "Strip":
                self.strips_start |= part.get("content") == " " and part.get("start", 0) > 0
        self._suffix = next((p["suffix"] for p in parts if p.get("type") == "BPEDecoder"), None)

    def bytes_of(self, token: str) -> bytes:
        """The token's bytes."""
        if self._characters is not None and all(c in self._characters for c in token):
            return bytes(self._characters[c] for c in token)
        if self._byte_tokens and (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
            return bytes([int(match[1], 16)])
        for old, new in self._replaced:
            token = token.replace(old, new)
        if self._suffix and token.endswith(self._suffix):
            token = token.removesuffix(self._suffix) + " "
        return token.encode("utf-8", "replace")


def byte_ranks(content: bytes, special: SpecialTokens) -> ByteRanks | None:
    """The tokenizer as merge ranks where tiktoken makes the same of them, else None.

    `tokenizers` merges by the order of its list of pairs, tiktoken any two neighbours whose union
    is a token, the lowest id first. They agree when ids follow the order of the list and each token
    comes about by its pairs: the last two parts of a token then always are those of a listed pair.
    """
    raw = parse(content)
    pattern, nfc = split_pattern(raw.get("pre_tokenizer")), _is_nfc(raw.get("normalizer"))
    model = raw["model"]
    plain = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if pattern is None or nfc is None or not plain or affixes or not _is_simple(raw, special):
        return None
    vocabulary = {t: i for t, i in model["vocab"].items() if t not in special.ids}
    pairs = [_pair(merge) for merge in model["merges"]]
    characters = byte_characters()
    if any(c not in characters for token in vocabulary for c in token):
        return None
    order = [vocabulary.get("".join(pair), -1) for pair in pairs]
    if order != sorted(order) or not _merges_make_all(model, vocabulary, pairs):
        return None
    ranks = {bytes(characters[c] for c in token): i for token, i in vocabulary.items()}
    return ByteRanks(ranks, pattern, nfc)


def _merges_make_all(
    model: dict[str, Any], vocabulary: dict[str, int], pairs: list[tuple[str, str]]
) -> bool:
    """Whether each token's own characters merge into it, or all its ways to be made are listed."""
    from tokenizers.models import BPE

    merger, listed = BPE(vocab=model["vocab"], merges=pairs), set(pairs)
    for token in vocabulary:
        if len(token) == 1 or len(merger.tokenize(token)) == 1:
            continue
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        made = [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        if not model.get("ignore_merges") or not listed.issuperset(made):
            return False
    return True


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _is_simple(raw: dict[str, Any], special: SpecialTokens) -> bool:
    """Whether the added tokens that occur in text are found by one search from left to right."""
    names = special.in_text
    for token in raw["added_tokens"]:
        if token["content"] in names and any(
            token.get(key) for key in ("lstrip", "rstrip", "single_word", "normalized")
        ):
            return False
    return not any(a != b and b.startswith(a) for a in names for b in names)


def split_pattern(pre_tokenizer: Any) -> str | None:
    """The regex that cuts words before a byte-level BPE; None for other pre-tokenizers."""
    parts = list(flat(pre_tokenizer, "pretokenizers"))
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space", True):
        return None
    if len(parts) == 1:
        return GPT2_PATTERN if parts[0].get("use_regex", True) else None
    if len(parts) > 2 or parts[0].get("type") != "Split" or parts[1].get("use_regex", True):
        return None
    kept = ("Isolated", False), ("Removed", True)  # matches and what is between; matches only
    if (parts[0].get("behavior"), bool(parts[0].get("invert"))) not in kept:
        return None
    regex = parts[0]["pattern"].get("Regex")
    return regex if isinstance(regex, str) else None


def _is_nfc(normalizer: Any) -> bool | None:
    """Whether text is normalised to NFC; None for other changes of the text."""
    kinds = [part.get("type") for part in flat(normalizer, "normalizers")]
    return None if any(kind != "NFC" for kind in kinds) else bool(kinds)


def flat(part: Any, key: str) -> Iterator[dict[str, Any]]:
    """The steps of a component of a tokenizer.json, those of sequences one by one."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for inner in part[key]:
            yield from flat(inner, key)
    else:
        yield part


def _vocabulary(raw: dict[str, Any]) -> dict[str, int]:
    vocabulary = raw["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        return {token: i for i, (token, _) in enumerate(vocabulary)}
    return dict(vocabulary)


class _Beside:
    """The Hugging Face configs in a folder, as far as they speak of special tokens."""

    def __init__(self, folder: Path) -> None:
        self._named = [self._read(folder / name) for name in NAMING]
        self._numbered = [self._read(folder / name) for name in NUMBERING]

    def name(self, key: str) -> str | None:
        """The token that `key` (eos_token) names."""
        for config in self._named:
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
        return None

    def ids(self, key: str) -> list[int]:
        """The ids that `key` (eos_token_id) gives, in the order of the files."""
        found: list[Any] = []
        for config in self._numbered:
            value = config.get(key)
            found += value if isinstance(value, list) else [value]
        return [i for i in found if type(i) is int]

    def flag(self, key: str) -> bool | None:
        """A switch (add_bos_token) that is set."""
        value = self._named[0].get(key)
        return value if isinstance(value, bool) else None

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        return read_json_object(path, DataError) if path.is_file() else {}


def _eot(ids: dict[str, int], beside: _Beside) -> str | None:
    name = beside.name("eos_token")
    if name in ids:
        return name
    by_id = {i: token for token, i in ids.items()}
    numbered = [by_id[i] for i in beside.ids("eos_token_id") if i in by_id]
    return next(iter([*numbered, *(name for name in _EOT_NAMES if name in ids)]), None)


def _bos(raw: dict[str, Any], ids: dict[str, int], beside: _Beside) -> str | None:
    """The token that is put before each text, if one is."""
    wanted = beside.flag("add_bos_token")
    if wanted is False:
        return None
    for part in flat(raw.get("post_processor"), "processors"):
        if part.get("type") == "TemplateProcessing" and "SpecialToken" in part["single"][0]:
            name = part["single"][0]["SpecialToken"]["id"]
            return name if name in ids else None
    name = beside.name("bos_token") if wanted else None
    return name if name in ids else None


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
