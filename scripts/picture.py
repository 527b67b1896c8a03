"""Run a command in a terminal of its own and save what it showed as an SVG picture.

    python scripts/picture.py docs/generate.svg -- gpt generate --prompt "Once upon a time" -n 2
    python scripts/picture.py docs/chat.svg --type "Why?" --type /quit -- gpt chat

The command runs under a pseudo-terminal, so it draws as it does for people; the picture shows the
screen when it ended. Each --type is a line to type at a prompt; ^C is pressed three seconds after
the line before.
"""

import argparse
import os
import pty
import re
import select
import shlex
import sys
import time

from rich.console import Console
from rich.text import Text

_WIDTH = 100
_PROMPT = b"> "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", help="the .svg to write")
    parser.add_argument("--type", action="append", default=[], metavar="LINE", dest="lines")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    os.environ |= {"COLUMNS": str(_WIDTH), "TERM": "xterm-256color"}
    output, code = recorded(options.command, options.lines)
    console = Console(record=True, width=_WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text("$ " + shlex.join(options.command), style="bold"))
    for line in screen(output.decode("utf-8", "replace")):
        console.print(Text.from_ansi(line))
    console.save_svg(options.picture, title="gpt")
    return code


def recorded(command: list[str], lines: list[str]) -> tuple[bytes, int]:
    """What the command wrote while `lines` were typed, and its exit code."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvp(command[0], command)
    output, waiting = b"", list(lines)
    while True:
        interrupting = waiting[:1] == ["^C"]
        if not select.select([terminal], [], [], 0.5)[0]:
            if waiting and not interrupting and output.endswith(_PROMPT):
                os.write(terminal, waiting.pop(0).encode() + b"\r")
                typed = time.monotonic()
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other end is closed
            data = b""
        if not data:
            return output, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output += data
        if interrupting and time.monotonic() > typed + 3:
            os.write(terminal, b"\x03")
            waiting.pop(0)


def screen(output: str) -> list[str]:
    """Lines left on the screen: a carriage return or an erased line starts its line again."""
    lines = []
    for line in re.sub(r"\x1b\[\?2004[hl]\r?", "", output).replace("\r\n", "\n").split("\n"):
        kept = line.split("\x1b[2K")[-1].split("\r")[-1]
        for code in ("\x1b[?25h", "\x1b[?25l", "\x1b[1A"):
            kept = kept.replace(code, "")
        lines.append(kept)
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


if __name__ == "__main__":
    sys.exit(main())
