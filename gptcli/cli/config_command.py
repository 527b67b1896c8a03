"""`gpt config`: the shipped configs, and what a config resolves to."""

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli.run_flags import ConfigArgument, SetOption
from gptcli.cli.terminal import columns, write_error, write_out
from gptcli.config.shipped import shipped_config, shipped_names
from gptcli.errors import ConfigError
from gptcli.runs.regular import refuse_special
from gptcli.runs.run_dir import write_atomic

config_app = typer.Typer(
    name="config", help="List, show, copy and check configs.", rich_markup_mode=None
)
SCHEMA_FILE = "gpt-config.schema.json"
_SIZES = ("n_layer", "n_head", "n_embd", "block_size")


@config_app.command("list")
def list_configs() -> int:
    """List the shipped configs, each with what it is for."""
    names = shipped_names()
    if not names:
        write_error("no configs are shipped with this installation")
        return 0
    write_out(columns([[name, _first_comment(_shipped(name))] for name in names]))
    return 0


@config_app.command("presets")
def list_presets() -> int:
    """List the model presets with their sizes.

    --set model.preset=NAME takes one.
    """
    from gptcli.config.model_schema import ModelConfig
    from gptcli.config.presets import PRESETS

    shapes = []
    for name in PRESETS:
        model = ModelConfig(preset=name)
        shapes.append([name, *(f"{key} {getattr(model, key)}" for key in _SIZES)])
    write_out(columns(shapes))
    return 0


@config_app.command("show")
def show_config(config: ConfigArgument, overrides: SetOption = None) -> int:
    """Print the whole resolved config as YAML.

    Every key is there, defaults and preset filled in.
    """
    from gptcli.config.load import dump_config, load_config

    write_out(dump_config(load_config(config, overrides or []).config, loadable=True))
    return 0


@config_app.command("copy")
def copy_config(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped config.")],
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DEST", help="A new file, or a directory. [./NAME.yaml]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DEST where it is a file already.")
    ] = False,
    schema: Annotated[
        bool,
        typer.Option(help="Write the schema for editors beside it, and name it in the first line."),
    ] = True,
) -> int:
    """Copy a shipped config with its comments, to change it.

    Editors that know the YAML language server then complete keys and mark mistakes.
    """
    source = _shipped(name)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    text = source.read_text(encoding="utf-8")
    if os.path.lexists(target):
        refuse_special(target)
        if not overwrite:
            hint = "name another DEST, or replace it: --overwrite"
            raise ConfigError(f"{target}: exists already", hint)
    if not target.parent.is_dir():
        folder = shlex.quote(str(target.parent))
        raise ConfigError(f"{target}: no such folder", f"mkdir -p {folder}")
    if schema:
        _write_schema(target.parent / SCHEMA_FILE)
        text = f"# yaml-language-server: $schema={SCHEMA_FILE}\n{text}"
    write_atomic(target, text.encode())
    write_out(f"{target}\n")
    return 0


@config_app.command("check")
def check_config(config: ConfigArgument, overrides: SetOption = None) -> int:
    """Check a config: every problem with its line, or that it is ok."""
    from gptcli.config.load import load_config

    write_out(f"{load_config(config, overrides or []).path}: ok\n")
    return 0


@config_app.command("schema")
def print_schema() -> int:
    """Print the JSON schema of the YAML, for editors."""
    from gptcli.config.load import config_schema

    write_out(config_schema() + "\n")
    return 0


def _write_schema(path: Path) -> None:
    """The schema of this version; one of another version is replaced, what is none of ours not."""
    from gptcli.config.load import SCHEMA_TITLE, config_schema

    if os.path.lexists(path):
        refuse_special(path)
        try:
            ours = json.loads(path.read_text(encoding="utf-8")).get("title") == SCHEMA_TITLE
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            hint = "move it away, or leave the schema out: --no-schema"
            raise ConfigError(f"{path}: exists already and is no schema of gpt's", hint)
    write_atomic(path, config_schema().encode() + b"\n")


def _shipped(name: str) -> Path:
    source = shipped_config(name)
    if source is None:
        known = ", ".join(shipped_names()) or "none"
        raise ConfigError(f"{name!r} is not a shipped config", f"shipped configs: {known}")
    return source


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
