"""What the answer to a request must be: its `response_format`, `choices` or `regex`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from gptcli.config.section import Section
from gptcli.errors import ConfigError
from gptcli.generation.constraint import Constraint
from gptcli.generation.grammar import Matcher, check_spelled
from gptcli.runs.load import LoadedModel
from gptcli.serve.refusals import wrong

NAMES = ("response_format", "choices", "regex")
# Each of up to 64 texts may have its own: 40 MB at worst. Ten thousand choices need no more.
_MOST_STATES = 4_000
_TYPES = ("text", "json_object", "json_schema")


class _NamedSchema(Section):
    """OpenAI's wrapping of a schema. Every schema is kept strictly, whatever `strict` says."""

    model_config = ConfigDict(populate_by_name=False)
    given: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


def takes_time(body: bytes) -> bool:
    """Whether there may be a constraint in it, which takes up to a second to be made ready."""
    return b"\\u" in body or any(name.encode() in body for name in NAMES)


def asked_constraint(
    response_format: Any, choices: list[str] | None, regex: str | None, loaded: LoadedModel
) -> tuple[Constraint, Matcher] | None:
    """The constraint that these fields of a body ask for, and a matcher: while it is kept, those of
    the texts are made at once.

    RefusedError where they are at fault, where there are several, or where the model's tokens
    cannot spell what they ask for.
    """
    made: dict[str, Callable[[], Constraint]] = {}
    schema = _schema(response_format)
    if schema is not None:
        made["response_format"] = lambda: Constraint.json_schema(schema, "schema")
    if choices is not None:
        made["choices"] = lambda: Constraint.choices(choices, "choices")
    if regex is not None:
        made["regex"] = lambda: Constraint.regex(regex, "regex")
    if len(made) > 1:
        raise wrong(list(made)[1], f"excludes {next(iter(made))}; give one of them")
    for name, make in made.items():
        try:
            constraint = replace(make(), most_states=_MOST_STATES)
            matcher = check_spelled(constraint, loaded.tokenizer, loaded.model.vocab_size)
        except ConfigError as error:
            told = error.message.removeprefix(f"{name}: ")
            raise wrong(name, told) from None
        return constraint, matcher
    return None


def _schema(response_format: Any) -> dict[str, Any] | None:
    """The JSON schema that OpenAI's field asks for; None for plain text."""
    name = "response_format"
    if response_format in (None, {}):
        return None
    if not isinstance(response_format, dict) or response_format.get("type") not in _TYPES:
        raise wrong(name, f"not an object whose type is one of {', '.join(_TYPES)}")
    kind: Literal["text", "json_object", "json_schema"] = response_format["type"]
    known = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    for key in response_format.keys() - known:
        raise wrong(f"{name}.{str(key)[:40]}", "this field is not known", "unknown_parameter")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    try:
        return _NamedSchema.model_validate(response_format.get("json_schema")).given
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, "json_schema", *map(str, first["loc"])])[:80]
        raise wrong(where, first["msg"][:1].lower() + first["msg"][1:]) from None
