"""Durations ("8h", "1h30m", "90s") and sizes ("100MB", "64KiB") as users write them."""

import re

_TIME = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_SIZE = {"": 1, "B": 1}
_SIZE |= {p + "B": 1000**i for i, p in enumerate("KMGT", 1)}
_SIZE |= {p + "iB": 1024**i for i, p in enumerate("KMGT", 1)}


def parse_seconds(text: str) -> float:
    """Seconds in a duration such as `8h`, `1h30m`, `45s` or `90` (seconds). ValueError if none."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if parts and "".join(n + u for n, u in parts) == text:
        seconds = sum(float(n) * _TIME[u] for n, u in parts)
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    else:
        raise ValueError(f"{text!r} is not a duration; write 90s, 10m, 8h or 1h30m")
    if seconds <= 0:
        raise ValueError("a duration must be above zero")
    return seconds


def parse_bytes(text: str) -> int:
    """Bytes in a size such as `100MB`, `64KiB` or `1000`. ValueError if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", text)
    if not match or match[2] not in _SIZE:
        raise ValueError(f"{text!r} is not a size; write 100MB, 64KiB or a number of bytes")
    return int(float(match[1]) * _SIZE[match[2]])
