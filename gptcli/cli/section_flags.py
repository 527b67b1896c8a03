"""Flags over a config section: the ones given on the command line win, checked by its schema."""

from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gptcli.config.check import LIMITS
from gptcli.config.section import Section
from gptcli.errors import ConfigError

S = TypeVar("S", bound=Section)

_FLAGS = {"n": "-n", "json_lines": "--json"}  # the others are called as their key


def with_flags(section: S, flags: dict[str, Any]) -> S:
    """`section` with those `flags` (by key) that are not None.

    Raises ConfigError with one problem for every value that the schema refuses.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        return type(section).model_validate({**section.model_dump(), **given})
    except ValidationError as error:
        raise ConfigError([_problem(e) for e in error.errors(include_url=False)]) from None


def _problem(error: ErrorDetails) -> str:
    key, kind, message = str(error["loc"][0]), error["type"], error["msg"]
    flag = _FLAGS.get(key, "--" + key.replace("_", "-"))
    if kind == "value_error":  # the schema's own words, which say all there is to say
        return f"{flag}: {message.removeprefix('Value error, ')}"
    value, about = error["input"], error.get("ctx", {})
    if kind in LIMITS:
        name, words = LIMITS[kind]
        return f"{flag}: {words} {about[name]}, got {value}"
    if kind == "literal_error":
        return f"{flag}: expected {about['expected']}, got {value!r}"
    return f"{flag}: {message[:1].lower()}{message[1:]}, not {value!r}"
