"""Filters of a source: which documents are left out, and what is rewritten in the others.

Each document is rewritten first (boilerplate, then personal data, then stop words) and judged as it
then stands, by the filters in the order of FiltersConfig. Duplicates need the other documents: see
`duplicates.py`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from gptcli.config.data_schema import FiltersConfig
from gptcli.data import extras, privacy
from gptcli.data.boilerplate import remove_boilerplate
from gptcli.data.unicode_scripts import (
    check_languages,
    check_scripts,
    language_of,
    script_share,
)
from gptcli.errors import ConfigError

MAX_EXAMPLES = 3
EXAMPLE_CHARACTERS = 80
_MAX_TRIES = 1000  # of different texts, to find so many examples that differ


@dataclass
class FilterCount:
    """What one filter did: documents left out, characters removed (redact: replaced), how often
    what was replaced, and examples."""

    documents: int = 0
    characters: int = 0
    replacements: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)


@dataclass
class CleaningReport:
    """What each filter did, with at most 3 different examples of at most 80 characters; these hold
    placeholders instead of personal data, whatever filter they are of."""

    filters: dict[str, FilterCount] = field(default_factory=dict)
    _tried: defaultdict[str, set[int]] = field(
        default_factory=lambda: defaultdict(set), init=False, repr=False, compare=False
    )

    def left_out(self, name: str, text: str) -> None:
        """Count a document that the filter `name` left out, with its beginning as an example."""
        count = self._of(name)
        count.documents += 1
        self._show(name, "", "", text)

    def removed(self, name: str, parts: Iterable[str]) -> None:
        """Count text that the filter removed from a document."""
        count = self._of(name)
        for part in parts:
            count.characters += len(part)
            self._show(name, "", "", part.strip())

    def replaced(self, name: str, text: str, hits: list[tuple[str, int, int]]) -> None:
        """Count personal data that was replaced, given what `privacy.find` found in `text`."""
        count = self._of(name)
        for kind, start, end in hits:
            new = kind not in count.replacements
            count.replacements[kind] = count.replacements.get(kind, 0) + 1
            count.characters += end - start
            if new:
                left = text[max(0, start - _EXAMPLE_CONTEXT) : start]
                self._show(
                    name, left, privacy.PLACEHOLDERS[kind], text[end : end + _EXAMPLE_CONTEXT]
                )

    def to_json(self) -> dict[str, Any]:
        """{filter: {"documents", "characters", "replacements": {kind: n}, "examples": [...]}}."""
        return {name: asdict(count) for name, count in self.filters.items()}

    def _show(self, name: str, left: str, middle: str, right: str) -> None:
        """One more example of the filter, unless it has enough or has this one."""
        examples, tried = self._of(name).examples, self._tried[name]
        if len(examples) >= MAX_EXAMPLES or len(tried) >= _MAX_TRIES:
            return
        right = right[:_EXAMPLE_CONTEXT]
        key = hash((left, middle, right))
        if key not in tried:  # removing personal data from each repetition would take long
            tried.add(key)
            example = _example(left, middle, right)
            if example not in examples:
                examples.append(example)

    def _of(self, name: str) -> FilterCount:
        return self.filters.setdefault(name, FilterCount())


class Cleaner:
    """Judges and rewrites documents by the filters; the same text has always the same result."""

    def __init__(self, filters: FiltersConfig) -> None:
        """Raises ConfigError for unknown scripts or languages and bounds that cross, DataError if a
        package is missing that a filter needs (those of `duplicates.py` too)."""
        self.filters = filters
        low, high = filters.min_characters, filters.max_characters
        if low and high and low > high:
            raise ConfigError(f"filters.min_characters {low} is above max_characters {high}")
        if filters.scripts:
            check_scripts(filters.scripts)
        if filters.languages is not None:
            check_languages(filters.languages)
        if filters.near_duplicates is not None:
            extras.load("datasketch", "datasketch", "filters.near_duplicates")
        if filters.stop_words:
            _stop_words()
        privacy.check_packages(filters.redact)

    def judge(self, text: str, characters: int | None = None) -> str | None:
        """The filter that leaves the document out, or None. `text` may be the first part of a long
        document of so many `characters`."""
        filters = self.filters
        size = len(text) if characters is None else characters
        if filters.min_characters and size < filters.min_characters:
            return "min_characters"
        if filters.max_characters and size > filters.max_characters:
            return "max_characters"
        if filters.languages is not None:
            language = language_of(text)
            if language is not None and language not in filters.languages:
                return "languages"
        if filters.scripts:
            shares = ((script_share(text, name), least) for name, least in filters.scripts.items())
            if any(share < least for share, least in shares):
                return "scripts"
        most = filters.max_repeated_lines
        if most is not None and repeated_lines(text) > most:
            return "max_repeated_lines"
        return None

    def rewrite(self, text: str, report: CleaningReport | None = None) -> str:
        """The text (a document, or a piece of one cut at a line end) without what the filters
        remove, with placeholders for personal data."""
        report = report if report is not None else CleaningReport()
        if self.filters.boilerplate:
            text, lines = remove_boilerplate(text)
            if lines:
                report.removed("boilerplate", lines)
        if self.filters.redact:
            hits = privacy.find(text, self.filters.redact)
            if hits:
                report.replaced("redact", text, hits)
                text = privacy.replace(text, hits)
        if self.filters.stop_words:
            text, words = remove_stop_words(text)
            if words:
                report.removed("stop_words", words)
        return text


def repeated_lines(text: str) -> float:
    """Share of the non-blank lines that occurred before in the text (Rae et al. 2021, table A1,
    leaves documents above 0.3 out). Lines are cut at Chinese sentence ends too, for texts that have
    few line ends; 0.0 for a text without lines."""
    lines = [line.strip() for line in _UNIT_ENDS.split(text)]
    lines = [line for line in lines if line]
    return 1.0 - len(set(lines)) / len(lines) if lines else 0.0


def remove_stop_words(text: str) -> tuple[str, list[str]]:
    """The text without English and Chinese stop words (`stopwordsiso`), and those words.

    Off by default: a language model must learn to write them, and half of running English is made
    of them; this is for corpora of keywords. English words go with the space behind them. Chinese
    has no spaces, and cutting characters out of longer words would damage them (的 in 目的), so a
    Chinese stop word goes only where it stands alone between signs or spaces. Raises DataError if
    the package stopwordsiso is missing.
    """
    stop, removed = _stop_words(), list[str]()

    def without(match: re.Match[str]) -> str:
        if match[1].replace("’", "'").casefold() not in stop:
            return match[0]
        removed.append(match[0])
        return ""

    return _WORD.sub(without, text), removed


_UNIT_ENDS = re.compile(r"[\n\r]+|(?<=[。！？])")
# A word with its apostrophes, no part of a placeholder such as <NATIONAL_ID>, and spaces behind it.
_WORD = re.compile(r"(?<![\w<'’])([^\W\d_]+(?:['’][^\W\d_]+)*)(?![\w'’])[ \t]*")
# Enough that no personal data is cut where an example ends.
_EXAMPLE_CONTEXT = 16384
_LONG_NUMBER = re.compile(r"\d(?:[\s().\-/]{0,2}\d){6,}")


@cache
def _stop_words() -> frozenset[str]:
    package = extras.load("stopwordsiso", "stopwordsiso", "filters.stop_words")
    words: frozenset[str] = frozenset(word.casefold() for word in package.stopwords(["en", "zh"]))
    return words


def _example(left: str, middle: str, right: str) -> str:
    """At most 80 characters around `middle`, with personal data of every kind replaced."""
    before, after = (_visible(_harmless(part)) for part in (left, right))
    before = before[-min(len(before), 30) :] if before else ""
    return before + middle + after[: EXAMPLE_CHARACTERS - len(before) - len(middle)]


def _harmless(text: str) -> str:
    redacted, _ = privacy.redact(text, privacy.available_kinds())
    return _LONG_NUMBER.sub("#", redacted)


def _visible(text: str) -> str:
    """Control characters, line ends and lone surrogates as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
