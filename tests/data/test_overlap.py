import random

import pytest

from gptcli.data.overlap import N_GRAM, Overlap, content_digest


def test_overlap_against_brute_force():
    """A hashed, sorted index that loses or invents n-grams would hide or feign leaks."""
    rng = random.Random(3)
    text = [rng.choice("abcd") for _ in range(4000)]
    held = [" ".join(text[100:200]), " ".join(rng.choice("abcd") for _ in range(300))]
    train = " ".join(text)
    overlap = Overlap([("a", held[0]), ("b", held[1])])
    cut = train.index(" ", 900) + 1  # an n-gram across two pieces counts
    overlap.add(train[:cut], True)
    overlap.add(train[cut:], False)

    def grams(string: str) -> set[tuple[str, ...]]:
        words = string.split()
        return {tuple(words[i : i + N_GRAM]) for i in range(len(words) - N_GRAM + 1)}

    wanted = grams(held[0]) | grams(held[1])
    counts = overlap.counts()
    assert counts.grams == len(wanted)
    assert counts.found == len(wanted & grams(train))
    assert (counts.exact, counts.near) == (0, 1)
    assert counts.names == ("a",)


def test_overlap_of_chinese_counts_characters():
    """Text without spaces is one long word: compared by words it would never overlap."""
    line = "明月幾時有把酒問青天不知天上宮闕今夕是何年"
    overlap = Overlap([("a", line)])
    overlap.add(f"東坡，{line}。", True)
    counts = overlap.counts()
    assert counts.grams == counts.found == len(line) - N_GRAM + 1


def test_overlap_in_bounded_memory():
    """More validation n-grams than fit are sampled evenly, not cut off."""
    rng = random.Random(4)
    held = [" ".join(rng.choices("abcdefgh", k=500)) for _ in range(20)]
    overlap = Overlap([(str(i), text) for i, text in enumerate(held)], max_grams=1000)
    overlap.add(" ".join(held[:10]), True)
    counts = overlap.counts()
    assert counts.sampled
    assert 400 <= counts.grams <= 1000
    assert counts.share == pytest.approx(0.5, abs=0.06)


def test_identity_ignores_surrounding_blanks_only():
    assert content_digest("\n a b \n\n") == content_digest("a b")
    assert content_digest("a b") != content_digest("ab")
