"""Makes docs/cli.md and docs/config.md: every command with its flags, every key of the YAML.

    python scripts/reference.py [--check]

Both are read from the code: the commands' signatures and docstrings, and the config's schema.
`--check` writes nothing: exit code 1 if a file is old.
"""

import argparse
import importlib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.models import ArgumentInfo

from gptcli.cli import main as cli
from gptcli.config.data_schema import SourceConfig
from gptcli.config.fields import keys_of, wanted
from gptcli.config.schema import AUTO_KEYS, Config

DOCS = Path(__file__).parents[1] / "docs"
_CLI = """\
# Commands

Every command of `gpt`, its arguments and flags, as `gpt COMMAND --help` has them. Made by
`python scripts/reference.py` from the code. The keys that `--set` takes are in
[config.md](config.md).
"""
_CONFIG = """\
# Config

Every section and key of the YAML, its values and its default. Made by
`python scripts/reference.py` from the schema; `gpt config schema` prints that for editors,
`gpt config show CONFIG` what a config comes to, and `--set SECTION.KEY=VALUE` changes one key.
"""
_TYPES = {str: "text", int: "whole number", float: "number", Path: "path", bool: "flag"}
_EVERYWHERE = (  # which main.py gives to every command
    ("--debug", "Show tracebacks of errors."),
    ("--quiet", "Only warnings and errors."),
    ("-h, --help", "Show the command's help and exit."),
)
_SOURCES = "Sources"


@dataclass(frozen=True)
class Command:
    """A command: its words behind `gpt` and the function that it is."""

    name: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Parameter:
    """An argument or flag: what it is called and stands for, its type, default and help."""

    name: str
    kind: str
    default: str
    text: str
    argument: bool
    required: bool


def commands() -> list[Command]:
    """All commands, in the order of `gpt --help`."""
    found = []
    for name, (module, attribute) in (cli._COMMANDS | cli._GROUPS).items():
        entry = getattr(importlib.import_module(f"gptcli.cli.{module}"), attribute)
        if name in cli._COMMANDS:
            found.append(Command(name, entry))
            continue
        for info in entry.registered_commands:
            found.append(Command(f"{name} {info.name}", info.callback))
    return found


def parameters(command: Command) -> list[Parameter]:
    """The arguments of a command, then its flags."""
    hints = get_type_hints(command.function, include_extras=True)
    found = []
    for name, given in inspect.signature(command.function).parameters.items():
        if get_origin(hints[name]) is not Annotated:
            continue  # Typer's context
        annotation, info = get_args(hints[name])[:2]
        if not getattr(info, "hidden", False):
            found.append(_parameter(name, annotation, info, given.default))
    return sorted(found, key=lambda p: not p.argument)


def _parameter(name: str, annotation: Any, info: Any, default: Any) -> Parameter:
    argument = isinstance(info, ArgumentInfo)
    required = default is inspect.Parameter.empty
    text = " ".join((info.help or "").split())
    match = re.search(r" \[([^\]]+)\]$", text)
    if match:
        text = text[: match.start()]
    known = None if required or default in (None, False) else str(default)
    known = "on" if default is True else known
    # Of an Annotated flag the first of its names stands where the default was.
    names = [n for n in (info.default, *(info.param_decls or ())) if isinstance(n, str)]
    flag = ", ".join(n for n in names if n.startswith("-"))
    metavar = f" {info.metavar}" if info.metavar else ""
    return Parameter(
        info.metavar or name.upper() if argument else flag + metavar,
        _kind(annotation, info.min, info.max),
        known or (match[1] if match else ""),
        text,
        argument,
        required,
    )


def _kind(annotation: Any, least: float | None, most: float | None) -> str:
    """Text, a number, ...; of `T | None` that of T, and a list's items may be repeated."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (a for a in get_args(annotation) if a is not types.NoneType)
    if get_origin(annotation) is list:
        return f"{_TYPES[get_args(annotation)[0]]}, repeatable"
    words = [_TYPES[annotation]]
    words += [f"from {least:g}"] if least is not None else []
    words += [f"to {most:g}"] if most is not None else []
    return " ".join(words)


def cli_page() -> str:
    """docs/cli.md."""
    lines = [_CLI, "| Command | |", "|-|-|"]
    for command in commands():
        lines.append(
            _row(f"[gpt {command.name}](#{_anchor('gpt ' + command.name)})", _first(command))
        )
    lines += ["", "## Everywhere", "", "| Flag | |", "|-|-|"]
    lines += [_row(f"`{flag}`", text) for flag, text in _EVERYWHERE]
    lines += [_row("`gpt --version`", "Show the version."), "", "## Exit codes", ""]
    lines += ["| Code | |", "|-|-|"]
    for part in " ".join(cli.EXIT_CODES_HELP.partition(":")[2].rstrip(".").split()).split("; "):
        codes, text = re.fullmatch(r"([\d, ]*\d) (.*)", part).groups()  # type: ignore[union-attr]
        lines.append(_row(codes, text))
    for command in commands():
        lines += ["", *_section(command)]
    return "\n".join(lines) + "\n"


def _first(command: Command) -> str:
    return inspect.cleandoc(command.function.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def _section(command: Command) -> Iterator[str]:
    found = parameters(command)
    names = [p.name if p.required else f"[{p.name}]" for p in found if p.argument]
    yield from (f"## gpt {command.name}", "")
    yield from (f"`{' '.join(['gpt', command.name, '[OPTIONS]', *names])}`", "")
    yield from (inspect.cleandoc(command.function.__doc__ or ""), "")
    if not found:
        return
    yield from ("| | Type | Default | |", "|-|-|-|-|")
    for p in found:
        default = "required" if p.required else p.default
        yield _row(f"`{p.name}`", p.kind, default, p.text)


def config_page() -> str:
    """docs/config.md."""
    lines = [_CONFIG, "| Section | |", "|-|-|"]
    sections = dict(_sections("", Config))
    for name, model in sections.items():
        lines.append(_row(f"[{name}](#{_anchor(name)})", inspect.cleandoc(model.__doc__ or "")))
    for name, model in sections.items():
        lines += ["", f"## {name}", "", inspect.cleandoc(model.__doc__ or ""), ""]
        lines += ["| Key | Values | Default | |", "|-|-|-|-|"]
        prefix = "" if model is Config else f"{name}."
        lines += [_key(prefix, key, field) for key, field in keys_of(model).items()]
    return "\n".join(lines) + "\n"


def _sections(name: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """A section by its name and those inside it; sources, which several keys hold, once."""
    yield name or "The whole", model
    for key, field in keys_of(model).items():
        inner = _inner(field)
        if inner is SourceConfig:
            if key == "train":
                yield from _sections(_SOURCES, inner)
        elif inner is not None:
            yield from _sections(f"{name}.{key}".removeprefix("."), inner)


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds, or a list of them."""
    found = wanted(field.annotation)
    return SourceConfig if found.sources else found.section


def _key(prefix: str, key: str, field: FieldInfo) -> str:
    found, inner = wanted(field.annotation), _inner(field)
    text = field.description or ""
    if inner is not None:
        name = _SOURCES if inner is SourceConfig else prefix + key
        link = f"[{name}](#{_anchor(name)})"
        text = f"{text}; see {link}" if text else f"see {link}"
    limits = _limits(field.annotation, field.metadata)
    free = replace(found, choices=(), null=False).describe()
    values = [" ".join([free, *limits])] if free else []
    values += [", ".join(f"`{choice}`" for choice in found.choices)] if found.choices else []
    values += ["null"] if found.null else []
    return _row(f"`{key}`", " or ".join(values), _default(prefix, key, field), text)


def _limits(annotation: Any, marks: list[Any]) -> list[str]:
    """The bounds of a number in words, wherever in the annotation they stand."""
    found = []
    for mark in marks:
        found += _limits(None, mark.metadata) if isinstance(mark, FieldInfo) else []
        for name, word in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "to")):
            bound = getattr(mark, name, None)
            if bound is not None and not (name == "lt" and bound >= 2**63):
                found.append(f"{word} {bound if isinstance(bound, int) else f'{bound:g}'}")
    arguments = list(get_args(annotation))
    if get_origin(annotation) is Annotated:
        return found + _limits(arguments[0], arguments[1:])
    if get_origin(annotation) in (Union, types.UnionType, list):
        for argument in arguments:
            found += _limits(argument, [])
    return list(dict.fromkeys(found))


def _default(prefix: str, key: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if (key in AUTO_KEYS.get(prefix.rstrip("."), ())) or value is PydanticUndefined:
        return "`auto`"
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, list) and value and isinstance(value[0], SourceConfig):
        return f"`{value[0].path}`"
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


def _anchor(title: str) -> str:
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _row(*cells: str) -> str:
    texts = (" ".join(cell.replace("|", "\\|").split()) for cell in cells)
    shown = (text if text.startswith("`") else text.replace("<", "&lt;") for text in texts)
    return "| " + " | ".join(shown) + " |"


def pages() -> dict[Path, str]:
    """Every generated page and what it should say."""
    return {DOCS / "cli.md": cli_page(), DOCS / "config.md": config_page()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make docs/cli.md and docs/config.md.")
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    check, code = parser.parse_args().check, 0
    for path, text in pages().items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"docs/{path.name} is old: python scripts/reference.py")
            code = 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
