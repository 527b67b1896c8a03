"""`gpt completion`: a script that lets a shell complete `gpt`'s command lines."""

from typing import Annotated

import typer

from gptcli.cli.completion import SCRIPTS
from gptcli.cli.terminal import write_out
from gptcli.errors import ConfigError


def completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> int:
    """Print a script by which a shell completes gpt.

    Commands, configs, runs and --set keys come by the tab key. bash: eval "$(gpt completion bash)"
    in ~/.bashrc. zsh: the same with zsh, behind compinit, in ~/.zshrc. fish: gpt completion fish >
    ~/.config/fish/completions/gpt.fish
    """
    if shell not in SCRIPTS:
        raise ConfigError(f"{shell!r} is none of {', '.join(SCRIPTS)}", "gpt completion bash")
    write_out(SCRIPTS[shell])
    return 0
