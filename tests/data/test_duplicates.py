"""Exact and near duplicates."""

import random
import subprocess
import sys

import numpy as np
import pytest

from gptcli.data.duplicates import Duplicates, shingle_hashes
from gptcli.errors import ConfigError

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def _document(seed: int, words: int = 200) -> list[str]:
    pick = random.Random(seed)
    return [pick.choice(WORDS) for _ in range(words)]


def _jaccard(a: str, b: str) -> float:
    """Oracle: the Jaccard similarity of the sets of 5-grams of words."""
    sets = []
    for text in (a, b):
        words = text.split()
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_exact_duplicates_ignore_white_space_and_unicode_forms():
    """Guards against copies that differ in line ends or composed accents and count as new."""
    seen = Duplicates(exact=True, near=None).seen
    assert seen("Le café est\nouvert.") is None
    assert seen("Le cafe\u0301  est ouvert.\r\n") == "exact_duplicates"
    assert seen("Le cafe est ouvert.") is None
    assert seen("lone \ud800 surrogate") is None


def test_near_duplicates_by_the_true_similarity():
    """Guards against duplicates that are missed, or different documents thrown away."""
    pick, found, kept = random.Random(7), [], []
    for seed in range(60):
        words = _document(seed)
        other = list(words)
        for _ in range(seed % 20):
            other[pick.randrange(len(other))] = f"new{pick.randrange(10**6)}"
        first, second = " ".join(words), " ".join(other)
        duplicates = Duplicates(exact=False, near=0.7)
        assert duplicates.seen(first) is None
        is_seen = duplicates.seen(second) == "near_duplicates"
        similarity = _jaccard(first, second)
        if similarity > 0.85:
            found.append(is_seen)
        elif similarity < 0.55:
            kept.append(not is_seen)
    assert len(found) > 10
    assert len(kept) > 5
    assert all(found)
    assert all(kept)


def test_chinese_is_compared_by_characters():
    """Guards against Chinese paragraphs counted as one word and never found alike."""
    text = (
        "春天来了，花园里的花都开了，孩子们在草地上奔跑，老人们坐在长椅上晒太阳，聊着从前的故事。"
    )
    text += (
        "傍晚的时候，天空染成了橙色，远处的山像一幅淡淡的水墨画，大家慢慢地走回家去，心里很满足。"
    )
    seen = Duplicates(exact=True, near=0.7).seen
    assert seen(text) is None
    assert seen(text.replace("橙色", "红色")) == "near_duplicates"
    assert seen("秋天的早晨，河面上有一层薄薄的雾，渔夫划着小船出去打鱼，水鸟飞起来。") is None


def test_short_documents_are_only_compared_exactly():
    """Guards against all titles and one-word answers called alike."""
    seen = Duplicates(exact=False, near=0.5).seen
    assert [seen(text) for text in ("Yes.", "Yes.", "", "", "好的", "好的")] == [None] * 6


def test_many_documents_keep_their_sketches():
    """Guards against sketches lost when the tables grow, and against duplicates among
    unrelated documents."""
    seen = Duplicates(exact=False, near=0.8).seen
    documents = [" ".join(_document(seed, 40)) for seed in range(1100)]
    assert [seen(text) for text in documents] == [None] * 1100
    assert seen(documents[3] + " end") == "near_duplicates"
    assert seen(documents[1099]) == "near_duplicates"


def test_hashes_are_the_same_in_every_process():
    """Guards against Python's salted hash(): another process would find other duplicates."""
    text = "the quick brown fox jumps over the lazy dog 你好世界早上好"
    code = f"from gptcli.data.duplicates import *; print(shingle_hashes({text!r}).tolist())"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == str(shingle_hashes(text).tolist())
    assert shingle_hashes(text).dtype == np.uint32
    # ASCII text takes a faster way to the same words.
    assert set(shingle_hashes("A b, c d E!").tolist()) < set(shingle_hashes("a b c d e é").tolist())


def test_a_threshold_of_zero_is_refused():
    """Guards against a corpus of one document: everything is at least 0 alike."""
    with pytest.raises(ConfigError, match="above 0"):
        Duplicates(exact=False, near=0.0)
    assert Duplicates(exact=False, near=1.0).seen("one two three four five six") is None
