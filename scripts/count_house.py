"""Counts the house: modules, lines, the longest of each, and what each command imports.

    python scripts/count_house.py

What a command imports are the modules of gptcli in sys.modules after it has run, with a tiny model,
in a process of its own; lines are all lines of those files.
"""

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "--help": ["--help"],
    "pretrain": ["pretrain", "tiny", "--run-dir", "run", "--set", "training.max_steps=10"],
    "generate": ["generate", "--model", "run", "--prompt", "Once", "--max-new-tokens", "5"],
    "eval": ["eval", "--model", "run"],
    "finetune": [
        "finetune",
        "finetune",
        "--model",
        "run",
        "--run-dir",
        "tuned",
        "--max-time",
        "5s",
    ],
    "chat": ["chat", "--model", "run", "--max-new-tokens", "5"],
}
_SHOW = """
import json, sys
from gptcli.cli.main import main
code = main(sys.argv[1:])
files = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "gptcli" and m.__file__]
print("MODULES", json.dumps(files))
sys.exit(code)
"""


def main() -> None:
    """Print the counts."""
    files = sorted((ROOT / "gptcli").rglob("*.py"))
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    functions = dict(functions_of(files))
    longest, function = max(files, key=lines.__getitem__), max(functions, key=functions.__getitem__)
    print(f"modules: {len(files)}, lines: {sum(lines.values()):,}")
    print(f"longest module: {longest.relative_to(ROOT)}, {lines[longest]} lines")
    print(f"longest function: {function}, {functions[function]} lines")
    print(
        f"functions: {len(functions):,}, median {sorted(functions.values())[len(functions) // 2]}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in COMMANDS.items():
            found = imported(arguments, Path(folder))
            count = sum(lines[path] for path in found)
            print(f"gpt {name} imports {len(found)} modules, {count:,} lines")


def functions_of(files: list[Path]) -> Iterator[tuple[str, int]]:
    """Each function's place, and its lines from def to the last, without what a command's
    parameters take: those of its signature."""
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.body[0].lineno + 1
                yield f"{path.relative_to(ROOT)}::{node.name}:{node.lineno}", lines


def imported(arguments: list[str], folder: Path) -> set[Path]:
    """The project's modules in a process that has run `gpt` with these arguments."""
    command = [sys.executable, "-c", _SHOW, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GPT_RUNS": str(folder / "runs")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, input="", check=True
    )
    [listed] = [line for line in done.stdout.splitlines() if line.startswith("MODULES ")]
    return {Path(place) for place in ast.literal_eval(listed[8:])}


if __name__ == "__main__":
    main()
