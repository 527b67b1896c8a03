"""What the schema says about a key: its name in YAML and the kinds of value that it takes."""

import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gptcli.config.data_schema import SourceConfig
from gptcli.config.schema import Config
from gptcli.config.section import OneOrMore

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Wanted:
    """The kinds of value that a key takes. `items` and `values` are annotations."""

    whole: bool = False
    number: bool = False
    text: bool = False
    switch: bool = False
    null: bool = False
    choices: tuple[str, ...] = ()
    section: type[BaseModel] | None = None
    items: Any = None
    values: Any = None

    @property
    def sources(self) -> bool:
        """Whether this is a list of corpora, which may be written as one string or one mapping."""
        return self.items is SourceConfig

    def describe(self) -> str:
        """The kinds in words: `a whole number or null`."""
        words = []
        if self.whole:
            words.append("a whole number")
        if self.number:
            words.append("a number")
        if self.text:
            words.append("text")
        if self.switch:
            words.append("true or false")
        if self.sources or self.section is SourceConfig:
            words.append("a source (text, or a mapping with a path)")
        elif self.section:
            words.append("a mapping of keys")
        if self.sources:
            words.append("a list of sources")
        elif self.items is not None:
            item = wanted(self.items).describe().removeprefix("one of: ")
            words.append(f"a list of {_PLURALS.get(item, item)}")
        if self.values is not None:
            words.append("a mapping")
        if self.choices:
            more = len(self.choices) > 1
            words.append(("one of: " if more else "") + ", ".join(self.choices))
        return " or ".join(words + ["null"] * self.null)


_PLURALS = {"text": "texts", "a number": "numbers", "a whole number": "whole numbers"}
_SIMPLE = {
    int: Wanted(whole=True),
    float: Wanted(number=True),
    str: Wanted(text=True),
    bool: Wanted(switch=True),
    types.NoneType: Wanted(null=True),
}


def wanted(annotation: Any) -> Wanted:
    """The kinds of value that a field with this annotation takes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        found = wanted(arguments[0])
        if any(isinstance(mark, OneOrMore) for mark in arguments[1:]):
            item = wanted(found.items)
            found = replace(found, whole=item.whole, number=item.number, text=item.text)
        return found
    if origin in (Union, types.UnionType):
        found = Wanted()
        for argument in arguments:
            part = wanted(argument)
            found = replace(found, **{k: v for k, v in vars(part).items() if v})
        return found
    if origin is Literal:
        return Wanted(choices=arguments)
    if origin is list:
        return Wanted(items=arguments[0])
    if origin is dict:
        return Wanted(values=arguments[1])
    if annotation in _SIMPLE:
        return _SIMPLE[annotation]
    return Wanted(section=annotation)


def keys_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys that a section takes in YAML."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def sections() -> dict[str, type[BaseModel]]:
    """The sections of a whole config by name."""
    found = {name: wanted(field.annotation).section for name, field in keys_of(Config).items()}
    return {name: section for name, section in found.items() if section}


def all_sections() -> dict[str, type[BaseModel]]:
    """`sections` and the mappings with keys of their own inside them: `model.rope_scaling`."""
    found = sections()
    for name, section in [*found.items()]:
        inner = {key: wanted(field.annotation).section for key, field in keys_of(section).items()}
        found |= {f"{name}.{key}": model for key, model in inner.items() if model}
    return found


def wanted_at(path: Sequence[str | int]) -> Wanted | None:
    """What stands at `path`, such as `("data", "train", 0, "path")`; None if nothing may."""
    found = Wanted(section=Config)
    for step in path:
        if isinstance(step, int):
            if found.items is None:
                return None
            found = wanted(found.items)
        else:
            # A single source may be written without the list around it.
            section = SourceConfig if found.sources else found.section
            if found.values is not None:
                found = wanted(found.values)
            elif section and step in keys_of(section):
                found = wanted(keys_of(section)[step].annotation)
            else:
                return None
    return found


def dotted(location: Location) -> str:
    """A location as users write it: `data.train[0].path`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return text.removeprefix(".")
