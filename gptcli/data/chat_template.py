"""Conversations as tokens, by a chat template, for finetuning, chat and serving.

The template is rendered with a placeholder for each message. Its own text is encoded with special
tokens, each message as ordinary text, and the token lists are joined: whatever a message says, it
cannot forge the tokens that tell who speaks. A template that tells it in plain text, as the ones
that come with this program do, cannot be guarded so: there a message may imitate other turns, which
`ChatTokens.imitated` tells.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptcli.data.messages import Message
from gptcli.data.templates import CHAT_TEMPLATES, DEFAULT_CHAT
from gptcli.data.tokenizer import Tokenizer
from gptcli.data.tokenizer_source import NAMES
from gptcli.errors import ConfigError, DataError

_ROLE = re.compile(r"\w{1,40}")
# For templates that tell the model the date: rows are the same tokens on every day, after a resume
# and in an evaluation too. The one that Llama 3's templates name where they know no other.
_TODAY = datetime(2024, 7, 26)


@dataclass(frozen=True)
class AnswerEnd:
    """What follows an answer: the `tokens` that the template ends it with, and the `texts` with
    which it begins another turn, where it tells in plain text who speaks."""

    tokens: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as tokens; `assistant` says which are those of the assistant's messages, with
    what ends each of them.

    `last` is where the assistant's last message begins (without one, the end), `before` the text
    up to there. `imitated`: a message has a line like one by which the template, in plain text,
    tells who speaks.
    """

    tokens: list[int]
    assistant: list[bool]
    last: int
    before: str
    imitated: bool = False


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which some templates mark what the assistant says: no text itself."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # as jinja2 declares it, a set

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """The chat template `template`, else the one that came with the tokenizer, else a plain one.

    ConfigError when it is no Jinja template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        own = template if template is not None else published_template(tokenizer)
        self._plain = own is None or own in CHAT_TEMPLATES.values()
        text = CHAT_TEMPLATES[DEFAULT_CHAT] if own is None else own
        # As transformers sets it up, for which published templates are written.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=not self._plain,
            lstrip_blocks=not self._plain,
            keep_trailing_newline=self._plain,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _TODAY.strftime
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is no Jinja template: {error}") from error
        special = tokenizer.special
        source = {name: tokenizer.source[name] for name in NAMES if name in tokenizer.source}
        self._variables = {"bos_token": special.bos or "", "eos_token": special.eot or "", **source}
        names = sorted(special.ids, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        self._text = text

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> ChatTokens:
        """The conversation, with `add_generation_prompt` up to where the assistant speaks next.

        DataError when the template refuses the messages, leaves one out or changes it (blanks
        around it aside).
        """
        for message in messages:
            if not _ROLE.fullmatch(message.role):  # the template writes it, special tokens and all
                raise DataError(f"the role {message.role[:40]!r} is no word")
        stem, number = "MessageX0N", 0
        while any(stem in m.content or stem in m.role for m in messages) or stem in self._text:
            number += 1
            stem = f"MessageX{number}N"
        stand_ins = [
            Message(m.role, f"{stem}{i}E" if m.content.strip() else "")
            for i, m in enumerate(messages)
        ]
        rendered = self._render(stand_ins, add_generation_prompt)
        parts: list[Any] = re.split(f"{stem}(\\d+)E", rendered)
        parts[1::2] = [int(number) for number in parts[1::2]]
        spoken = [i for i, m in enumerate(messages) if m.content.strip()]
        if sorted(parts[1::2]) != spoken:
            raise DataError("the chat template leaves out a message, or has one twice")
        contents = [m.content if m.content.strip() else "" for m in messages]
        given = [Message(m.role, text) for m, text in zip(messages, contents, strict=True)]
        whole = self._render(given, add_generation_prompt)
        if whole != _joined(parts, contents):
            contents = [content.strip() for content in contents]
        if whole != _joined(parts, contents):
            raise DataError("the chat template changes the text of a message")
        return self._join(parts, messages, contents)

    def answer_end(self) -> AnswerEnd:
        """Where a model that goes on from an answer would speak for others; read off a conversation
        of three messages, and nothing where the template refuses that."""
        contents = ("QuestionX1E", "AnswerX2E", "QuestionX3E")
        roles = ("user", "assistant", "user")
        talk = [Message(role, text) for role, text in zip(roles, contents, strict=True)]
        try:
            rendered = self._render(talk, True)
        except DataError:
            return AnswerEnd()
        parts = re.split("|".join(contents), rendered)
        if len(parts) != len(contents) + 1:
            return AnswerEnd()
        behind = self._special.split(parts[2]) if self._special else [parts[2]]
        ends = {self._tokenizer.special.ids[name] for name in behind[1:2]}
        texts = [behind[0].rstrip()] if ends else []
        for part in (parts[2], parts[1]):
            plain = (self._special.split(part)[-1] if self._special else part).rstrip()
            line = part.rstrip().rpartition("\n")[2]
            if plain.endswith(line):  # else it has special tokens, which tell who speaks
                texts += [plain, f"\n{line}" if "\n" in plain else plain]
        return AnswerEnd(frozenset(ends), tuple(dict.fromkeys(filter(str.strip, texts))))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[vars(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._variables,
            )
        except Exception as error:  # the template is somebody's program: whatever it raises
            raise DataError(f"the chat template: {error}") from error

    def _join(
        self, parts: list[Any], messages: Sequence[Message], contents: list[str]
    ) -> ChatTokens:
        """Tokens of template text (even places of `parts`) and numbered messages (odd ones)."""
        tokens: list[int] = []
        assistant: list[bool] = []
        last = None
        text = before = ""
        speaks = False
        for place, part in enumerate(parts):
            if place % 2 == 0:
                ids = self._encode_template(part)
                if place == 0 and self._plain:
                    ids = self._tokenizer.begin(ids)
                trained = self._length_of_end(ids) if speaks else 0
                text += part
            else:
                ids = self._tokenizer.encode(contents[part])
                speaks = messages[part].role == "assistant"
                trained = len(ids) if speaks else 0
                if speaks:
                    last, before = len(tokens), text
                text += contents[part]
            tokens += ids
            assistant += [True] * trained + [False] * (len(ids) - trained)
        if last is None:
            last, before = len(tokens), text
        return ChatTokens(tokens, assistant, last, before, self._imitated(parts, contents))

    def _imitated(self, parts: list[Any], contents: list[str]) -> bool:
        """Whether a message has a line that begins as the template's plain text before one."""
        plain = [p for p in parts[:-1:2] if not (self._special and self._special.search(p))]
        turns = tuple(line for p in plain for line in p.strip().splitlines()[-1:])
        return any(line.startswith(turns) for text in contents for line in text.splitlines())

    def _length_of_end(self, ids: list[int]) -> int:
        """How many of the tokens behind an answer belong to it: up to one that ends texts."""
        ends = [i for i, token in enumerate(ids) if token in self._tokenizer.ends]
        return ends[0] + 1 if ends else 0

    def _encode_template(self, text: str) -> list[int]:
        """Tokens of the template's own text, in which names of special tokens are these tokens."""
        if self._special is None:
            return self._tokenizer.encode(text)
        pieces = self._special.split(text)
        flags = self._tokenizer.source.get("token_flags", {})
        for place in range(1, len(pieces), 2):  # tokens that take the blanks beside them along
            flag = flags.get(pieces[place], {})
            if flag.get("lstrip"):
                pieces[place - 1] = pieces[place - 1].rstrip()
            if flag.get("rstrip"):
                pieces[place + 1] = pieces[place + 1].lstrip()
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                ids.append(self._tokenizer.special.ids[piece])
            elif piece:
                ids += self._tokenizer.encode(piece)
        return ids


def published_template(tokenizer: Tokenizer) -> str | None:
    """The chat template that came with the tokenizer: of several the one named `default`."""
    template = tokenizer.source.get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _joined(parts: list[Any], contents: list[str]) -> str:
    return "".join(contents[part] if place % 2 else part for place, part in enumerate(parts))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
