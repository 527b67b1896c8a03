"""Flags over a config section: the ones given on the command line win, checked by its schema."""

from typing import Any, TypeVar

from pydantic import ValidationError

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
        raise ConfigError(
            [_problem(e["loc"], e["type"], e["msg"], e["input"]) for e in error.errors()]
        ) from None


def _problem(location: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    key = str(location[0])
    flag = _FLAGS.get(key, "--" + key.replace("_", "-"))
    if kind == "value_error":  # the schema's own words, which say all there is to say
        return f"{flag}: {message.removeprefix('Value error, ')}"
    return f"{flag}: {message[:1].lower()}{message[1:]}, not {value!r}"
