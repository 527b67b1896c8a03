"""Values as readers see them: numbers with units, and untrusted text made visible."""

import math
import re
from datetime import datetime, timezone
from typing import Any, TypeVar

T = TypeVar("T")

NOTHING = "–"

# All but tab, newline and the CR of a CRLF: C0, DEL, C1 (terminal commands); bidi embeddings,
# overrides and isolates (text that reads in another order than it is stored); line separators, BOM;
# surrogates left alone by a cut JSON escape (they cannot be encoded).
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]|\r(?!\n)"
)


def visible(text: str) -> str:
    """`text` with control characters as escapes (`\\x1b`, `\\u202e`); newlines and tabs stay."""
    return _CONTROL.sub(_escape, text)


def clip(text: str, limit: int) -> str:
    """At most `limit` characters of `text`, with the number of those left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def spread(items: list[T], limit: int) -> list[T]:
    """At most `limit` items (two or more), evenly spread, with the first and the last."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def number(value: Any, digits: int = 4) -> str:
    """A number to `digits` significant digits, integers in full with thousands separators."""
    value = finite(value)
    if value is None:
        return NOTHING
    if isinstance(value, int) or (value.is_integer() and 1000 <= abs(value) < 1e15):
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.1f}"
    return f"{value:.{digits}g}"


def decimals(value: Any, places: int) -> str:
    """A number with exactly `places` decimals, so that columns align."""
    value = finite(value)
    return NOTHING if value is None else f"{value:,.{places}f}"


def compact(value: Any) -> str:
    """A count in three digits: `950`, `12.4k`, `1.64M`, `7.2B`."""
    value = finite(value)
    if value is None:
        return NOTHING
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999.95k rounds to 1000k: it belongs to the next unit.
        if abs(value) >= factor * 0.9995:
            scaled = value / factor
            places = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            shown = f"{scaled:.{places}f}"
            return (shown.rstrip("0").rstrip(".") if "." in shown else shown) + suffix
    return f"{value:.3g}"


def percent(value: Any) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    value = finite(value)
    return NOTHING if value is None else f"{100 * value:.1f} %"


def duration(seconds: Any) -> str:
    """Seconds as `0.35 s`, `48 s`, `9 min 12 s`, `3 h 05 min` or `2 d 04 h`."""
    seconds = finite(seconds)
    if seconds is None:
        return NOTHING
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def size(value: Any) -> str:
    """Bytes as `812 B`, `4.13 MB`, `16.6 GB` (powers of 1000)."""
    value = finite(value)
    if value is None:
        return NOTHING
    if abs(value) < 1000:
        return f"{value:.0f} B"
    return re.sub(r"(?<=\d)(?=[kMGT])", " ", compact(value).replace("B", "G")) + "B"


def moment(iso: Any) -> str:
    """An ISO 8601 time as `2026-11-21 14:02 UTC`; anything else as it stands."""
    try:
        time = datetime.fromisoformat(str(iso).replace("Z", "+00:00"))
    except ValueError:
        return str(iso)
    if time.tzinfo is None:
        return time.strftime("%Y-%m-%d %H:%M")
    return time.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def field(name: str, value: Any) -> str:
    """Any JSON value as a short text; the unit is the one that `name` ends in."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        unit = name.rsplit("_", 1)[-1]
        if unit == "bytes":
            return size(value)
        if unit == "seconds" and not name.endswith("per_seconds"):
            return duration(value)
        # Seeds and hashes are names, not quantities: no thousands separators.
        return str(value) if "seed" in name else number(value)
    if isinstance(value, list):
        return ", ".join(field(name, item) for item in value) or NOTHING
    if isinstance(value, dict):
        return ", ".join(f"{key} {field(str(key), item)}" for key, item in value.items()) or NOTHING
    return str(value)


def finite(value: Any) -> int | float | None:
    """`value` if it is a finite number, else None (bool is no number here)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
