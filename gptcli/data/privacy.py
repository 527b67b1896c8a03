"""Personal data in text: found, and replaced by typed placeholders.

Meant to lower the risk that a model learns to recite it; no pattern finds all of it, and disguised
forms ("name at example dot com") are out of scope. Checked forms are preferred over greedy ones:
checksums where a number has one, published formats, and for bare digits a word beside them that
says what they are. Chinese text needs no spaces around a number; full-width digits count.

- email: ASCII, Latin, Greek and Cyrillic letters; not `git@` hosts and file names (icon@2x.png).
- phone: see `phones.py`.
- ip: IPv4 and IPv6, private addresses too, since they still tell devices of a home or a company;
  not loopback, 0.0.0.0, multicast and masks (255.255.255.0), and not version numbers.
- card: issuer prefix, length and grouping, and the Luhn checksum; and account numbers (IBAN) with
  their country's form and checksum.
- national_id: see `national_ids.py`.
- secret: see `secrets_found.py`.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

from gptcli.config.data_schema import Personal
from gptcli.data import extras, national_ids, phones, secrets_found
from gptcli.errors import DataError

# Most specific first: where two overlap, the first wins.
KINDS: tuple[Personal, ...] = ("secret", "email", "national_id", "card", "ip", "phone")
PLACEHOLDERS: dict[str, str] = {kind: f"<{kind.upper()}>" for kind in KINDS}
_PACKAGES = {
    "phone": ("phonenumbers", "phonenumbers"),
    "card": ("stdnum", "python-stdnum"),
    "national_id": ("stdnum", "python-stdnum"),
}


def check_packages(kinds: Iterable[str], key: str = "filters.redact") -> None:
    """Raise DataError if a package that one of the kinds needs is missing."""
    for kind in kinds:
        if kind in _PACKAGES:
            extras.load(*_PACKAGES[kind], needed_by=f"{key} {kind}")


def available_kinds() -> tuple[Personal, ...]:
    """The kinds that can be found with the packages that are installed."""
    found: list[Personal] = []
    for kind in KINDS:
        try:
            check_packages([kind])
        except DataError:
            continue
        found.append(kind)
    return tuple(found)


def find(text: str, kinds: Iterable[str]) -> list[tuple[str, int, int]]:
    """(kind, start, end) of personal data of these kinds, in characters, without overlaps.

    Raises DataError if a package is missing (`check_packages` does so beforehand).
    """
    wanted = set(kinds)
    plain = _plain(text)
    covered = bytearray(len(text))
    hits = []
    for kind in KINDS:
        if kind in wanted:
            for start, end in _FINDERS[kind](plain):
                if covered.find(1, start, end) < 0:
                    covered[start:end] = b"\1" * (end - start)
                    hits.append((str(kind), start, end))
    return sorted(hits, key=lambda hit: hit[1])


def redact(text: str, kinds: Iterable[str]) -> tuple[str, dict[str, int]]:
    """The text with placeholders such as <EMAIL>, and how many of each kind were put in.

    Raises DataError if a package is missing.
    """
    hits = find(text, kinds)
    counts: dict[str, int] = {}
    for kind, _, _ in hits:
        counts[kind] = counts.get(kind, 0) + 1
    return replace(text, hits), counts


def replace(text: str, hits: list[tuple[str, int, int]]) -> str:
    """The text with placeholders for what `find` found in it."""
    parts, behind = [], 0
    for kind, start, end in hits:
        parts += [text[behind:start], PLACEHOLDERS[kind]]
        behind = end
    return "".join([*parts, text[behind:]]) if hits else text


# Digits of other scripts and the full-width signs in e-mail addresses and phone numbers; one
# character for one, so that places stay. Full-width commas and colons are left as they are.
_DIGIT_ZEROS = (0xFF10, 0x0660, 0x06F0, 0x0966, 0x09E6, 0x0E50)
_TO_ASCII = {zero + n: 0x30 + n for zero in _DIGIT_ZEROS for n in range(10)}
_TO_ASCII |= {
    ord(wide): ord(narrow) for wide, narrow in zip("＠．－＋\u2011", "@.-+-", strict=True)
}
_FOREIGN = re.compile("[" + "".join(map(chr, _TO_ASCII)) + "]")


def _plain(text: str) -> str:
    return text.translate(_TO_ASCII) if _FOREIGN.search(text) else text


# Letters of an address: no Chinese or other unspaced script, or the words around would belong.
_LETTER = r"A-Za-z0-9\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff"
_LOCAL = re.compile(rf"[{_LETTER}!#$%&'*+/=?^_`{{|}}~.\-]+$")
_LABEL = rf"[{_LETTER}](?:[{_LETTER}\-]{{0,61}}[{_LETTER}])?"
_DOMAIN = re.compile(
    rf"(?:{_LABEL}\.){{1,8}}(?:xn--[A-Za-z0-9\-]{{2,59}}|[A-Za-z\u0400-\u04ff]{{2,24}})(?![A-Za-z0-9])"
)
_FILE_NAMES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "py", "html"}


def _emails(text: str) -> Iterator[tuple[int, int]]:
    place = text.find("@")
    while place >= 0:
        local = _LOCAL.search(text[max(0, place - 64) : place])
        domain = _DOMAIN.match(text, place + 1, place + 256)
        if local and domain and domain[0].rpartition(".")[2].lower() not in _FILE_NAMES:
            name = local[0].lstrip(".!#$%&'*+/=?^`{|}~-")
            if name and not name.endswith(".") and name != "git":
                yield place - len(name), domain.end()
        place = text.find("@", place + 1)


_IPV4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z]|\.[0-9])")
# Two colons as in an IPv6 address: found first, since a search for hexadecimal digits would stop at
# most words.
_COLONS = re.compile(r":(?=[0-9A-Fa-f]{0,4}:)")
_IPV6 = re.compile(
    r"[0-9A-Fa-f]{1,4}:(?:[0-9A-Fa-f]{0,4}:){1,6}(?:(?:[0-9]{1,3}\.){3}[0-9]{1,3}|[0-9A-Fa-f]{1,4})?"
    r"(?![0-9A-Za-z:]|\.[0-9])"
)
_HEX_BEFORE = re.compile(r"(?<![0-9A-Za-z_:.])[0-9A-Fa-f]{1,4}$")
# What makes four numbers a version or a section.
_VERSION_BEFORE = re.compile(
    r"(?:[0-9A-Za-z_.]|(?:version|release|ver\.?|v\.?|section|sec\.?|chapter|rev\.?|build|§|版本|第)"
    r"\s?[:：]?\s?)$",
    re.IGNORECASE,
)
_NO_HOSTS = ipaddress.IPv4Network("0.0.0.0/8")
_V6_NETWORKS = [ipaddress.IPv6Network(net) for net in ("2000::/3", "fc00::/7", "fe80::/10")]


def _ips(text: str) -> Iterator[tuple[int, int]]:
    for match in _IPV4.finditer(text):
        if not _VERSION_BEFORE.search(text[max(0, match.start() - 12) : match.start()]):
            yield from _address(match)
    for colons in _COLONS.finditer(text):
        before = _HEX_BEFORE.search(text[max(0, colons.start() - 5) : colons.start()])
        match6 = _IPV6.match(text, colons.start() - len(before[0])) if before else None
        if match6:
            yield from _address(match6)


def _address(match: re.Match[str]) -> Iterator[tuple[int, int]]:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:  # 300.1.1.1, 12:30:45, a MAC address
        return
    if isinstance(address, ipaddress.IPv6Address):
        tells = any(address in network for network in _V6_NETWORKS)
    else:
        tells = not (address.is_loopback or address.is_multicast or address.is_reserved)
        tells &= address not in _NO_HOSTS
    if tells:
        yield match.span()


# 13 to 19 digits: in one run, or grouped as cards are: 4-4-4-4(-3), 4-6-5, 4-6-4, 6-13.
_CARD = re.compile(
    r"[2-6][0-9]{3}(?:[0-9]{9,15}"
    r"|([ -])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{1,3})?|[0-9]{6}\1[0-9]{4,5})"
    r"|[0-9]{2} [0-9]{13})(?![0-9A-Za-z_]|[.,\-][0-9])"
)
_INSIDE_A_NUMBER = re.compile(r"(?:[0-9A-Za-z_]|[0-9][.,\-])$")
# (lengths, digits of the prefix, lowest, highest) of the issuers' ranges (ISO/IEC 7812).
_ISSUERS = (
    ((13, 16, 19), 1, 4, 4),  # Visa
    ((16,), 2, 51, 55),  # Mastercard
    ((16,), 4, 2221, 2720),
    ((15,), 2, 34, 34),  # American Express
    ((15,), 2, 37, 37),
    (range(16, 20), 4, 6011, 6011),  # Discover
    (range(16, 20), 3, 644, 659),
    (range(16, 20), 2, 62, 62),  # UnionPay
    (range(16, 20), 4, 3528, 3589),  # JCB
    (range(14, 20), 3, 300, 305),  # Diners Club
    (range(14, 20), 2, 36, 36),
    (range(14, 20), 2, 38, 39),
    (range(16, 20), 4, 2200, 2204),  # Mir
    (range(13, 20), 4, 5018, 5038),  # Maestro
    (range(13, 20), 4, 6759, 6763),
)


# In one run, or in groups of four.
_IBAN = re.compile(
    r"[A-Z]{2}[0-9]{2}(?:[A-Z0-9]{11,30}|(?:[ \u00a0][A-Z0-9]{4}){2,7}(?:[ \u00a0][A-Z0-9]{1,3})?)"
    r"(?![0-9A-Za-z_])"
)
# The first digit of either, in one pass: there are fewer digits in a text than capitals.
_FIRST_DIGIT = re.compile(
    r"[0-9](?:(?<=[A-Z][A-Z][0-9])(?=[0-9])|(?<=[2-6])(?=[0-9]{3}(?:[ \-]?[0-9]){6}))"
)


def _cards(text: str) -> Iterator[tuple[int, int]]:
    behind = 0
    for first in _FIRST_DIGIT.finditer(text):
        place = first.start()
        if place < behind:
            continue
        match = _IBAN.match(text, max(0, place - 2))
        found = _iban(text, match) if match else None
        card = None if found else _CARD.match(text, place)
        if card:
            behind = card.end()
            found = _card(text, card)
        if found:
            behind = max(behind, found[1])
            yield found


def _iban(text: str, match: re.Match[str]) -> tuple[int, int] | None:
    if _INSIDE_A_NUMBER.search(text[max(0, match.start() - 2) : match.start()]):
        return None
    iban = extras.load("stdnum.iban", "python-stdnum", "filters.redact card")
    written = match[0].replace("\u00a0", " ")
    while len(written) > 14:  # the last groups may be the next words
        if iban.is_valid(written, check_country=False):  # not its list of banks
            return match.start(), match.start() + len(written)
        written = written.rpartition(" ")[0]
    return None


def _card(text: str, match: re.Match[str]) -> tuple[int, int] | None:
    if _INSIDE_A_NUMBER.search(text[max(0, match.start() - 2) : match.start()]):
        return None
    luhn = extras.load("stdnum.luhn", "python-stdnum", "filters.redact card")
    written = match[0]
    if not _is_card(written, luhn) and len(written) > 19:
        written = written[:19]  # a fifth group may be the date of expiry
    return (match.start(), match.start() + len(written)) if _is_card(written, luhn) else None


def _is_card(written: str, luhn: ModuleType) -> bool:
    digits = written.replace(" ", "").replace("-", "")
    known = any(
        len(digits) in lengths and low <= int(digits[:width]) <= high
        for lengths, width, low, high in _ISSUERS
    )
    return known and bool(luhn.is_valid(digits))


_FINDERS: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
    "secret": secrets_found.find,
    "email": _emails,
    "national_id": national_ids.find,
    "card": _cards,
    "ip": _ips,
    "phone": phones.find,
}
