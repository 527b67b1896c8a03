"""YAML and --set to a checked, frozen `Config`, and a `Config` back to YAML."""

import difflib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptcli import portable, stop
from gptcli.config.check import check
from gptcli.config.data_schema import TokenizerConfig
from gptcli.config.model_schema import BESIDE_INIT, ModelConfig
from gptcli.config.overrides import apply_overrides
from gptcli.config.presets import PRESETS
from gptcli.config.scalars import resolve
from gptcli.config.schema import Config
from gptcli.config.shipped import shipped_config, shipped_names
from gptcli.config.tree import MAX_BYTES, Entry, Node, Origin, Place, Problem, parse
from gptcli.errors import ConfigError

log = logging.getLogger("gptcli")

SCHEMA_TITLE = "config of gptcli"
_MOST_PROBLEMS = 100


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config; `path` is what to show for it; `given` are the keys that the user wrote.

    `given` holds top-level keys and sections (`tokenizer`) and the keys of sections
    (`tokenizer.kind`), whether from the file or from --set.
    """

    config: Config
    path: str
    given: frozenset[str]


def load_config(
    reference: str | None, overrides: Sequence[str] = (), base: str = "defaults"
) -> LoadedConfig:
    """Load a YAML file or a shipped config by name (`small`), changed by `KEY=VALUE` overrides.

    Without a reference, all keys have their defaults and `base` is the path that is shown.

    Raises:
        ConfigError: no such file, or it is not a valid config; one line a problem, in the order
            of the file's lines and then of the overrides.
    """
    if reference is None:
        shown, root = base, Node(Place(Origin(base)), {})
        problems: list[Problem] = []
    else:
        path = _find(reference)
        shown = str(path)
        root, problems = _read(path)
    if isinstance(root.content, dict):
        problems += apply_overrides(root, overrides)
        problems += _settled_by_init(root.content)
    config, given = _checked(root, problems, shown), frozenset(_given(root))
    shape_given = config.init is None or {"model.block_size", "model.rope_scaling"} <= given
    if shape_given and (idle := config.model.idle_scaling):
        raise ConfigError(f"{shown}: {idle}")
    block_given = config.init is None or "model.block_size" in given
    if block_given and "model.window" in given and config.model.idle_window:
        log.warning(f"{config.model.idle_window}; 0 means all tokens")
    for key, reason in unused_keys(config).items():
        if key in given:
            log.warning("%s: %s has no effect with %s", shown, key, reason)
    return LoadedConfig(config, shown, given)


def load_resolved(path: Path) -> Config:
    """The whole config that `dump_config` wrote, as a checkpoint holds it.

    Beside its `init` it has the tokenizer and shape that came from there. Raises ConfigError.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        raise ConfigError(f"{path} is missing or no regular file")
    root, problems = _read(path)
    return _checked(root, problems, str(path))


def dump_config(config: Config, *, loadable: bool = False) -> str:
    """The whole config as YAML, which `load_resolved` reads back to an equal one.

    A config with `init` holds the tokenizer and shape that came from there, which `load_config`
    refuses beside it: `loadable` leaves them out, but for what was given beside `init`. Numbers
    that wait for that model's shape are `auto`.
    """
    values = config.model_dump(by_alias=True)
    for section, key in config.open_keys:
        values[section][key] = "auto"
    for key in unused_keys(config):
        *sections, name = key.split(".")
        inside = values
        for section in sections:
            inside = inside[section]
        del inside[name]
    if loadable and config.init is not None:
        del values["tokenizer"]
        kept = {"dropout", *given_beside_init(config)}
        values["model"] = {key: value for key, value in values["model"].items() if key in kept}
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def given_beside_init(config: Config) -> dict[str, Any]:
    """The model's keys that replace what `init` brings, with their values."""
    given = config.model.model_fields_set
    return {key: getattr(config.model, key) for key in BESIDE_INIT if key in given}


def unused_keys(config: Config) -> dict[str, str]:
    """Keys that what is chosen elsewhere leaves without effect -> that choice."""
    kind = config.tokenizer.kind
    reads = {
        "bpe": ("vocab_size", "pattern", "train_bytes"),
        "tiktoken": ("name",),
        "file": ("path", "pattern"),
        "bytes": (),
    }[kind]
    keys = [key for key in TokenizerConfig.model_fields if key not in ("kind", *reads)]
    unused = {f"tokenizer.{key}": f"tokenizer.kind {kind}" for key in keys}
    if config.optimizer.kind == "adamw":
        for key in ("adamw_lr", "embedding_lr", "momentum"):
            unused[f"optimizer.{key}"] = "optimizer.kind adamw"
    schedule = config.schedule.kind
    if schedule != "wsd":
        unused["schedule.decay_ratio"] = f"schedule.kind {schedule}"
    if schedule == "constant":
        unused["schedule.min_lr_ratio"] = "schedule.kind constant"
    if config.data.val is not None:
        unused["data.val_fraction"] = "data.val"
    for section, found in (("model", config.model.unused), ("finetune", config.finetune.unused)):
        unused |= {f"{section}.{key}": choice for key, choice in found.items()}
    return unused


def config_schema() -> str:
    """The JSON schema of the YAML, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    whole = schema | Config.model_json_schema() | {"title": SCHEMA_TITLE}
    return json.dumps(whole, indent=2, ensure_ascii=False)


def _find(reference: str) -> Path:
    path = Path(reference)
    name = reference if reference and reference.isprintable() else repr(reference)
    try:
        if path.is_file():
            return path
        if shipped := shipped_config(reference):
            return shipped
        if reference and path.is_dir():
            inside = path / "config.yaml"
            hint = f"use {inside}" if inside.is_file() else "name a YAML file"
            raise ConfigError(f"{name}: is a directory, not a config", hint)
        if reference and path.exists():  # a pipe, such as <(...) or /dev/stdin
            return path
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {_reason(error)}") from None
    names = shipped_names()
    hint = f"shipped configs: {', '.join(names)}"
    if reference in PRESETS:
        hint = f"it is a preset of the model: gpt pretrain small --set model.preset={reference}"
    elif near := difflib.get_close_matches(path.stem[:64], names, n=1):
        hint = f"did you mean the shipped config '{near[0]}'?"
    raise ConfigError(f"{name}: no such config file", hint)


def _read(path: Path) -> tuple[Node, list[Problem]]:
    try:
        # Without O_NONBLOCK, to open a pipe to which nobody writes could not be stopped.
        descriptor = os.open(path, os.O_RDONLY | portable.NO_WAIT | portable.PLAIN)
        try:
            data = stop.read_to_end(descriptor, MAX_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{path}: {_reason(error)}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: above {MAX_BYTES:,} bytes, too large for a config")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8 text"
        raise ConfigError(message, "save the file as UTF-8") from None
    root, problems = parse(text, Origin(str(path)))
    if root is None:
        raise ConfigError(f"{path}:1:1: expected a mapping of sections, got an empty file")
    return root, problems


def _checked(root: Node, problems: list[Problem], shown: str) -> Config:
    config, found = check(root)
    problems = sorted(problems + found, key=lambda problem: problem.order)
    if config is None or problems:
        lines = list(dict.fromkeys(str(problem) for problem in problems))
        more = len(lines) - _MOST_PROBLEMS
        if more > 0:
            lines[_MOST_PROBLEMS:] = [f"{shown}: and {more} more problems"]
        raise ConfigError(lines)
    return config


def _settled_by_init(entries: dict[str, Entry]) -> list[Problem]:
    """Keys that are refused beside `init`, whose tokenizer and shape are taken."""
    init = entries.get("init")
    if init is None or init.node.is_null:
        return []
    settled = [("tokenizer", entries["tokenizer"])] if "tokenizer" in entries else []
    model = entries["model"].node.content if "model" in entries else {}
    if isinstance(model, dict):
        # The rule for embedding_file is the schema's, with its own reason.
        known = ModelConfig.model_fields.keys() - {*BESIDE_INIT, "embedding_file"}
        settled += [(f"model.{key}", model[key]) for key in model if key in known]
    message = "comes with the model that init names; remove it"
    return [Problem(entry.place, f"{key}: {message}") for key, entry in settled]


def _reason(error: OSError | ValueError) -> str:
    return f"cannot read it: {getattr(error, 'strerror', None) or error}"


def _given(root: Node) -> list[str]:
    assert isinstance(root.content, dict)
    keys = []
    for name, entry in root.content.items():
        keys.append(name)
        if isinstance(entry.node.content, dict):
            keys += [f"{name}.{key}" for key in entry.node.content]
    return keys


class _Dumper(yaml.SafeDumper):
    """Quotes text that would load back as something else, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML quotes what YAML 1.1 reads as another type; `1e3` is a number to our reader only.
    style = None if isinstance(resolve(text), str) else "'"
    if any(line_break in text for line_break in "\x85\u2028\u2029"):  # folded to spaces, else
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
