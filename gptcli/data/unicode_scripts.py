"""Which scripts a text is written in, and in which language.

A letter is a character of Unicode category L. Letters that belong to no script of their own
(script Common, such as the prolonged sound mark of Japanese) are not counted.
"""

import difflib
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import regex

from gptcli.data import extras
from gptcli.errors import ConfigError

# The scripts told apart; letters of any other are counted as "Other".
SCRIPTS = (
    *("Latin", "Han", "Cyrillic", "Arabic", "Devanagari", "Hangul", "Hiragana", "Katakana"),
    *("Thai", "Greek", "Hebrew", "Bengali", "Tamil", "Telugu", "Kannada", "Malayalam", "Gujarati"),
    *("Gurmukhi", "Oriya", "Sinhala", "Lao", "Khmer", "Myanmar", "Tibetan", "Georgian", "Armenian"),
    *("Ethiopic", "Mongolian", "Bopomofo", "Cherokee", "Syriac", "Thaana", "Yi", "Tifinagh"),
)
LANGUAGE_LETTERS = 20  # fewer say too little about the language
# Naive Bayes on byte n-grams is settled long before; it reads about 1 MB a second.
_LANGUAGE_CHARACTERS = 2000
_CHUNK = 1 << 20  # characters looked up at a time: 4 MiB of code points
_NONE, _OTHER = 0, 1


def letters_by_script(text: str, scripts: tuple[str, ...] = SCRIPTS) -> dict[str, int]:
    """Letters of the text by script, most first; those of none in `scripts` as "Other"."""
    table = _table(scripts)
    counts = np.zeros(len(scripts) + 2, np.int64)
    for start in range(0, len(text), _CHUNK):
        data = text[start : start + _CHUNK].encode("utf-32-le", "surrogatepass")
        kinds = table[np.frombuffer(data, "<u4")]
        counts += np.bincount(kinds, minlength=len(counts))
    named = {name: int(n) for name, n in zip(scripts, counts[2:], strict=True)}
    named["Other"] = int(counts[_OTHER])
    return {name: n for name, n in sorted(named.items(), key=lambda item: -item[1]) if n}


def main_script(text: str) -> str | None:
    """The script of most letters, or None where there are no letters."""
    return next(iter(letters_by_script(text)), None)


def script_share(text: str, script: str) -> float:
    """Share of the text's letters in the script, 0.0 for a text without letters."""
    counts = letters_by_script(text, (script,))
    total = sum(counts.values())
    return counts.get(script, 0) / total if total else 0.0


def check_scripts(names: Iterable[str], key: str = "filters.scripts") -> None:
    """Raise ConfigError for names that are no Unicode scripts, with the nearest that are."""
    problems = []
    for name in names:
        try:
            if not regex.fullmatch(r"[A-Za-z]\w*", name, regex.ASCII):
                raise ValueError(name)
            regex.compile(rf"\p{{Script={name}}}")
        except (regex.error, ValueError):
            near = _nearest(name, SCRIPTS)
            problems.append(f"{key}: unknown Unicode script {name[:60]!r}{near}")
    if problems:
        raise ConfigError(problems, hint=f"scripts are {', '.join(SCRIPTS[:12])}, ...")


def check_languages(codes: Iterable[str], key: str = "filters.languages") -> None:
    """Raise ConfigError for codes that py3langid does not know; DataError if it is missing."""
    known = sorted(_identifier(key).labels)
    problems = [
        f"{key}: unknown language code {code[:60]!r}{_nearest(code, known)}"
        for code in codes
        if code not in known
    ]
    if problems:
        raise ConfigError(problems, hint=f"codes are {', '.join(known)}")


def language_of(text: str, key: str = "filters.languages") -> str | None:
    """ISO 639-1 code of the language by the first 2,000 characters, None for a text with fewer
    than 20 letters. DataError if py3langid is missing."""
    start = text[:_LANGUAGE_CHARACTERS]
    if sum(letters_by_script(start).values()) < LANGUAGE_LETTERS:
        return None
    code: str = _identifier(key).classify(start)[0]
    return code


def _nearest(name: str, known: Iterable[str]) -> str:
    spelled = {word.lower(): word for word in known}
    near = difflib.get_close_matches(name.lower(), spelled, n=3)
    return f"; did you mean {' or '.join(repr(spelled[word]) for word in near)}?" if near else ""


@cache
def _table(scripts: tuple[str, ...]) -> np.ndarray:
    """(0x110000,) uint8: what each code point is: no letter, another script's, or 2 + index."""
    table = np.zeros(0x110000, np.uint8)
    everything = "".join(map(chr, range(0x110000)))
    letters = regex.findall(r"\p{L}", everything)
    table[[ord(letter) for letter in letters]] = _OTHER
    line = "".join(letters)
    for shared in ("Common", "Inherited"):
        table[_code_points(line, shared)] = _NONE
    for index, name in enumerate(scripts):
        table[_code_points(line, name)] = 2 + index
    return table


def _code_points(letters: str, script: str) -> list[int]:
    return [ord(letter) for letter in regex.findall(rf"\p{{Script={script}}}", letters)]


def _identifier(key: str) -> Any:
    return _model(extras.load("py3langid.langid", "py3langid", key))


@cache
def _model(langid: ModuleType) -> Any:
    """py3langid's model, loaded once (about a second)."""
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
