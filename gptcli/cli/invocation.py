"""What every command knows of its own call: the arguments, the global flags, the display."""

import shlex
from dataclasses import dataclass

import typer

from gptcli.cli.display import Display


@dataclass
class Invocation:
    """One call of `gpt`; `debug` and `display.quiet` are set while the flags are read."""

    arguments: list[str]
    display: Display
    debug: bool = False

    @property
    def command(self) -> str:
        """The command line as one could type it again."""
        return shlex.join(["gpt", *self.arguments])


def invocation(context: typer.Context) -> Invocation:
    """The `Invocation` that `main` put at the root of `context`."""
    found = context.find_root().obj
    assert isinstance(found, Invocation)
    return found
