"""From a prompt's text to the token ids that the model continues."""

import logging
import re
from typing import Any, Literal

from gptcli.data.special_tokens import EOT_TEXT
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError

log = logging.getLogger("gptcli")


def encode_prompt(
    tokenizer: Tokenizer, text: str | bytes, allow_special: bool = False
) -> list[int]:
    """Token ids of a document that begins with `text`, document start included.

    The start is the tokenizer's `prompt_start`; an empty text is `start` alone. With
    `allow_special`, `<|endoftext|>` in the text is the token of that name, or else the eot token;
    without, it is ordinary text. Bytes are a document that is no text, for tokenizers with a token
    a byte. Raises ConfigError when nothing is left to start from, or when the tokenizer has no eot
    to allow, and DataError for a text that is no ids where the model has no tokenizer.
    """
    parts: list[Any] = [text]
    if allow_special:
        parts = text.split(EOT_TEXT) if isinstance(text, str) else text.split(EOT_TEXT.encode())
    special = tokenizer.special.ids.get(EOT_TEXT, tokenizer.eot)
    ids = tokenizer.encode(parts[0])
    for part in parts[1:]:
        if special is None:
            raise ConfigError(f"--allow-special: the tokenizer has no {EOT_TEXT} token")
        ids += [special, *tokenizer.encode(part)]
    ids = tokenizer.begin(ids)
    if not ids:
        raise ConfigError(
            "the prompt is empty and the tokenizer has no token to start a document with",
            hint="give a prompt of at least one character",
        )
    return ids


def fit_prompt(
    ids: list[int], block_size: int, truncate: Literal["left", "error"], *, warn: bool = True
) -> list[int]:
    """The last `block_size` ids, with a warning where `warn` says so.

    Raises ConfigError for more of them when `truncate` is error.
    """
    if len(ids) <= block_size:
        return ids
    counts = f"the prompt has {len(ids)} tokens, the model's block_size is {block_size}"
    if truncate == "error":
        raise ConfigError(counts, hint="shorten it, or let --truncate left drop its beginning")
    if warn:
        log.warning("%s: its first %d tokens are dropped", counts, len(ids) - block_size)
    return ids[-block_size:]


def replace_surrogates(text: str) -> str:
    """`text` with lone surrogates (from arguments that were no UTF-8) as U+FFFD, and a warning."""
    replaced, count = re.subn("[\ud800-\udfff]", "\ufffd", text)
    if count:
        log.warning("the prompt is not valid UTF-8: %d characters became U+FFFD", count)
    return replaced
