"""Telephone numbers in text, checked by `phonenumbers` (libphonenumber's numbering plans).

A number is one that `phonenumbers` holds valid and that is written as one: international (+44 ...),
or national of US, GB, CN, FR, DE or IN with an area code in brackets, a trunk 0, separators or a
mobile prefix, or any of these countries' bare digits behind a word such as "tel" or 电话. So plain
numbers, years, verse references and columns of figures are not.
"""

import re
from collections.abc import Iterator
from typing import Any

from gptcli.data import extras

_COUNTRIES = ("US", "GB", "CN", "FR", "DE", "IN")
_SEP = r"[ .\-/\u00a0]"
# Where a number could be: 7 or more characters of one. Begins with a character class, by which the
# regular expression engine skips ordinary text quickly.
_REGION = re.compile(r"[+(0-9][0-9() .\-/\u00a0]{6,}")
# How numbers are written, and the countries to try (None: the number says it).
_SHAPES: dict[str, tuple[str, tuple[str | None, ...]]] = {
    "plus": (rf"\+[0-9]{{1,3}}(?:{_SEP}?\(0\)|{_SEP}?\(?[0-9]\)?){{6,14}}", (None,)),
    "bracket": (rf"\([0-9]{{2,6}}\){_SEP}{{0,2}}[0-9](?:{_SEP}?[0-9]){{4,9}}", _COUNTRIES),
    "mobile": (r"(?:07[0-9]{9}|0[67][0-9]{8}|01[567][0-9]{8,9})", ("GB", "FR", "DE")),
    "trunk": (rf"0[0-9]{{1,5}}{_SEP}[0-9](?:{_SEP}?[0-9]){{4,11}}", _COUNTRIES[1:]),
    "us": (
        r"(?:1[ .\-])?[2-9][0-9]{2}(?:[.\-][2-9][0-9]{2}| [2-9][0-9]{2}(?=-))[.\-][0-9]{4}",
        ("US",),
    ),
    "cn": (
        r"(?:86[ \-]?)?1[3-9][0-9](?:[0-9]{8}|(?P<gap>[ \-])[0-9]{4}(?P=gap)[0-9]{4})",
        ("CN",),
    ),
    "in": (r"[6-9][0-9]{4}[ \-][0-9]{5}", ("IN",)),
}
_SHAPE = re.compile(
    "(?:"
    + "|".join(f"(?P<{name}>{pattern})" for name, (pattern, _) in _SHAPES.items())
    + ")(?![0-9A-Za-z_])"
)
_BARE = re.compile(r"[(0-9][0-9() .\-/\u00a0]{5,22}[0-9](?![0-9A-Za-z_])")
_INSIDE = re.compile(r"(?:[0-9A-Za-z_]|[0-9][.,\-/])$")
_WORD_BEFORE = re.compile(
    r"(?:\b(?:tel|telephone|phone|ph|mobile|mob|cell|cellphone|fax|call|whatsapp|sms|text)"
    r"(?: (?:number|no|us|me|at|on|is))*"
    r"|电话|電話|手机|手機|热线|熱線|传真|傳真|致电|致電|拨打|撥打|联系方式|聯繫方式)"
    r"[^0-9A-Za-z+\n]{0,6}$",
    re.IGNORECASE,
)
# 35236450.6, 05.11.2020 and 123-45-6789 are valid numbers somewhere in Germany.
_OTHERWISE = re.compile(
    r"[0-9]+\.[0-9]+|\+[0-9]{4,}\.[0-9]+|[0-9]{3}-[0-9]{2}-[0-9]{4}"
    r"|[0-3]?[0-9][ .\-/][0-3]?[0-9][ .\-/](?:19|20)[0-9]{2}(?![0-9]).*"
)
_EXTENSION = re.compile(r"[ ,]{0,2}(?:ext\.?|x|转|轉|分机)[ ]?[0-9]{1,6}(?![0-9])", re.IGNORECASE)
_LAST_GROUP = re.compile(r"[^0-9]+[0-9]+$")


def find(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of telephone numbers, in characters, by place. Raises DataError if the package
    phonenumbers is missing."""
    numbers = extras.load("phonenumbers", "phonenumbers", "filters.redact phone")
    for region in _REGION.finditer(text):
        place, end = region.span()
        if _WORD_BEFORE.search(text[max(0, place - 32) : place]):
            bare = _BARE.match(text, place)
            found = _valid(text, bare.span(), _COUNTRIES, numbers) if bare else None
            if found:
                yield found
                place = found[1]
        # Two characters more than the region, for the sight of what stands behind it.
        match = _SHAPE.search(text, place, end + 2)
        while match:
            place = match.end()
            if not _INSIDE.search(text[max(0, match.start() - 2) : match.start()]):
                countries = next(_SHAPES[name][1] for name in _SHAPES if match[name])
                found = _valid(text, match.span(), countries, numbers)
                if found:
                    yield found
                    place = found[1]
            match = _SHAPE.search(text, place, end + 2)


def _valid(
    text: str, span: tuple[int, int], countries: tuple[str | None, ...], numbers: Any
) -> tuple[int, int] | None:
    """Where the number in text[span] is, if it is valid in one of the countries; up to three
    groups of digits at its end may belong to another number."""
    start, written = span[0], text[slice(*span)]
    for _ in range(4):
        if sum(map(str.isdigit, written)) < 7 or _OTHERWISE.fullmatch(written):
            return None
        for country in countries:
            matcher = numbers.PhoneNumberMatcher(
                written, country, leniency=numbers.Leniency.VALID, max_tries=1
            )
            match = next(iter(matcher), None)
            if match and match.start <= 1 and match.end == len(written):
                end = start + len(written)
                extension = _EXTENSION.match(text, end)
                return start, extension.end() if extension else end
        written = _LAST_GROUP.sub("", written)
    return None
