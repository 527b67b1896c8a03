"""Conversations in files: JSON lines that finetuning reads too."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptcli.data.json_file import bounded_bytes
from gptcli.data.messages import Message, message_of, messages_of
from gptcli.errors import DataError

_MAX_BYTES = 16 * 2**20  # far above what any model reads
_SURROGATES = re.compile("[\ud800-\udfff]")


def read_conversation(path: Path) -> list[Message]:
    """The conversation in `path`: one line {"messages": [...]}, or a message a line.

    DataError, with the line, for anything else.
    """
    try:
        text = bounded_bytes(path, _MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{place}: not UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found = list[Message]()
    whole = False  # a line that holds all of it was read
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
            if whole or (found and _is_whole(row)):
                raise ValueError("a second conversation, and a file has one")
            whole = _is_whole(row)
            found += _messages(row) if whole else [message_of(row)]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: {error}") from error
    if not found:
        raise DataError(f"{path} holds no messages")
    return [Message(m.role, _SURROGATES.sub("\ufffd", m.content)) for m in found]


def conversation_bytes(messages: Sequence[Message]) -> bytes:
    """One line that `read_conversation` reads, and finetuning as a row of `task: chat`."""
    row = {"messages": [vars(message) for message in messages]}
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON line: {error.msg} at column {error.colno}") from error


def _is_whole(row: Any) -> bool:
    return isinstance(row, list) or (isinstance(row, dict) and "messages" in row)


def _messages(row: Any) -> list[Message]:
    return messages_of(row["messages"] if isinstance(row, dict) else row)
