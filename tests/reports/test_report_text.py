import math

import pytest

from gptcli.reports.text import (
    clip,
    compact,
    decimals,
    duration,
    field,
    moment,
    number,
    percent,
    size,
    visible,
)


def test_control_characters_become_escapes() -> None:
    """Guards against terminal commands, reordered text and text that cannot be encoded."""
    assert visible("\x1b[2J\x9b\x00\x7f") == r"\x1b[2J\x9b\x00\x7f"
    assert visible("\u202ea\u2066\u2028\ufeff\ud800") == r"\u202ea\u2066\u2028\ufeff\ud800"
    assert visible("a\rb") == r"a\x0db"


def test_ordinary_text_is_left_alone() -> None:
    """Guards against escapes in what people write: lines, tabs, scripts, joined emoji."""
    text = "a\tb\nc\r\nd é 中文 שלום 👩‍👧 \\x1b"
    assert visible(text) == text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (950, "950"),
        (999.96e3, "1M"),
        (12_400, "12.4k"),
        (1_638_400, "1.64M"),
        (1e9, "1B"),
        (0.003, "0.003"),
        (-1500, "-1.5k"),
        (None, "–"),
    ],
)
def test_compact(value: float | None, shown: str) -> None:
    """Guards against 1000k and against lost digits."""
    assert compact(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.351, "0.35 s"),
        (9.6, "10 s"),
        (59.6, "1 min 00 s"),
        (552, "9 min 12 s"),
        (3599.7, "1 h 00 min"),
        (11_100, "3 h 05 min"),
        (2 * 86400 + 4 * 3600, "2 d 04 h"),
    ],
)
def test_duration(seconds: float, shown: str) -> None:
    """Guards against 60 seconds in a minute's place where rounding carries."""
    assert duration(seconds) == shown


def test_unknown_is_a_dash() -> None:
    """Guards against `nan`, `None` or `inf` in a figure."""
    for shown in (number, compact, percent, duration, size):
        assert shown(None) == shown(math.nan) == shown(math.inf) == shown("x") == "–"
    assert decimals(math.nan, 2) == "–"


def test_fields_show_their_unit() -> None:
    """Guards against bytes and seconds as bare numbers, and seeds with commas."""
    assert field("memory_bytes", 16_600_000_000) == "16.6 GB"
    assert field("bytes", 812) == "812 B"
    assert field("training_seconds", 90.0) == "1 min 30 s"
    assert field("seed", 13371337) == "13371337"
    assert field("tokens", 25010) == "25,010"
    assert field("compile", False) == "no"
    assert field("ci", [1.5, None]) == "1.5, –"
    assert field("files", {"a.txt": 2}) == "a.txt 2"


def test_clip_says_what_is_left_out() -> None:
    """Guards against text that ends without a word."""
    assert clip("abcdef", 6) == "abcdef"
    assert clip("abcdefgh", 6) == "abcdef … (2 more characters)"


def test_moments() -> None:
    """Guards against a crash on a date that a damaged run.json holds."""
    assert moment("2026-11-22T06:37:11.5+02:00") == "2026-11-22 04:37 UTC"
    assert moment("2026-11-22T04:37:11Z") == "2026-11-22 04:37 UTC"
    assert moment("yesterday") == "yesterday"
