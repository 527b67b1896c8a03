"""`gpt config`: the shipped configs, and what a config resolves to."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli.run_flags import ConfigArgument, SetOption
from gptcli.cli.terminal import columns, write_error, write_out
from gptcli.config.shipped import shipped_config, shipped_names
from gptcli.errors import ConfigError

config_app = typer.Typer(
    name="config", help="List, show, copy and check configs.", rich_markup_mode=None
)
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
) -> int:
    """Copy a shipped config, to change it. Overwrites nothing."""
    source = _shipped(name)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigError(f"{target}: exists already", "name another DEST") from None
    except FileNotFoundError:
        folder = shlex.quote(str(target.parent))
        raise ConfigError(f"{target}: no such folder", f"mkdir -p {folder}") from None
    except OSError as error:
        raise ConfigError(f"{target}: cannot write it: {error.strerror}") from None
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


def _shipped(name: str) -> Path:
    source = shipped_config(name)
    if source is None:
        known = ", ".join(shipped_names()) or "none"
        raise ConfigError(f"{name!r} is not a shipped config", f"shipped configs: {known}")
    return source


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
