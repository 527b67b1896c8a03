"""National identity numbers in text, checked by `stdnum`.

| rule | country | needs besides a valid number |
|---|---|---|
| us.ssn, us.itin | United States | dashes (123-45-6789), else a word such as SSN |
| cn.ric | China | nothing: date, place and checksum are in its 18 characters |
| fr.nir | France | nothing: 15 characters with a checksum of two digits |
| kr.rrn | South Korea | the dash; those issued since October 2020 have no checksum |
| it.codicefiscale, mx.curp | Italy, Mexico | nothing |
| br.cpf | Brazil | the dots and dash, else the word CPF |
| es.nie | Spain | nothing: a letter at both ends |
| GB National Insurance | United Kingdom | spaces (AB 12 34 56 C), else a word such as NI number |

The others need a word beside them, since their checksum passes about a tenth of all numbers:
es.dni, de.idnr, in.aadhaar, gb.nhs, nl.bsn, pl.pesel, ca.sin, jp.in, au.tfn, tr.tckimlik, za.idnr.

Behind a word that says what it is, a number counts by its form alone, since a mistyped or made-up
one is written the same way: identity cards of China (18 or 15 digits), Taiwan and Hong Kong, and
passports (8 or 9 digits and capitals, 4 digits or more, a digit among the first four). So does
123-45-6789 beside SSN. One word speaks for one number, the first behind it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from gptcli.data import extras


@dataclass(frozen=True)
class _Rule:
    """module: stdnum's, or None where the pattern is all there is. words: one of them (in lower
    case) must stand within 40 characters of it, if there are any. lettered: it
    begins with letters (see _LETTERED)."""

    pattern: re.Pattern[str]
    module: str | None
    words: tuple[str, ...]
    word: re.Pattern[str]
    lettered: bool


def _rule(pattern: str, module: str | None, *words: str, lettered: bool = False) -> _Rule:
    return _Rule(
        re.compile(rf"{pattern}(?![0-9A-Za-z_]|[\-.][0-9])"),
        module,
        words,
        re.compile(rf"(?<![a-z])(?:{'|'.join(map(re.escape, words))})"),
        lettered,
    )


_SSN_WORDS = ("ssn", "itin", "social security", "taxpayer id", "社会安全号", "社會安全號")
_DE_WORDS = ("steuer-id", "steuerid", "steuernummer", "steueridentifikation", "steuerliche", "idnr")
_IN_WORDS = ("aadhaar", "aadhar", "uidai", "आधार")
_CA_WORDS = ("sin number", "sin no", "sin:", "social insurance")
_JP_WORDS = ("my number", "マイナンバー", "個人番号")
_RULES = (
    _rule(r"[0-9]{3}-[0-9]{2}-[0-9]{4}", "us.ssn"),
    _rule(r"9[0-9]{2}-[0-9]{2}-[0-9]{4}", "us.itin"),
    _rule(r"[0-9]{3} ?[0-9]{2} ?[0-9]{4}", "us.ssn", *_SSN_WORDS),
    _rule(r"[0-9]{3}([ \-])[0-9]{2}\1[0-9]{4}", None, *_SSN_WORDS),
    _rule(r"[1-9][0-9]{16}[0-9Xx]", "cn.ric"),
    _rule(
        r"[12] ?[0-9]{2} ?[0-9]{2} ?(?:[0-9]{2}|2[AB]) ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}",
        "fr.nir",
    ),
    _rule(r"[0-9]{6}-[0-9]{7}", "kr.rrn"),
    _rule(r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}", "br.cpf"),
    _rule(r"[0-9]{11}", "br.cpf", "cpf"),
    _rule(r"[XYZ]-?[0-9]{7}-?[A-Z]", "es.nie"),
    _rule(r"[0-9]{8}-?[A-Za-z]", "es.dni", "dni", "nif", "documento nacional"),
    _rule(r"[1-9][0-9] ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}", "de.idnr", *_DE_WORDS),
    _rule(
        r"[2-9][0-9]{3}[ \-]?[0-9]{4}[ \-]?[0-9]{4}",
        "in_.aadhaar",
        "aadhaar",
        "aadhar",
        "uidai",
        "आधार",
    ),
    _rule(r"[0-9]{3}[ \-]?[0-9]{3}[ \-]?[0-9]{4}", "gb.nhs", "nhs"),
    _rule(r"[0-9]{9}", "nl.bsn", "bsn", "burgerservice"),
    _rule(r"[0-9]{11}", "pl.pesel", "pesel"),
    _rule(
        r"[0-9]{3}[ \-]?[0-9]{3}[ \-]?[0-9]{3}",
        "ca.sin",
        "sin number",
        "sin no",
        "sin:",
        "social insurance",
    ),
    _rule(r"[0-9]{4}[ \-]?[0-9]{4}[ \-]?[0-9]{4}", "jp.in_", *_JP_WORDS),
    _rule(r"[0-9]{3} ?[0-9]{3} ?[0-9]{2,3}", "au.tfn", "tfn", "tax file"),
    _rule(r"[1-9][0-9]{10}", "tr.tckimlik", "kimlik", "tckn"),
    _rule(r"[0-9]{13}", "za.idnr", "id number", "id no", "identity number"),
    _rule(
        r"[A-Z]{6}[0-9LMNPQRSTUV]{2}[A-EHLMPRST][0-9LMNPQRSTUV]{2}[A-Z][0-9LMNPQRSTUV]{3}[A-Z]",
        "it.codicefiscale",
        lettered=True,
    ),
    _rule(r"[A-Z]{4}[0-9]{6}[HMX][A-Z]{5}[0-9A-Z][0-9]", "mx.curp", lettered=True),
    _rule(
        r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] [0-9]{2} [0-9]{2} [0-9]{2} [A-D]",
        None,
        lettered=True,
    ),
    _rule(
        r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z][0-9]{6}[A-D]",
        None,
        *("nino", "ni number", "ni no", "national insurance"),
        lettered=True,
    ),
)
# What each lettered number begins with, in one pattern; then where other numbers could be.
_LETTERED = re.compile(
    r"[A-Z]{2}(?:[0-9]{6}| [0-9]{2} [0-9]"
    r"|[A-Z]{2}(?:[0-9]{6}|[A-Z]{2}[0-9LMNPQRSTUV]{2}[A-EHLMPRST][0-9LMNPQRSTUV]{2}))"
)
_DIGITS = re.compile(r"[0-9](?:[ .\-]?[0-9A-Z]){5,}")
# (words, number): what the number is stands in front of it, at most 32 characters away.
_IDENTITY_WORDS = (
    *("身份证", "身份證", "身分证", "身分證", "公民身份", "居民身份"),
    *("id card", "id number", "identity card", "identity number", "identification number"),
)
_PASSPORT_WORDS = ("passport", "passeport", "pasaporte", "reisepass", "护照", "護照", "パスポート")


def _labelled(words: tuple[str, ...], number: str) -> tuple[tuple[str, ...], re.Pattern[str]]:
    return words, re.compile(
        rf"(?i:{'|'.join(words)})[^0-9\n]{{0,32}}?(?<![0-9A-Za-z_])({number})"
        r"(?![0-9A-Za-z_]|[\-.][0-9])"
    )


_LABELLED = (
    _labelled(
        _IDENTITY_WORDS,
        r"[1-9][0-9]{5} ?[0-9]{8} ?[0-9]{3}[0-9Xx]|[1-9][0-9]{14}"  # China
        r"|[A-Z][A-D1289][0-9]{8}"  # Taiwan, citizens and residents
        r"|[A-Z]{1,2}[0-9]{6}(?:[0-9A]|\([0-9A]\))",  # Hong Kong
    ),
    # Not eight digits that are a date.
    _labelled(
        _PASSPORT_WORDS,
        r"(?!(?:19|20)[0-9]{6}(?![0-9A-Z]))(?=[A-Z]{0,3}[0-9](?:[A-Z]*[0-9]){3})[0-9A-Z]{8,9}",
    ),
)
_INSIDE = re.compile(r"(?:[0-9A-Za-z_]|[0-9][.,\-])$")


def find(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of identity numbers, in characters. Raises DataError if the package
    python-stdnum is missing."""
    lettered = [region.span() for region in _LETTERED.finditer(text)]
    regions = list(_DIGITS.finditer(text))
    if not lettered and not regions:
        return
    lowered = text.lower()
    for words, labelled in _LABELLED:
        if any(word in lowered for word in words):
            for match in labelled.finditer(text):
                yield match.span(1)
    numbers = [r.span() for r in regions if sum(map(str.isdigit, r[0])) >= 7]
    rules = [r for r in _RULES if not r.words or any(word in lowered for word in r.words)]
    for low, high in lettered:
        yield from _matches(text, low, high + 12, rules, lettered=True)
    for low, high in numbers:
        # Room for a letter in front (es.nie) and for the sight of what stands behind.
        yield from _matches(text, max(0, low - 2), high + 2, rules, lettered=False)


def _matches(
    text: str, low: int, high: int, rules: list[_Rule], lettered: bool
) -> Iterator[tuple[int, int]]:
    for rule in rules:
        if rule.lettered == lettered:
            for match in rule.pattern.finditer(text, low, high):
                if _holds(rule, match, text):
                    yield match.span()


def _holds(rule: _Rule, match: re.Match[str], text: str) -> bool:
    start, end = match.span()
    if _INSIDE.search(text[max(0, start - 2) : start]):
        return False
    if rule.words and not rule.word.search(text[max(0, start - 40) : end + 40].lower()):
        return False
    return rule.module is None or bool(_module(rule.module).is_valid(match[0]))


@cache
def _module(name: str) -> ModuleType:
    return extras.load(f"stdnum.{name}", "python-stdnum", "filters.redact national_id")
