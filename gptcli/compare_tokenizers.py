"""`gpt tokenizer show`: what several tokenizers make of one text."""

import os
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gptcli.config.data_schema import SourceConfig, TokenizerConfig
from gptcli.data.chosen_tokenizer import build_tokenizer, load_tokenizer
from gptcli.data.files import SourceFile
from gptcli.data.opening import HEAD_BYTES, open_utf8, refuse_utf16
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError
from gptcli.runs.run_dir import CHECKPOINTS, runs_root

_NAMES: tuple[str, ...] = get_args(TokenizerConfig.model_fields["name"].annotation)
_BESIDE_MODEL = "tokenizer"  # where a checkpoint keeps its tokenizer
_MIXED_SHARE = 0.01  # of the letters, from which a script has figures of its own


@dataclass(frozen=True)
class Encoded:
    """A text as one tokenizer sees it. `by_script` has bytes a token of the letters of each script,
    where there are several; `pieces` are the tokens' bytes, in order."""

    name: str
    tokenizer: Tokenizer
    tokens: list[int]
    pieces: list[bytes]
    bytes: int
    characters: int
    by_script: dict[str, float]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the text over its tokens."""
        return self.bytes / max(len(self.tokens), 1)

    def to_json(self) -> dict[str, Any]:
        """The figures, without the tokens."""
        return {
            "name": self.name,
            "kind": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
            "eot": self.tokenizer.eot,
            "bos": self.tokenizer.bos,
            "identity": self.tokenizer.identity,
            "tokens": len(self.tokens),
            "bytes_per_token": self.bytes_per_token,
            "characters_per_token": self.characters / max(len(self.tokens), 1),
            "bytes_per_token_by_script": self.by_script,
        }


def compare_tokenizers(names: Sequence[str], text: str) -> list[Encoded]:
    """`text` encoded by each of the tokenizers; see `open_tokenizer` for their names.

    Raises DataError or CheckpointError when one cannot be used.
    """
    opened = [(name, open_tokenizer(name)) for name in names]
    return [_encode(name, tokenizer, text) for name, tokenizer in opened]


def read_text(name: str) -> str:
    """The text of a file, opened as a source is (archives, byte-order marks), or of stdin for `-`.

    Bytes that are no UTF-8 become U+FFFD. Raises DataError when it cannot be read or is UTF-16.
    """
    if name == "-":
        data = sys.stdin.buffer.read()
        refuse_utf16("stdin", data[:HEAD_BYTES])
    else:
        path = os.path.expanduser(name)
        with open_utf8(SourceFile(SourceConfig(path=path), path, "text")) as content:
            data = content.read()
    return data.decode("utf-8-sig", "replace")


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes`, an encoding that tiktoken names, or a path: a saved tokenizer, a tokenizer.json or
    its folder, a .tiktoken file, a checkpoint or a run. Paths win over names."""
    for path in (Path(os.path.expanduser(name)), runs_root() / name):
        if path.is_dir():
            found = [path / _BESIDE_MODEL, *sorted(path.glob(f"{CHECKPOINTS}/*/{_BESIDE_MODEL}"))]
            return load_tokenizer(next((p for p in reversed(found) if p.is_dir()), path), "gpt4")
        if path.is_file():
            return load_tokenizer(path, "gpt4")
    if name == "bytes" or name in _NAMES:
        kind = {"kind": "bytes"} if name == "bytes" else {"kind": "tiktoken", "name": name}
        return build_tokenizer(TokenizerConfig.model_validate(kind), [])
    raise DataError(
        f"{name}: no tokenizer of this name, and no such file or directory",
        hint=f"names are bytes, {', '.join(_NAMES)}",
    )


def _encode(name: str, tokenizer: Tokenizer, text: str) -> Encoded:
    tokens = tokenizer.encode(text)
    pieces = [tokenizer.token_bytes(token) for token in tokens]
    size = len(text.encode("utf-8", "replace"))
    return Encoded(name, tokenizer, tokens, pieces, size, len(text), _by_script(text, pieces))


def _by_script(text: str, pieces: list[bytes]) -> dict[str, float]:
    """Bytes a token of the letters of each script; {} unless the letters are of several scripts.

    A token counts for its bytes in equal parts. Also {} where the tokens do not spell the text.
    """
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    lengths = lengths[lengths > 0]
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    points, which = np.unique(codes, return_inverse=True)
    scripts = [_script(chr(point)) for point in points]
    sizes = np.array([len(chr(point).encode("utf-8", "replace")) for point in points], np.int64)
    if not text or lengths.sum() != sizes[which].sum():
        return {}
    names = sorted({script for script in scripts if script})
    codes = np.array([names.index(s) if s else len(names) for s in scripts])[which]
    of_bytes = np.repeat(codes, sizes[which])
    all_bytes = np.bincount(of_bytes, minlength=len(names) + 1)[: len(names)]
    tokens = np.bincount(of_bytes, np.repeat(1 / lengths, lengths), minlength=len(names) + 1)
    letters = np.bincount(codes, minlength=len(names) + 1)[: len(names)]
    kept = np.flatnonzero(letters >= _MIXED_SHARE * letters.sum())
    if len(kept) < 2:
        return {}
    kept = kept[np.argsort(-letters[kept], kind="stable")]
    return {names[i]: float(all_bytes[i] / tokens[i]) for i in kept}


@cache
def _script(character: str) -> str:
    """The script of a letter by its Unicode name (`CJK UNIFIED IDEOGRAPH-...` is Han), else ""."""
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "").partition(" ")[0]
    return "Han" if first == "CJK" else first.capitalize()
