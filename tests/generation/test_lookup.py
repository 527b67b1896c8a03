"""Prompt lookup against a search through the whole text."""

import itertools
import random

import pytest

from gptcli.generation.lookup import Lookup


def searched(tokens: list[int], most: int) -> list[int]:
    """The draft by looking at every earlier place, the latest first."""
    for size in (3, 2):
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(tokens) > size and tokens[start : start + size] == tokens[-size:]:
                text = list(tokens)
                for i in range(most):
                    text.append(text[start + size + i])
                return text[len(tokens) :]
    return []


def test_every_short_text_over_three_tokens() -> None:
    """Guards: an n-gram that finds itself, the earliest place instead of the latest, a draft that
    ends where the text does."""
    for length in range(8):
        for text in itertools.product(range(3), repeat=length):
            lookup = Lookup(text)
            for most in (0, 1, 3, 9):
                assert lookup.draft(most) == searched(list(text), most)


@pytest.mark.parametrize("vocab_size", [2, 4, 10])
def test_a_text_that_grows(vocab_size: int) -> None:
    """Guards: an index that lags behind the text, or that differs from one built at once."""
    draw = random.Random(vocab_size)
    text = [draw.randrange(vocab_size) for _ in range(40)]
    lookup = Lookup(text)
    for _ in range(60):
        more = [draw.randrange(vocab_size) for _ in range(draw.randrange(4))]
        text += more
        lookup.extend(more)
        expected = searched(text, 6)
        assert lookup.draft(6) == Lookup(text).draft(6) == expected


def test_a_loop_goes_round() -> None:
    """Guards: drafts of one period only, when a text repeats itself."""
    assert Lookup([5, 1, 2, 1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]
    assert Lookup([7, 7, 7, 7]).draft(4) == [7, 7, 7, 7]
