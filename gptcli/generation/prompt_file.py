"""Prompt files: one prompt a line, or JSON lines whose rows have settings of their own."""

import json
import logging
from dataclasses import dataclass, fields
from typing import Any

from gptcli import stop
from gptcli.config.check import check
from gptcli.config.fields import keys_of
from gptcli.config.generate_schema import CONSTRAINTS, GenerateConfig
from gptcli.config.overrides import as_node
from gptcli.config.tree import Origin, Place
from gptcli.errors import ConfigError, DataError
from gptcli.generation.constraint import read_constraint, without_constraint
from gptcli.generation.sampling import Sampling

log = logging.getLogger("gptcli")

# What a row may say; the rest of `GenerateConfig` is about all prompts together.
_SAMPLING = {field.name for field in fields(Sampling)} - {"constraint"}
_OWN = {"prompt", "prompt_tokens", "n", *_SAMPLING, *CONSTRAINTS}
_ROW_NAMES = (".jsonl", ".ndjson")
_MOST_PROBLEMS = 100
_MOST_BYTES = 10**9  # a stray `yes |` must not fill memory


@dataclass(frozen=True)
class FilePrompt:
    """A prompt of a file: where it stands, as `file:line`, and all its settings.

    Of `settings.prompt` and `settings.prompt_tokens` one is given.
    """

    where: str
    settings: GenerateConfig


def read_prompts(path: str, defaults: GenerateConfig) -> list[FilePrompt]:
    """The prompts of a UTF-8 file, in order; `defaults` hold where a row says nothing else.

    Each line that is not blank is a prompt. A file named *.jsonl or *.ndjson, and any whose lines
    are all JSON objects, has rows instead: `prompt` or `prompt_tokens`, and any of the settings in
    `_OWN`. Where only some lines are objects, they are text, with a warning. Raises ConfigError for
    a file that cannot be opened and for wrong rows (one problem each, with file:line), DataError
    for one that holds no prompts, no UTF-8 or, named *.jsonl or *.ndjson, no JSON.
    """
    lines = _lines(path)
    rows = list[tuple[Place, dict[str, Any]]]()
    problem: DataError | None = None
    for place, line in lines:
        try:
            rows.append((place, _object(place, line)))
        except DataError as error:
            problem = problem or error
    if problem is not None:
        if path.lower().endswith(_ROW_NAMES):
            raise problem
        if rows:
            log.warning(
                "%s: %d of %d lines are JSON objects, not all: every line is taken as text;"
                " name it *.jsonl for rows",
                path,
                len(rows),
                len(lines),
            )
        alone = defaults.model_copy(update={"prompt_file": None})
        return [
            FilePrompt(_where(place), alone.model_copy(update={"prompt": line}))
            for place, line in lines
        ]
    prompts, problems = [], list[str]()
    for place, row in rows:
        settings, found = _settings(place, row, defaults)
        prompts.append(FilePrompt(_where(place), settings))
        problems += found
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        raise ConfigError(
            problems[:_MOST_PROBLEMS] + [f"{path}: and {more} more problems"] * (more > 0)
        )
    return prompts


def read_bytes(path: str) -> bytes:
    """What the file holds. Raises ConfigError where it cannot be read, or has no end, and
    `stop.Stopped`."""
    try:
        with open(path, "rb") as file:
            data = stop.read_to_end(file.fileno(), _MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"prompt_file: cannot read {path}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"prompt_file: {path} has more than {_MOST_BYTES:,} bytes; split it")
    return data


def _lines(path: str) -> list[tuple[Place, str]]:
    """The lines that are not blank, without their ends."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 at byte {error.start} of the file",
            hint=f"convert it, as: iconv -f latin1 -t utf-8 {path}",
        ) from error
    # Not splitlines(), which also cuts at U+2028 and other characters inside a prompt.
    lines = [
        (Place(Origin(path), number), line.removesuffix("\r"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise DataError(f"{path}: no prompts in it (one a line)")
    return lines


def _object(place: Place, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{_where(place)}:{error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{_where(place)}: not valid JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise DataError(f'{_where(place)}: not a JSON object such as {{"prompt": "Once"}}')
    return row


def _settings(
    place: Place, row: dict[str, Any], defaults: GenerateConfig
) -> tuple[GenerateConfig, list[str]]:
    """The settings of a row, checked as the section generate: of a config, and what is wrong."""
    shared = [key for key in row if key in keys_of(GenerateConfig) and key not in _OWN]
    problems = [f"{place}: {key} is the same for all prompts: remove it here" for key in shared]
    try:
        json.dumps(row, ensure_ascii=False).encode()  # fails for halves of characters
        own = GenerateConfig.model_validate(row)
    except ValueError:  # the slower way also converts, as 1e3 to 1000, and finds words
        config, found = check(as_node({"generate": row}, place))
        problems += map(str, found)
        own = defaults if config is None else config.generate
    if problems:
        return defaults, problems
    if (own.prompt is None) == (own.prompt_tokens is None):
        problems.append(f"{place}: needs either prompt or prompt_tokens")
    if own.logprobs and not defaults.json_lines:
        problems.append(f"{place}: logprobs needs --json, which has room for them")
    given: dict[str, Any] = {"prompt": None, "prompt_tokens": None, "prompt_file": None}
    given |= {key: getattr(own, key) for key in row}
    if not set(CONSTRAINTS) & row.keys():
        return defaults.model_copy(update=given), problems
    try:
        return read_constraint(without_constraint(defaults).model_copy(update=given)), problems
    except ConfigError as error:
        return defaults, [*problems, *(f"{place}: {problem}" for problem in error.problems)]


def _where(place: Place) -> str:
    return f"{place.origin.label}:{place.line}"
