"""Conversations as the rows of data sets spell them."""

from dataclasses import dataclass
from typing import Any

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # names in ShareGPT


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user, assistant or another name that a chat template knows."""

    role: str
    content: str


def message_of(value: Any) -> Message:
    """A message from {role, content} or {from, value}. ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"a message is not a mapping but {kind_of(value)}")
    for role, content in (("role", "content"), ("from", "value")):
        if role in value and content in value:
            who, said = value[role], value[content]
            if not isinstance(who, str) or not isinstance(said, str):
                raise ValueError(f"{role!r} and {content!r} of a message are not both text")
            return Message(_ROLES.get(who, who), said)
    fields = ", ".join(map(str, value))
    raise ValueError(f"a message has neither role and content nor from and value (has: {fields})")


def messages_of(value: Any) -> list[Message]:
    """A conversation from a list of messages, or of texts: turns of user and assistant in turn.

    ValueError for anything else, an empty list too.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"not a list of messages but {kind_of(value)}")
    if all(isinstance(turn, str) for turn in value):
        roles = ("user", "assistant")
        return [Message(roles[i % 2], text) for i, text in enumerate(value)]
    return [message_of(message) for message in value]


def kind_of(value: Any) -> str:
    """What a value is, for messages about it."""
    if value is None:
        return "null"
    return "an empty list" if value == [] else type(value).__name__
