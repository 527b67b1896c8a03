"""Exact match and token F1 against cases worked by hand."""

import pytest

from gptcli.evaluation.answers import answer_tokens, exact_match, is_chinese, token_f1


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The  Quick-brown fox, an owl.", ["quickbrown", "fox", "owl"]),  # as SQuAD's script
        ("theatre anthem", ["theatre", "anthem"]),  # articles are words, not letters
        ("北京，上海。", ["北", "京", "上", "海"]),
        ("约１２％（2019年）", ["约", "122019", "年"]),
        ("用Python写的", ["用", "python", "写", "的"]),
        ("ひらがなカナ", list("ひらがなカナ")),
        ("a", ["a"]),  # a choice, not an article
        ("+", ["+"]),
        (" \n", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    """Bug: Chinese is one word, its punctuation counts, or an answer is normalised to nothing."""
    assert answer_tokens(text) == tokens


@pytest.mark.parametrize(
    ("answer", "references", "match", "f1"),
    [
        ("the cat", ["Cat!"], 1.0, 1.0),
        ("the black cat sat", ["cat slept"], 0.0, 2 * 1 / (3 + 2)),
        ("dog", ["cat", "Dog."], 1.0, 1.0),  # the best of several
        ("cat cat", ["cat"], 0.0, 2 * 1 / 3),  # a word counts as often as both have it
        ("北京市", ["北京"], 0.0, 0.8),
        ("北 京", ["北京"], 1.0, 1.0),
        ("", ["cat"], 0.0, 0.0),
        ("b", ["a"], 0.0, 0.0),
        ("+", ["-"], 0.0, 0.0),
    ],
)
def test_scores(answer: str, references: list[str], match: float, f1: float) -> None:
    """Bug: another reference than the nearest is compared, or repeated words count twice."""
    assert exact_match(answer, references) == match
    assert token_f1(answer, references) == pytest.approx(f1)


def test_chinese() -> None:
    """Bug: a Chinese text with a Latin name in it is split into words at blanks."""
    assert is_chinese("我喜欢 Python 和 C")
    assert not is_chinese("The city of Beijing (北京) is in the north")
    assert not is_chinese("。，")
