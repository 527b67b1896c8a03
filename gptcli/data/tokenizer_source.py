"""What a published folder says of its tokenizer beyond how to encode: kept for exports."""

import json
import logging
from pathlib import Path
from typing import Any

from gptcli.data.json_file import bounded_bytes, read_json_object
from gptcli.data.published_files import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
)
from gptcli.errors import CheckpointError, DataError

log = logging.getLogger("gptcli")

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")  # of special tokens
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # how one is found in a text
_FILE = "source.json"
_MOST_BYTES = 2**20  # a chat template has some kilobytes
_MOST_FLAGGED = 2000


def read_source(folder: Path, raw: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The facts of the files beside the tokenizer.json `raw` that an export gives back.

    Names of special tokens, `chat_template`, `split_special_tokens`,
    `clean_up_tokenization_spaces`, the ids `bos_token_id` and `pad_token_id`, and under
    `token_flags` how special tokens inside a text are looked for. What is not said, or not in the
    vocabulary, is left out. DataError for a file that cannot be read.
    """
    config, names = _read(folder / TOKENIZER_CONFIG), _read(folder / SPECIAL_TOKENS)
    known = {str(token["content"]) for token in raw["added_tokens"]} | set(_names(raw))
    found: dict[str, Any] = {}
    for key in NAMES:
        value = config.get(key, names.get(key))
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value in known:
            found[key] = value
    for key in ("split_special_tokens", "clean_up_tokenization_spaces"):
        found[key] = config.get(key) is True
    for key in ("bos_token_id", "pad_token_id"):
        given = [_read(folder / name).get(key) for name in (GENERATION_CONFIG, CONFIG)]
        good = [i for i in given if type(i) is int and 0 <= i < vocab_size]
        found |= {key: good[0]} if good else {}
    flags = {
        str(token["content"]): {key: True for key in TOKEN_FLAGS if token.get(key)}
        for token in raw["added_tokens"][:_MOST_FLAGGED]
    }
    if flagged := {name: given for name, given in flags.items() if given}:
        found["token_flags"] = flagged
    template = _template(folder, config)
    return found if template is None else {**found, "chat_template": template}


def save_source(directory: Path, source: dict[str, Any]) -> None:
    """Write `source` into a saved tokenizer's directory, if there is anything to write."""
    if source:
        (directory / _FILE).write_text(json.dumps(source, indent=2) + "\n")


def load_source(directory: Path) -> dict[str, Any]:
    """What `save_source` wrote; {} where it wrote nothing. CheckpointError when it is damaged."""
    path = directory / _FILE
    return read_json_object(path, CheckpointError, 8 * _MOST_BYTES) if path.exists() else {}


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, DataError) if path.is_file() else {}


def _names(raw: dict[str, Any]) -> list[str]:
    vocabulary = raw["model"]["vocab"]
    return [entry[0] for entry in vocabulary] if isinstance(vocabulary, list) else list(vocabulary)


def _template(folder: Path, config: dict[str, Any]) -> Any:
    """A text, or the older list of named ones; None, with a warning, for what is too long."""
    path = folder / CHAT_TEMPLATE
    value = config.get("chat_template")
    try:
        if path.is_file():
            value = bounded_bytes(path, _MOST_BYTES).decode()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, str | list) or not value:
        return None
    if len(json.dumps(value)) > _MOST_BYTES:
        log.warning("%s: its chat_template is too long and is left out", folder)
        return None
    return value
