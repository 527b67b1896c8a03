"""Exact match and token F1 of answers, in English as SQuAD takes them, and in Chinese by character.

Rajpurkar et al. 2016 (SQuAD), section 6.1: case, punctuation and articles do not count, and where
there are several references, the nearest one does. Chinese has no blanks between words, so there
each character is a token (Cui et al. 2019, CMRC 2018), and the punctuation of both scripts is off.
"""

import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import regex

# Full-width forms of ASCII, as Chinese text has them: １２％ is 12%.
_FULL_WIDTH = {code + 0xFEE0: code for code in range(0x21, 0x7F)}
_ARTICLES = regex.compile(r"\b(a|an|the)\b")
_CHARACTERS = r"\p{Han}\p{Hiragana}\p{Katakana}"
_TOKENS = regex.compile(rf"[{_CHARACTERS}]|[^\s{_CHARACTERS}]+")
_HAN = regex.compile(r"\p{Han}")


def answer_tokens(text: str) -> list[str]:
    """What of an answer is compared: lower-case words, Chinese and Japanese characters each alone.

    An answer of nothing but punctuation and articles (`+`, or choice `a`) is kept as it is.
    """
    lowered = text.translate(_FULL_WIDTH).lower()
    bare = "".join(character for character in lowered if not _is_punctuation(character))
    return _TOKENS.findall(_ARTICLES.sub(" ", bare)) or lowered.split()


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 where the answer has the tokens of one of the references, else 0.0."""
    found = answer_tokens(answer)
    return float(any(found == answer_tokens(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over tokens, a token as often as both have it; of
    several references the best."""
    return max(_f1(answer_tokens(answer), answer_tokens(reference)) for reference in references)


def is_chinese(text: str) -> bool:
    """Whether at least a third of what is neither blank nor punctuation are Chinese characters."""
    letters = [c for c in text if not (c.isspace() or _is_punctuation(c))]
    return bool(letters) and 3 * len(_HAN.findall(text)) >= len(letters)


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))
