"""Plain words of YAML to values, by the core schema of YAML 1.2.

PyYAML follows YAML 1.1, where `3e-4` is text, `no` is false, `12:30:45` is 45045 and `017` is 15.
"""

import re
from dataclasses import dataclass
from typing import Any

from gptcli.config.fields import Wanted

_NULLS = {"", "~", "null", "Null", "NULL"}
_SWITCHES = {"true": True, "True": True, "TRUE": True, "false": False, "False": False}
_SWITCHES |= {"FALSE": False}
# Words that YAML 1.1 reads as booleans: text here, except where only true or false can be meant.
_OLD_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: cannot be encoded
_MAX_INT = 2**63 - 1
_MAX_DIGITS = 20
_EXACT = 2.0**53  # every whole float up to here is exactly what was written


@dataclass(frozen=True)
class Scalar:
    """A scalar as written: `plain` if it stood without quotes."""

    text: str
    plain: bool = True


@dataclass(frozen=True)
class Unreadable:
    """Stands for a scalar that has no value; `problem` says why."""

    problem: str


def shown(text: str) -> str:
    """Text from a user in quotes: shortened, control characters escaped."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def resolve(text: str) -> Any:
    """The value of a plain scalar: None, a bool, an int, a float, text, or `Unreadable`."""
    if text in _NULLS:
        return None
    if text in _SWITCHES:
        return _SWITCHES[text]
    if _INT.fullmatch(text) or _BASED.fullmatch(text):
        return _whole(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def _whole(text: str) -> int | Unreadable:
    digits = text.lstrip("+-").replace("_", "")
    if digits.isdigit() and len(digits) > 1 and digits[0] == "0":
        short = digits.lstrip("0") or "0"
        return Unreadable(
            f"{shown(text)} has a leading zero: write {short[:_MAX_DIGITS]}, or quote it for text"
        )
    if len(digits) > _MAX_DIGITS or abs(value := int(text, 0)) > _MAX_INT:
        return Unreadable(f"{shown(text)} is too large: whole numbers end at {_MAX_INT}")
    return value


def fit(scalar: Scalar, want: Wanted) -> Any:
    """The value of a scalar where `want` is expected; what does not fit is returned as it reads.

    `4e3` is a whole number where one is wanted, `"3e-4"` in quotes a number, `off` a switch.
    """
    if _SURROGATE.search(scalar.text):
        return Unreadable(f"{shown(scalar.text)} is not valid Unicode text")
    if not scalar.plain:
        if want.number and not want.text and _FLOAT.fullmatch(scalar.text):
            return float(scalar.text)
        return scalar.text
    value = resolve(scalar.text)
    if isinstance(value, float) and want.whole and not want.number:
        if abs(value) > _EXACT:
            return Unreadable(f"{shown(scalar.text)} is too large; write smaller ones in digits")
        return int(value) if value.is_integer() else value
    if isinstance(value, int) and not isinstance(value, bool) and want.number and not want.whole:
        return float(value)
    if isinstance(value, str) and want.switch:
        return _OLD_SWITCHES.get(value.lower(), value)
    return value
