"""Durations and sizes as users write them."""

import pytest

from gptcli.config.units import parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("8h", 28800), ("1h30m", 5400), ("1.5h", 5400)],
)
def test_durations(text: str, seconds: float) -> None:
    """A limit read in the wrong unit ends a run hours early."""
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "8 hours", "h", "-1h", "0s", "1h x", "1e3", "١h30"])
def test_what_is_no_duration(text: str) -> None:
    """A part that was not understood was dropped in silence."""
    with pytest.raises(ValueError, match="duration"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("100MB", 10**8), ("64KiB", 65536), ("1.5 GB", 1_500_000_000), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    """KB and KiB differ by 2.4 %, GB and GiB by 7 %."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "10 mb", "-5MB", "5XB", "1e3"])
def test_what_is_no_size(text: str) -> None:
    """`10 mb` could be megabits."""
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)
