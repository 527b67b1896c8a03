"""`--set KEY=VALUE` into the tree of a YAML file, where it is checked like the file's own keys."""

import re
from collections.abc import Sequence
from typing import Any

from gptcli.config.data_schema import SourceConfig
from gptcli.config.fields import Location, Wanted, dotted, wanted_at
from gptcli.config.scalars import Scalar, resolve, shown
from gptcli.config.schema import Config
from gptcli.config.tree import Entry, Node, Origin, Place, Problem, parse
from gptcli.errors import ConfigError

_STEP = re.compile(r"\.?([^.\[\]]+)|\[([0-9]{1,4})\]")


def apply_overrides(root: Node, overrides: Sequence[str]) -> list[Problem]:
    """Put each `KEY=VALUE` into the tree below `root` (a mapping), the last one winning.

    VALUE is YAML: a plain or quoted scalar, `[a, b]` or `{key: value}`. For keys that hold text
    it is taken as it stands unless quoted, so that `generate.prompt=Yes: 3` needs no quotes.
    Returns what cannot be put in; whether keys and values are right is checked later.
    """
    problems = []
    for rank, override in enumerate(overrides, 1):
        key, equals, value = override.partition("=")
        key = key.strip()
        place = Place(Origin(f"--set {_printable(override)}", rank, key))
        path = _path(key)
        if not equals or path is None:
            problems.append(Problem(place, "write KEY=VALUE, such as model.n_layer=6"))
            continue
        try:
            node = _value(value, wanted_at(path) or Wanted(), place)
        except ConfigError as error:
            problems.append(Problem(place, error.problems[0].removeprefix(f"{place}: ")))
            continue
        if problem := _put(root, path, node):
            problems.append(Problem(place, problem))
    return problems


def as_node(value: Any, place: Place) -> Node:
    """A value of JSON as if it were written at `place`."""
    if isinstance(value, dict):
        return Node(place, {k: Entry(place, as_node(v, place)) for k, v in value.items()})
    if isinstance(value, list):
        return Node(place, [as_node(item, place) for item in value])
    if isinstance(value, str):
        return Node(place, Scalar(value, plain=False))
    return Node(place, Scalar("null" if value is None else str(value)))


def _path(key: str) -> Location | None:
    steps: list[str | int] = []
    position = 0
    while match := _STEP.match(key, position):
        steps.append(match[1] if match[1] else int(match[2]))
        position = match.end()
    valid = position == len(key) and steps and isinstance(steps[0], str) and key[0] != "."
    return tuple(steps) if valid else None


def _value(text: str, want: Wanted, place: Place) -> Node:
    start = text.lstrip()[:1]
    holds_text = (want.text or want.sources) and not (want.whole or want.number)
    if start in ("'", '"') or (start in ("[", "{") and not want.text):
        try:
            node, problems = parse(text, place.origin)
        except ConfigError:
            if not want.text:
                raise
        else:
            if problems:
                raise ConfigError(problems[0].message)
            if node and not (want.text and isinstance(node.content, dict)):
                return node
    if holds_text and not (want.null and resolve(text.strip()) is None):
        return Node(place, Scalar(text, plain=False))
    return Node(place, Scalar(text.strip()))


def _put(node: Node, path: Location, value: Node) -> str | None:
    """Set `value` at `path` below `node`, making mappings on the way; why not, if it cannot be."""
    for depth, step in enumerate(path):
        here = dotted(path[:depth])
        _open_up(node, step, wanted_at(path[:depth]) or Wanted(), value.place)
        if isinstance(step, int):
            if not isinstance(node.content, list):
                return f"{here} is not a list"
            if step > len(node.content):
                return f"{here} has no entry {step} (entries: {len(node.content)}, counted from 0)"
            if step == len(node.content):
                node.content.append(Node(value.place, {}))
            node = node.content[step]
        else:
            if not isinstance(node.content, dict):
                return f"{here} is not a mapping of keys"
            if step not in node.content:
                node.content[step] = Entry(value.place, _default(path[: depth + 1], value.place))
            entry = node.content[step]
            if depth == len(path) - 1:
                entry.place = value.place
            node = entry.node
    node.place, node.content = value.place, value.content
    return None


def _default(path: Location, place: Place) -> Node:
    """What a key holds that is not written: its default for a list, `{}` for a section."""
    want = wanted_at(path)
    if want is None or want.section or len(path) != 2:
        return Node(place, {})
    section, key = path
    return as_node(Config().model_dump(by_alias=True)[str(section)][key], place)


def _open_up(node: Node, step: str | int, want: Wanted, place: Place) -> None:
    """Write a node out in full where its short form has no room for `step`."""
    content = node.content
    scalar = content if isinstance(content, Scalar) else None
    if node.is_null or content == {}:
        node.place, node.content = place, [] if isinstance(step, int) else {}
    elif isinstance(step, int) and want.sources and not isinstance(content, list):
        node.content = [Node(node.place, content)]
    elif isinstance(step, str) and scalar and (want.sources or want.section is SourceConfig):
        node.content = {"path": Entry(node.place, Node(node.place, scalar))}


def _printable(text: str) -> str:
    short = text if len(text) <= 80 else text[:77] + "..."
    return "".join(c if c.isprintable() else shown(c)[1:-1] for c in short)
