"""The config of a run, with what differs from the defaults."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from gptcli.config.load import dump_config
from gptcli.config.schema import AUTO_KEYS, Config
from gptcli.reports.table import Table
from gptcli.reports.text import clip, field

MAX_CHARACTERS = 100_000
_TITLE = "Settings that differ from the defaults"
# An entry of a list of sources has the defaults of any other.
_SOURCE = re.compile(r"^(data\.(train|val)|eval\.data|finetune\.reference)\[\d+\]")


@dataclass(frozen=True)
class Settings:
    """config.yaml by its lines, each with whether it differs from the defaults, and those that do
    as a table."""

    lines: list[tuple[str, bool]]
    changed: Table | None

    @property
    def text(self) -> str:
        """config.yaml."""
        return "\n".join(line for line, _ in self.lines)


def settings(config: str) -> Settings:
    """What `config`, the text of config.yaml, sets; a damaged one is shown as it is.

    The defaults are those of the model preset and optimizer that it names. A number that is `auto`
    by default differs where it is not the one for the model's size.
    """
    config = clip(config.rstrip("\n"), MAX_CHARACTERS)
    lines = config.split("\n")
    try:
        tree = yaml.compose(config, Loader=yaml.SafeLoader)
        given = yaml.safe_load(config)
        defaults, numbers = _defaults(given)
        keys = list(_flat(given)), dict(_lines(tree))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return Settings([(line, False) for line in lines], None)
    values, places = keys
    rows, marked = [], set()
    for key, value in values:
        default = defaults.get(_SOURCE.sub("data.train[0]", key))
        if value in (default, numbers.get(key, default)) or (value == "auto" and key in numbers):
            continue
        rows.append([key, clip(field(key, value), 300), clip(field(key, default), 300)])
        marked |= {places[key]} if key in places else set()
    shown = [(line, number in marked) for number, line in enumerate(lines)]
    return Settings(shown, Table(_TITLE, ["key", "value", "default"], rows) if rows else None)


def _defaults(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Default values by key, and the numbers that `auto` stands for with the given model."""
    named = {
        "init": given.get("init"),
        "model": {"preset": given["model"]["preset"]} if "preset" in given["model"] else {},
        "optimizer": {"kind": given["optimizer"]["kind"]},
        "tokenizer": {"kind": "bpe"},
    }
    defaults = dict(_flat(yaml.safe_load(dump_config(Config.model_validate(named)))))
    shaped = Config.model_validate({**named, "model": given["model"]}).model_dump()
    automatic = [(section, key) for section, keys in AUTO_KEYS.items() for key in keys]
    numbers = {f"{section}.{key}": shaped[section][key] for section, key in automatic}
    return defaults | dict.fromkeys(numbers, "auto") | {"name": None, "init": None}, numbers


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with their sections, and values; a list of mappings is its entries."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            for number, entry in enumerate(value):
                yield from _flat(entry, f"{prefix}{key}[{number}].")
        else:
            yield f"{prefix}{key}", value


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Keys as `_flat` has them, with their lines, counted from 0."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line
            yield from _lines(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield from _lines(entry, f"{prefix[:-1]}[{number}].")
