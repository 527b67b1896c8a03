"""What the whole of a continuation must be: one of some texts, a regex's, a JSON schema's.

A `Constraint` is checked as it is made, before any model is loaded; grammar.py holds texts to it.
Its language is that of llguidance, which refuses what it cannot keep and never backtracks.
"""

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from gptcli import stop
from gptcli.config.generate_schema import CONSTRAINTS, GenerateConfig
from gptcli.errors import ConfigError

# What clients of a server may ask for, so that none takes its memory: OpenAI allows 120,000.
MOST_CHARACTERS = 2**18
# Levels of a schema that its references may lead through, one below the other. llguidance descends
# by recursion: at about 1,500 the stack of 8 MiB ends, and with it the process.
_MOST_LEVELS = 1000
_MOST_PARTS = 5_000  # objects, lists and required names of a schema: half a second to compile
_MOST_PATTERNS = 50  # of a schema; it compares those of property names in pairs: 600 take a minute
_MOST_JOINED = 10  # patterns that must hold together: time doubles with each, 20 take minutes
_REFERRING = ("$ref", "$dynamicRef", "anyOf", "oneOf", "allOf")  # joined with what is beside them
_LABELS = {"title", "description", "default", "examples", "deprecated", "$schema", "$id"}
_LABELS |= {"$comment", "$defs", "definitions", "discriminator", "x-guidance"}
_MOST_STATES = 50_000  # of its lexer: 300 MB at worst
# Masks must allow every token that fits, not only those that the tokenizer itself would choose.
_ALL_TOKENS = '%llguidance {"no_forcing": true}\n'
# JSON may be written in one line or indented, but not with white space for ever.
_WHITESPACE = r" |\n {0,16}"

Kind = Literal["choices", "regex", "json_schema"]


@dataclass(frozen=True)
class Constraint:
    """Made by the functions below. `text` is a JSON list of choices, a pattern or a JSON schema.

    Texts share the states of the library's lexer, about 6 KB each. Where they come to need more
    than `most_states`, they end as "failed".
    """

    kind: Kind
    text: str
    most_states: int = _MOST_STATES

    @classmethod
    def choices(cls, texts: Sequence[str], where: str = "choices") -> "Constraint":
        """One of `texts`. ConfigError, beginning with `where`, for none, an empty one or many."""
        if not texts or "" in texts:
            what = "a choice is empty" if texts else "no choices"
            raise ConfigError(f"{where}: {what}; give texts of at least one character")
        return _checked(cls("choices", _json(list(dict.fromkeys(texts)), where)), where)

    @classmethod
    def regex(cls, pattern: str, where: str = "regex") -> "Constraint":
        """A text that `pattern` matches from its beginning to its end, in the syntax of Rust's
        crate regex: close to Python's, without look-around and references back, and with the digits
        0 to 9 alone as \\d. ConfigError."""
        if not pattern:
            raise ConfigError(f"{where}: an empty pattern matches nothing but the empty text")
        _json(pattern, where)
        return _checked(cls("regex", pattern), where)

    @classmethod
    def json_schema(
        cls, schema: str | Mapping[str, Any], where: str = "json_schema"
    ) -> "Constraint":
        """JSON that is valid under `schema`, an object or its JSON. ConfigError for what is none
        and for keywords that cannot be kept."""
        parsed = _parsed(schema, where) if isinstance(schema, str) else schema
        if not isinstance(parsed, Mapping):
            raise ConfigError(f'{where}: a schema is a JSON object such as {{"type": "object"}}')
        return _checked(cls("json_schema", _json(parsed, where)), where)

    @classmethod
    def json_object(cls) -> "Constraint":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @property
    def grammar(self) -> str:
        """As llguidance reads it."""
        if self.kind == "json_schema":
            return f"{_ALL_TOKENS}start: %json {_json(_with_white_space(json.loads(self.text)))}"
        pattern = self.text if self.kind == "regex" else "|".join(map(_literal, self.texts))
        return f"{_ALL_TOKENS}start: /{library().regex_to_lark(pattern, 'd')}/"

    @property
    def texts(self) -> list[str]:
        """The choices."""
        return list(json.loads(self.text)) if self.kind == "choices" else []

    def shown(self) -> str:
        """For messages: `regex '[a-z]+'`, cut where it is long."""
        text = self.text if len(self.text) <= 80 else self.text[:77] + "..."
        return f"{self.kind} {text!r}" if self.kind == "regex" else f"{self.kind} {text}"


def constraint_of(settings: GenerateConfig) -> Constraint | None:
    """The one that `settings` ask for. ConfigError, also for a schema's file that is no schema."""
    if settings.choices is not None:
        return Constraint.choices(settings.choices)
    if settings.regex is not None:
        return Constraint.regex(settings.regex)
    if settings.json_schema is None:
        return None
    text, where = settings.json_schema, "json_schema"
    if not text.lstrip().startswith("{"):
        text, where = _file_text(text), f"json_schema: {text}"
    return _of_schema(text, where)


def read_constraint(settings: GenerateConfig) -> GenerateConfig:
    """`settings`, whose constraint is checked, with the schema itself in place of its file's name.
    ConfigError."""
    constraint = constraint_of(settings)
    if constraint is None or constraint.kind != "json_schema":
        return settings
    return settings.model_copy(update={"json_schema": constraint.text})


def without_constraint(settings: GenerateConfig) -> GenerateConfig:
    """`settings` with none, where another one takes its place."""
    return settings.model_copy(update=dict.fromkeys(CONSTRAINTS))


def library() -> Any:
    """llguidance. ConfigError where it is not installed."""
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ConfigError(
            f"choices, regex and json_schema need the package llguidance ({error})",
            hint="pip install 'gptcli[constrain]'",
        ) from error


@lru_cache
def limits(most_states: int) -> Any:
    """How much a grammar may take to compile and to follow; the rest as the library has it."""
    return library().LLParserLimits(max_lexer_states=most_states, verbose_errors=False)


def first_line(message: str) -> str:
    """What one of the library's errors says, without the grammar that it quotes."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = told[0] if told else (lines or ["refused by llguidance"])[0]
    text = re.sub(
        r'^at \d+\(\d+\): (failed to compile JSON schema: |invalid regex ".*" \(in regex\): )?',
        "",
        text,
    )
    return text.replace("Unimplemented keys:", "keywords that cannot be kept:")[:300]


def _file_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = stop.read_to_end(file.fileno(), MOST_CHARACTERS)
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"json_schema: cannot read {path[:200]}: {error.strerror}",
            hint='give a file, or the schema itself, as: {"type": "object"}',
        ) from error
    except ValueError as error:  # no UTF-8, or a name with a null
        what = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
        raise ConfigError(f"json_schema: cannot read {path[:200]!r}: {what}") from error


@lru_cache(maxsize=256)
def _of_schema(text: str, where: str) -> Constraint:  # a file may have millions of prompts
    return Constraint.json_schema(text, where)


def _checked(constraint: Constraint, where: str) -> Constraint:
    if len(constraint.text) > MOST_CHARACTERS:
        raise ConfigError(
            f"{where}: {len(constraint.text):,} characters; at most {MOST_CHARACTERS:,} are taken"
        )
    if constraint.kind == "json_schema":
        _check_size(json.loads(constraint.text), where)
    problem = _problem(constraint)
    if problem:
        raise ConfigError(f"{where}: {problem}")
    return constraint


@lru_cache(maxsize=256)
def _problem(constraint: Constraint) -> str:
    """What the library has against it; empty for nothing."""
    check: Callable[..., tuple[bool, list[str]]]
    check = library().LLMatcher.validate_grammar_with_warnings
    try:
        failed, messages = check(constraint.grammar, None, limits=limits(constraint.most_states))
    except ValueError as error:
        return first_line(str(error))
    return first_line("\n".join(messages)) if failed else ""


def _parsed(text: str, where: str) -> Any:
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{where}: more than {MOST_CHARACTERS:,} characters")
    try:
        return json.loads(text)
    except RecursionError:
        raise ConfigError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None


def _json(value: Any, where: str = "json_schema") -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeError:
        raise ConfigError(f"{where}: half of a character, which is no text") from None
    except (RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    return text


def _with_white_space(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, with our choice of white space unless it has one (`x-guidance`)."""
    given = schema.get("x-guidance", {})
    if not isinstance(given, dict):
        return schema  # which the library refuses
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE, **given}}


def _check_size(schema: Any, where: str) -> None:
    """ConfigError for a schema that would take the library's stack or seconds."""
    parts = patterns = formats = deepest = 0
    references, joined = set[str](), False
    waiting = [(schema, 1)]
    while waiting:
        part, level = waiting.pop()
        parts, deepest = parts + 1, max(deepest, level)
        if isinstance(part, dict):
            references |= {str(part[key]) for key in ("$ref", "$dynamicRef") if key in part}
            patterns += _count(part.get("patternProperties")) + ("pattern" in part)
            formats += "format" in part  # patterns, but none that are compared in pairs
            parts += _count(part.get("required"))
            joined = joined or _joins(part)
        inner = part.values() if isinstance(part, dict) else part
        waiting += [(value, level + 1) for value in inner if isinstance(value, dict | list)]
    most_patterns = _MOST_JOINED if joined else _MOST_PATTERNS
    patterns += formats if joined else 0
    for what, count, most in (
        ("parts", parts, _MOST_PARTS),
        ("patterns and formats", patterns, most_patterns),
    ):
        if count > most:
            told = " where some hold together (allOf)" if most == _MOST_JOINED else ""
            raise ConfigError(f"{where}: {count:,} {what}; at most {most:,} are taken{told}")
    if deepest * (1 + len(references)) > _MOST_LEVELS and references:
        raise ConfigError(
            f"{where}: {len(references)} references in a schema of {deepest} levels may lead"
            f" through more than {_MOST_LEVELS:,}; write some out where they are used"
        )


def _joins(part: dict[str, Any]) -> bool:
    """Whether several schemas must hold together there."""
    beside = part.keys() - _LABELS
    several = any(key in part for key in _REFERRING) and len(beside) > 1
    return several or _count(part.get("allOf")) > 1


def _count(value: Any) -> int:
    return len(value) if isinstance(value, dict | list) else 0


def _literal(text: str) -> str:
    """A pattern for `text` alone."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):x}}}" for c in text)
