"""UTF-8 in pieces and stop texts, against the same text in one piece."""

import itertools
import random

import pytest

from gptcli.generation.text import StopScanner, Utf8Stream


def cuts(length: int) -> list[list[int]]:
    """All ways to cut a short text, a random choice for a longer one."""
    if length <= 8:
        inner = range(1, length)
        return [list(c) for k in range(length) for c in itertools.combinations(inner, k)]
    draw = random.Random(length)
    return [sorted(draw.sample(range(1, length), draw.randrange(length))) for _ in range(60)]


def pieces(whole: str, at: list[int]) -> list[str]:
    edges = [0, *at, len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    "data",
    ["aé漢🙂z".encode(), b"\xff\xfe", b"a\xf0\x9f\x99", b"\xe6\xbc", b"\xf0\x9f\x99\x82\x80b", b""],
)
def test_utf8_stream_equals_bytes_decode(data: bytes) -> None:
    """T6: U+FFFD for a character whose bytes are spread over tokens; a lost unfinished end."""
    for at in cuts(len(data)):
        stream = Utf8Stream()
        edges = [0, *at, len(data)]
        got = "".join(stream.feed(data[a:b]) for a, b in itertools.pairwise(edges))
        assert got + stream.flush() == data.decode("utf-8", "replace")


def test_utf8_stream_shows_a_character_as_soon_as_it_is_complete() -> None:
    """T6: characters that are shown one token late."""
    stream = Utf8Stream()
    got = [stream.feed(bytes([b])) for b in "é🙂a".encode()]
    assert got == ["", "é", "", "", "", "🙂", "a"]


def stopped_text(text: str, stops: list[str]) -> tuple[str, bool]:
    """Brute force: add characters until some stop text ends; cut before its start."""
    for end in range(len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("hello\n\nUser: hi", ["\n\nUser:"]),
        ("aabaabaaab", ["aaab"]),  # a prefix inside a prefix
        ("abcabcd", ["abcd"]),
        ("abcdef", ["abcdef", "cd"]),  # the one that ends first
        ("xabc", ["bc", "abc"]),  # two that end together
        ("no stop he", ["here"]),  # held back at the end, then let go
        ("stop", ["stop"]),
        ("tail", []),
        ("a🙂b", ["🙂"]),
    ],
)
def test_stop_scanner_does_not_depend_on_pieces(text: str, stops: list[str]) -> None:
    """Guards: a stop text missed across token borders, shown in part, or cut at another place."""
    expected, found = stopped_text(text, stops)
    for at in cuts(len(text)):
        scanner, shown = StopScanner(stops), ""
        for piece in pieces(text, at):
            shown += scanner.feed(piece)
            assert expected.startswith(shown)
        assert (shown + scanner.flush(), scanner.stopped) == (expected, found)


def test_stop_scanner_holds_back_no_more_than_it_must() -> None:
    """Guards: streaming that lags although no stop text can begin there."""
    scanner = StopScanner(["###", "end."])
    assert [scanner.feed(c) for c in "a#b##c e"] == ["a", "", "#b", "", "", "##c", " ", ""]
    assert scanner.flush() == "e"


def test_nothing_is_shown_after_a_stop() -> None:
    """Guards: text of later tokens slips through after the stop text."""
    scanner = StopScanner(["x"])
    assert [scanner.feed("axb"), scanner.feed("c"), scanner.flush()] == ["a", "", ""]
