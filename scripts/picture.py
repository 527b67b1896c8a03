"""Run a command in a terminal of its own and save what it showed as an SVG picture.

    python scripts/picture.py docs/generate.svg -- gpt generate --prompt "Once upon a time" -n 2

The command runs under a pseudo-terminal, so it draws as it does for people; the picture shows the
screen when it ended.
"""

import argparse
import os
import pty
import shlex
import sys

from rich.console import Console
from rich.text import Text

_WIDTH = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", help="the .svg to write")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    chunks: list[bytes] = []

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        chunks.append(data)
        return data

    os.environ |= {"COLUMNS": str(_WIDTH), "TERM": "xterm-256color"}
    status = pty.spawn(options.command, read)
    console = Console(record=True, width=_WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text("$ " + shlex.join(options.command), style="bold"))
    for line in screen(b"".join(chunks).decode("utf-8", "replace")):
        console.print(Text.from_ansi(line))
    console.save_svg(options.picture, title="gpt")
    return os.waitstatus_to_exitcode(status)


def screen(output: str) -> list[str]:
    """Lines left on the screen: a carriage return or an erased line starts its line again."""
    lines = []
    for line in output.replace("\r\n", "\n").split("\n"):
        kept = line.split("\x1b[2K")[-1].split("\r")[-1]
        for code in ("\x1b[?25h", "\x1b[?25l", "\x1b[1A"):
            kept = kept.replace(code, "")
        lines.append(kept)
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


if __name__ == "__main__":
    sys.exit(main())
