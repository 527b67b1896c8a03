"""Makes docs/faults.md: every fault, what is done about it, and the tests that show it.

    python scripts/fault_table.py [--check]

The faults are those of tests/faults/rows.py; what is done stands in the docstrings of the tests in
that folder, which are named after them. `--check` writes nothing: exit code 1 if the file is old.
"""

import argparse
import ast
import re
import runpy
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "faults"
TABLE = ROOT / "docs" / "faults.md"
_GROUPS = {
    "C": "Config and command line",
    "D": "Data",
    "T": "Tokenizer",
    "K": "Checkpoints",
    "N": "Numbers",
    "S": "Signals, terminal, process",
    "R": "Disk, memory, device",
    "P": "Several processes",
}
_OPENING = """\
# Faults

What can go wrong, what `gpt` does then, and the test that makes it go wrong. Made by
`python scripts/fault_table.py` from the tests in [tests/faults](../tests/faults); run them with
`bash scripts/test.sh tests/faults`, the slow ones with `bash scripts/test.sh tests/faults -m slow`.
"""


@dataclass(frozen=True)
class Test:
    """A test, what its docstring says behind the name of its row, and whether it is a slow one."""

    place: str  # file::name
    text: str
    slow: bool


def tests_by_row() -> dict[str, list[Test]]:
    """The tests of tests/faults by row (K2), in the order of the files."""
    found: dict[str, list[Test]] = defaultdict(list)
    for path in sorted(FOLDER.glob("test_faults_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match = isinstance(node, ast.FunctionDef) and re.match(
                r"test_([a-z])(\d\d)_", node.name
            )
            if not isinstance(node, ast.FunctionDef) or not match:
                continue
            text = " ".join((ast.get_docstring(node) or "").split())
            row = f"{match[1].upper()}{int(match[2])}"
            slow = any("slow" in ast.unparse(mark) for mark in node.decorator_list)
            text = re.sub(rf"^{row}(, [A-Z]\d+)*: ", "", text)
            found[row].append(Test(f"{path.name}::{node.name}", text, slow))
    return found


def table() -> str:
    """docs/faults.md."""
    known = runpy.run_path(str(FOLDER / "rows.py"))
    rows, absent, tests = known["ROWS"], known["NOT_HERE"], tests_by_row()
    lines = [_OPENING]
    for letter, title in _GROUPS.items():
        here = [row for row in rows if row.startswith(letter)]
        if here:
            lines += [f"## {title}", "", "| | Fault | What `gpt` does | Tests |", "|-|-|-|-|"]
        for row in here:
            texts = dict.fromkeys(test.text for test in tests[row])
            names = [f"`{t.place}`{' (slow)' if t.slow else ''}" for t in tests[row]]
            cells = [row, rows[row], "<br>".join(map(_sentence, texts)), "<br>".join(names)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        gone = [row for row in absent if row.startswith(letter)]
        if gone:
            lines += [f"## {title}: not here", "", "| | Fault | Why not |", "|-|-|-|"]
            lines += [f"| {row} | {absent[row][0]} | {absent[row][1]} |" for row in gone]
        lines.append("")
    return "\n".join(lines)


def _sentence(text: str) -> str:
    text = text.replace("<", "&lt;")
    return text[:1].upper() + text[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description="Make docs/faults.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    text = table()
    if parser.parse_args().check:
        current = TABLE.read_text(encoding="utf-8") == text
        print("up to date" if current else "docs/faults.md is old: python scripts/fault_table.py")
        return 0 if current else 1
    TABLE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
