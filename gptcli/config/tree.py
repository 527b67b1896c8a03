"""YAML text to a tree that remembers where every key and value was written."""

from dataclasses import dataclass, field
from typing import Any

import yaml

from gptcli.config.scalars import Scalar, resolve, shown
from gptcli.errors import ConfigError

MAX_BYTES = 1_000_000
# A few hundred keys exist. Without the limits, nine lines of aliases expand to gigabytes.
MAX_NODES = 10_000
MAX_DEPTH = 20

# What PyYAML says, and what usually causes it.
_HINTS = {
    "'\\t'": "indent with spaces, not tabs",
    "mapping values are not allowed": "quote text that contains ': ', and check the indentation",
    "while scanning an alias": "quote a value that starts with '*'",
    "while scanning an anchor": "quote a value that starts with '&'",
    "while scanning a quoted scalar": "a quote is not closed, or a backslash needs single quotes",
    "found undefined alias": "quote a value that starts with '*'",
    "cannot start any token": "quote a value that starts with a special character",
    "tag handle": "quote a value that starts with '!'",
    "could not find expected ':'": "is a ':' missing after a key on this line or the one before?",
    "but found '<block mapping start>'": "check the indentation of this line",
    "expected <block end>": "check the indentation of this line",
    "expected ',' or": "is a bracket or a comma missing?",
    "but found '<stream end>'": "is a bracket not closed?",
}


@dataclass(frozen=True)
class Origin:
    """A file (`rank` 0), or one --set (`rank` 1, 2, ... in order, `key` the key that it names)."""

    label: str
    rank: int = 0
    key: str = ""


@dataclass(frozen=True)
class Place:
    """Where something was written; line and column count from 1."""

    origin: Origin
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        if self.origin.rank:
            return self.origin.label
        return f"{self.origin.label}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One thing to correct."""

    place: Place
    message: str

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts problems as a reader meets them: the file's lines, then each --set."""
        return (self.place.origin.rank, self.place.line, self.place.column)

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass
class Node:
    """A value: a scalar, a list, or a mapping of keys."""

    place: Place
    content: "Scalar | list[Node] | dict[str, Entry]"

    @property
    def is_null(self) -> bool:
        """Whether the value was left out or written as null."""
        scalar = self.content
        return isinstance(scalar, Scalar) and scalar.plain and resolve(scalar.text) is None


@dataclass
class Entry:
    """A key's place and its value."""

    place: Place
    node: Node


def parse(text: str, origin: Origin) -> tuple[Node | None, list[Problem]]:
    """Text as a tree (None if it is empty) and its repeated keys, tags and odd keys.

    Raises:
        ConfigError: broken YAML (one problem: nothing after it can be trusted), or too much of it.
    """
    try:
        loader = _Composer(text)
        try:
            root = loader.get_single_node()
        except (ValueError, OverflowError):  # PyYAML on "\UFFFFFFFF" and %YAML 1.99999...
            message = "not valid YAML: a character code or version number is out of range"
            raise _RefusedError(message, loader.get_mark()) from None
        builder = _Builder(origin)
        for mark, tag in loader.tags:
            short = tag.replace("tag:yaml.org,2002:", "!!")
            builder.complain(mark, f"tag {shown(short)} is not allowed; write the plain value")
        return (builder.build(root, 0) if root else None), builder.problems
    except _RefusedError as refused:
        raise ConfigError(f"{_place(origin, refused.mark)}: {refused}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        character = f"character U+{ord(text[error.position]):04X} is not allowed in YAML"
        raise ConfigError(f"{Place(origin, line, column)}: {character}") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(*_syntax_error(error, origin)) from None


class _RefusedError(Exception):
    """YAML that is valid but will not be read."""

    def __init__(self, message: str, mark: yaml.Mark) -> None:
        super().__init__(message)
        self.mark = mark


class _Composer(yaml.BaseLoader):
    """Builds PyYAML's nodes, which construct nothing; stops at the limits and notes tags."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.tags: list[tuple[yaml.Mark, str]] = []
        self._count = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None):
            self.tags.append((event.start_mark, event.tag))
        self._count += 1
        _check_limits(self._count, self._depth, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _check_limits(count: int, depth: int, mark: yaml.Mark) -> None:
    if count > MAX_NODES:
        raise _RefusedError(f"more than {MAX_NODES} values, with aliases written out", mark)
    if depth > MAX_DEPTH:
        raise _RefusedError(f"nested deeper than {MAX_DEPTH} levels", mark)


@dataclass
class _Builder:
    """PyYAML's nodes to ours. An alias becomes a copy, so the limits are checked again."""

    origin: Origin
    problems: list[Problem] = field(default_factory=list)
    count: int = 0

    def build(self, node: yaml.Node, depth: int) -> Node:
        self.count += 1
        _check_limits(self.count, depth, node.start_mark)
        place = _place(self.origin, node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return Node(place, self._entries(node, depth))
        if isinstance(node, yaml.SequenceNode):
            return Node(place, [self.build(item, depth + 1) for item in node.value])
        # JSON, which is YAML, writes one emoji as the escapes of two halves.
        text = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return Node(place, Scalar(text, plain=getattr(node, "style", None) is None))

    def _entries(self, node: yaml.MappingNode, depth: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.complain(key.start_mark, "a key must be a plain word, not a list or mapping")
                continue
            entry = Entry(_place(self.origin, key.start_mark), self.build(value, depth + 1))
            if key.value not in entries:
                entries[key.value] = entry
                continue
            first = entries[key.value]
            self.complain(
                key.start_mark,
                f"repeated key {shown(key.value)}; it was given before on line {first.place.line}",
            )
            # Both halves of a section that is given twice are checked.
            if isinstance(first.node.content, dict) and isinstance(entry.node.content, dict):
                first.node.content.update(entry.node.content)
        return entries

    def complain(self, mark: yaml.Mark, message: str) -> None:
        self.problems.append(Problem(_place(self.origin, mark), message))


def _place(origin: Origin, mark: yaml.Mark) -> Place:
    return Place(origin, mark.line + 1, mark.column + 1)


def _syntax_error(error: yaml.MarkedYAMLError, origin: Origin) -> tuple[str, str | None]:
    mark = error.problem_mark or error.context_mark
    place = _place(origin, mark) if mark else Place(origin)
    what = _one_line(error.problem or "broken")
    said = f"{error.context or ''}, {what}"
    if "expected a single document" in said:
        what = "a second document starts here; keep one"
    elif mark and error.context_mark and error.context_mark.line < mark.line:
        what += f" ({error.context} on line {error.context_mark.line + 1})"
    hint = next((hint for fragment, hint in _HINTS.items() if fragment in said), None)
    return f"{place}: not valid YAML: {what}", hint


def _one_line(message: str) -> str:
    return " ".join(message.split())
