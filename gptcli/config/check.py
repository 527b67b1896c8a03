"""A tree of written values to a checked `Config`, with every problem where it was written."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gptcli.config import suggest
from gptcli.config.fields import Location, Wanted, dotted, keys_of, sections, wanted
from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.config.scalars import Scalar, Unreadable, fit, shown
from gptcli.config.schema import Config
from gptcli.config.tree import Entry, Node, Place, Problem

# pydantic's error -> the limit's name in its context, and our words. For flags too.
LIMITS = {
    "greater_than": ("gt", "must be above"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
    "too_short": ("min_length", "needs at least this many entries:"),
    "too_long": ("max_length", "takes at most this many entries:"),
}
_WHOLE_NUMBER = re.compile(r"[-+]?[0-9]+")
_ENOUGH = 200  # problems after which suggestions, which take time, are no longer looked for


def check(root: Node) -> tuple[Config | None, list[Problem]]:
    """The config that `root` describes, or None and all problems with it.

    Sections are checked one by one, so that a problem in one does not hide another's; then rules
    between sections are, as far as these are sound.
    """
    checker = _Checker(root.place)
    if not isinstance(root.content, dict):
        what = "a list" if isinstance(root.content, list) else "a single value"
        message = f"expected a mapping of sections such as model: and training:, got {what}"
        return None, [Problem(root.place, message)]
    values = checker.mapping(root.content, Config, ())
    config = checker.validate(values)
    return (None if checker.problems else config), checker.problems


class _Checker:
    """Remembers what was written where while values go through pydantic."""

    def __init__(self, root: Place) -> None:
        self.problems: list[Problem] = []
        self._root = root
        self._keys: dict[Location, Place] = {}
        self._nodes: dict[Location, Node] = {}
        self._wanted: dict[Location, Wanted] = {}

    def mapping(
        self, entries: dict[str, Entry], model: type[BaseModel], at: Location
    ) -> dict[str, Any]:
        """Values of the keys that `model` has; others are problems."""
        known = keys_of(model)
        values = {}
        for key, entry in entries.items():
            if key in known:
                values[key] = self._entry(entry, known[key].annotation, (*at, key))
        for key, entry in entries.items():
            if key in known:
                continue
            meant = suggest.Suggestion()
            if len(self.problems) < _ENOUGH:
                meant = suggest.for_key(key, dotted(at), known)
            inside = f" in {dotted(at)}" if at else ""
            self._add(entry.place, f"unknown key {shown(key)}{inside}{meant.text}")
            name = meant.stand_in
            if not name or name in values:
                continue
            # Its value is checked as that of the key that was meant, to report all at once.
            annotation = known[name].annotation
            if isinstance(entry.node.content, dict) or not wanted(annotation).section:
                values[name] = self._entry(entry, annotation, (*at, name))
        return values

    def validate(self, values: dict[str, Any]) -> Config | None:
        """Check `values`: sections, then keys of the top level, then all together."""
        bad: set[str] = set()  # sections, and keys of sections as model.n_head
        sound = {}
        for name, model in sections().items():
            if name not in values:
                continue
            value = values.pop(name)
            try:
                sound[name] = model.model_validate({} if value is None else value)
            except ValidationError as error:
                errors = error.errors(include_url=False)
                self._report(errors, (name,))
                wrong = {str(e["loc"][0]) for e in errors if e["loc"]}
                rest = self._rest(name, model, value, wrong)
                bad |= {name} if rest is None else {f"{name}.{key}" for key in wrong}
                sound |= {} if rest is None else {name: rest}
        if isinstance(shape := sound.get("model"), ModelConfig):
            self._report_unused(shape)
        try:
            Config.model_validate(values)
        except ValidationError as error:
            errors = error.errors(include_url=False)
            self._report(errors, ())
            values = {k: v for k, v in values.items() if k not in {e["loc"][0] for e in errors}}
        try:
            return Config.model_validate({**values, **sound})
        except ValidationError as error:
            for message in _rules(error.errors(include_url=False)):
                keys = [key.split(".") for key in _dotted_keys(message)]
                if not bad & {part for key in keys for part in (key[0], ".".join(key[:2]))}:
                    self._add(self._blame(message, ()), message)
        return None

    def _rest(
        self, name: str, model: type[BaseModel], value: Any, wrong: set[str]
    ) -> BaseModel | None:
        """A section without its wrong keys, for the rules between the others; its own rules that
        these break are reported. None where nothing can be said of the others."""
        if not isinstance(value, dict) or not wrong or "preset" in wrong:
            return None
        try:
            return model.model_validate({k: v for k, v in value.items() if k not in wrong})
        except ValidationError as error:
            for message in _rules(e for e in error.errors(include_url=False) if not e["loc"]):
                if not wrong & set(re.findall(r"\w+", message)):
                    self._add(self._blame(message, (name,)), f"{name}: {message}")
            return None

    def _entry(self, entry: Entry, annotation: Any, at: Location) -> Any:
        self._keys[at] = entry.place
        return self._value(entry.node, wanted(annotation), at)

    def _value(self, node: Node, want: Wanted, at: Location) -> Any:
        """A plain value for pydantic, converted as far as `want` says how."""
        self._nodes[at], self._wanted[at] = node, want
        if isinstance(node.content, Scalar):
            return fit(node.content, want)
        if isinstance(node.content, list):
            item = Wanted() if want.items is None else wanted(want.items)
            return [self._value(n, item, (*at, i)) for i, n in enumerate(node.content)]
        if want.sources:  # one source, written without the list
            return [self._value(node, wanted(want.items), (*at, 0))]
        if want.section:
            return self.mapping(node.content, want.section, at)
        item = Wanted() if want.values is None else wanted(want.values)
        return {k: self._value(e.node, item, (*at, k)) for k, e in node.content.items()}

    def _report(self, errors: list[ErrorDetails], at: Location) -> None:
        """Add pydantic's errors, one for each value: branches of a union count as one."""
        grouped: dict[Location, list[ErrorDetails]] = defaultdict(list)
        for error in errors:
            where = (*at, *error["loc"])
            if error["type"] == "missing":
                owner = self._known(where[:-1])
                self._add_at(owner, f"needs the key '{where[-1]}'")
            elif error["type"] == "value_error" and not error["loc"]:
                for message in _rules([error]):
                    self._add(self._blame(message, at), f"{dotted(at)}: {message}")
            else:
                grouped[self._known(where)].append(error)
        for where, group in grouped.items():
            message = _message(group, self._wanted[where], self._nodes[where])
            if where == ("model", "preset") and group[0]["type"] == "value_error":
                message += _known_presets(group[0]["input"])
            self._add_at(where, message)

    def _report_unused(self, shape: ModelConfig) -> None:
        """Keys of the model that were written and would be without effect."""
        for key, choice in shape.unused.items():
            at = ("model", *key.split("."))
            if at in self._nodes and not self._nodes[at].is_null:
                self._add(self._keys[at], f"{dotted(at)} has no effect with {choice}; remove it")

    def _known(self, where: Location) -> Location:
        while where and where not in self._nodes:
            where = where[:-1]
        return where

    def _add_at(self, where: Location, message: str) -> None:
        place = self._nodes[where].place
        name = "" if place.origin.key == dotted(where) else f"{dotted(where)}: "
        self._add(place, name + message)

    def _add(self, place: Place, message: str) -> None:
        self.problems.append(Problem(place, message))

    def _blame(self, message: str, section: Location) -> Place:
        """Where to report a broken rule: at a --set of a key that it names, else in the file."""
        if section:
            keys = [(*section, word) for word in re.findall(r"\w+", message)]
        else:
            keys = [tuple(key.split(".")) for key in _dotted_keys(message)]
        places = [self._nodes[key].place for key in keys if key in self._nodes]
        if overrides := [place for place in places if place.origin.rank]:
            return max(overrides, key=lambda place: place.origin.rank)
        homes = [self._keys[key[:1]] for key in [section, *keys] if key[:1] in self._keys]
        return (homes if section else places + homes + [self._root])[0]


def _rules(errors: Iterable[ErrorDetails]) -> list[str]:
    """The messages of rules between keys, which the schema raises one a line."""
    texts = [str(error["ctx"]["error"]) for error in errors if error["type"] == "value_error"]
    return [line for text in texts for line in text.splitlines()]


def _dotted_keys(message: str) -> list[str]:
    return re.findall(r"\b[a-z]\w*\.[a-z]\w*", message)


def _message(errors: list[ErrorDetails], want: Wanted, node: Node) -> str:
    """One message for a value that pydantic refuses, perhaps once for each branch of a union."""
    for error in errors:
        if isinstance(error["input"], Unreadable):
            return error["input"].problem
    for error in errors:
        kind, value = error["type"], error["input"]
        if kind in LIMITS:
            name, words = LIMITS[kind]
            got = len(value) if isinstance(value, list) else _written(node, value)
            limit = error["ctx"][name]
            return f"{words} {f'{limit:g}' if isinstance(limit, float) else limit}, got {got}"
        if kind == "finite_number":
            return f"must be a finite number, got {_written(node, value)}"
        if kind == "value_error":
            return str(error["ctx"]["error"])
    return _wrong_kind(errors[0]["input"], want, node)


def _wrong_kind(value: Any, want: Wanted, node: Node) -> str:
    expected = want.describe()
    if want.choices:
        wrong = shown(value) if isinstance(value, str) else _kind(value, node)
        return f"expected {expected}; got {wrong}{_near(value, want.choices)}"
    message = f"expected {expected}, got {_kind(value, node)}"
    if want.text and isinstance(value, (bool, int, float)) and isinstance(node.content, Scalar):
        return f"{message}; quote it: {shown(node.content.text)}"
    if want.whole and isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value):
        return f"{message}; remove the quotes"
    if want.items is not None and isinstance(value, str) and not want.sources:
        item = wanted(want.items)
        return f"{message}; write [{shown(value)}]" if item.text or item.choices else message
    return message


def _near(value: Any, choices: Iterable[str]) -> str:
    word = str(value).lower() if isinstance(value, bool) else value
    near = suggest.for_value(word, choices) if isinstance(word, str) else None
    return f"; did you mean '{near}'?" if near else ""


def _known_presets(word: str) -> str:
    """The preset that was probably meant: those of a family, else the nearest, else all."""
    word = word.lower()
    family = [name for name in PRESETS if name == word or name.startswith(f"{word}-")]
    near = "" if family else _near(word, PRESETS)
    return near or f"; one of: {', '.join(family or PRESETS)}"


def _written(node: Node, value: Any) -> str:
    """A number as the user wrote it."""
    return node.content.text if isinstance(node.content, Scalar) else str(value)


def _kind(value: Any, node: Node) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {_written(node, value)}"
    if isinstance(value, str):
        return f"the text {shown(value)}"
    return "a list" if isinstance(value, list) else "a mapping"
