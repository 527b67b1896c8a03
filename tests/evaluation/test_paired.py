"""Paired comparison of models: the sign test, the interval, and pieces of few documents."""

import math
from itertools import product

import numpy as np
import pytest

from gptcli.data.scan import Document
from gptcli.evaluation.paired import FEW_DOCUMENTS, in_pieces, paired, shortened, sign_test


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 1), (5, 5), (2, 9), (12, 1)])
def test_sign_test_counts_coins(better: int, worse: int) -> None:
    """Bug: a tail too many or too few; oracle: all sequences of coins, counted."""
    coins = [sum(toss) for toss in product((0, 1), repeat=better + worse)]
    least = min(better, worse)
    as_uneven = sum(min(heads, better + worse - heads) <= least for heads in coins) / len(coins)
    assert sign_test(better, worse) == pytest.approx(as_uneven, rel=1e-12)


def test_sign_test_of_many() -> None:
    """Bug: factorials of a hundred thousand documents overflow, or take minutes."""
    n = 100_000
    for k in (49_500, 49_900, 50_000):
        exact = sum(math.comb(20, i) for i in range(6)) / 2**19  # of 5 in 20, as a check of scale
        assert sign_test(5, 15) == pytest.approx(exact)
        z = (n / 2 - k - 0.5) / math.sqrt(n / 4)
        assert sign_test(k, n - k) == pytest.approx(min(1.0, math.erfc(z / math.sqrt(2))), rel=1e-3)


def test_direction_and_ratio() -> None:
    """Bug: the sign is turned round, or short documents count as much as long ones."""
    sizes = np.array([100.0, 300.0, 50.0])
    a, b = np.array([200.0, 600.0, 100.0]), np.array([190.0, 540.0, 110.0])
    found = paired(a, b, sizes)
    assert found.difference == pytest.approx((840 - 900) / 450)
    assert (found.better, found.worse, found.ties) == (2, 1, 0)


@pytest.mark.parametrize(("shift", "winner"), [(0.0, None), (-0.02, "b"), (0.02, "a")])
def test_pairing_takes_out_the_documents(shift: float, winner: str | None) -> None:
    """Bug: documents differ by far more than models do; unpaired, 0.02 bits would be lost in 1.0 of
    noise. And a difference of nothing but noise must not have a winner."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(500, 5000, 100).astype(float)
    rates = rng.normal(2.0, 1.0, 100)
    noise = rng.normal(0.0, 0.02, 100)
    noise -= (noise * sizes).sum() / sizes.sum()
    found = paired(rates * sizes, (rates + shift + noise) * sizes, sizes)
    assert found.difference == pytest.approx(shift, abs=1e-9)
    assert found.winner == winner


def test_intervals_cover_and_several_are_wider() -> None:
    """Bug: an interval of a wrong level. Of 100 draws of 100 documents with no difference, about
    five find one; with the level of four comparisons about one."""
    rng = np.random.default_rng(1)
    wrong = dict.fromkeys((1, 4), 0)
    for _ in range(100):
        sizes = rng.integers(500, 5000, 100).astype(float)
        bits = 2.0 * sizes
        change = rng.normal(0.0, 0.1, 100) * sizes
        for comparisons in wrong:
            wrong[comparisons] += paired(bits, bits + change, sizes, comparisons).winner is not None
    assert 1 <= wrong[1] <= 11
    assert wrong[4] <= min(4, wrong[1])


def test_one_document_has_no_interval() -> None:
    """Bug: a verdict from a single document."""
    found = paired(np.array([9.0]), np.array([5.0]), np.array([4.0]))
    assert (found.ci95, found.winner) == (None, None)


def test_identical_models() -> None:
    """Bug: a model that is compared with its copy wins, or divides by no document."""
    bits, sizes = np.arange(1.0, 31.0), np.full(30, 8.0)
    found = paired(bits, bits, sizes)
    assert (found.difference, found.ties, found.sign_p, found.winner) == (0.0, 30, 1.0, None)


def test_few_long_documents_become_pieces() -> None:
    """Bug: three books give no interval; or pieces lose or double text."""
    text = "".join(f"line {i} of Größe 漢字\n" for i in range(9000))
    documents = [Document("a", text), Document("b", "short\n"), Document("c", "漢" * 9000)]
    pieces, size = in_pieces(documents)
    assert size == 4096
    for document in documents:
        own = [p for p in pieces if p.name.startswith(f"{document.name}, piece ")]
        assert "".join(str(p.text) for p in own) == document.text
        lengths = [len(str(p.text).encode()) for p in own]
        assert max(lengths) <= size
        assert all(length >= size // 2 - 4 for length in lengths[:-1])
    assert all(str(p.text).endswith("\n") for p in pieces if p.name.startswith("a"))


def test_many_documents_stay_whole() -> None:
    """Bug: documents, which are what an interval should be over, are cut though there are many."""
    documents = [Document(str(i), "text " * 9000) for i in range(FEW_DOCUMENTS)]
    assert in_pieces(documents) == (documents, None)


def test_shortened_leaves_whole_characters() -> None:
    """Bug: a limit in tokens ends inside a character, which then is another for each tokenizer."""
    assert shortened(Document("a", "ab漢字"), 6).text == "ab漢"
    assert shortened(Document("a", b"ab\xe6\xbc"), 3).text == b"ab\xe6"
