"""Filters and sampling against brute force over a vocabulary of five tokens."""

import math

import numpy as np
import pytest
import torch

from gptcli.errors import CheckpointError
from gptcli.generation import sampling

ROWS = [
    [0.0, 1.0, 2.0, 3.0, 4.0],
    [2.0, -1.0, 0.5, 2.0, -3.0],  # ties at the top
    [0.0, 0.0, 0.0, 0.0, 0.0],  # ties everywhere
    [-5.0, 10.0, -5.0, 9.5, -30.0],
    [1.0, 1.0, 1.0, 0.0, 0.0],  # ties at both levels
]
LOGITS = torch.tensor(ROWS)
GAMMA = 0x9E3779B97F4A7C15


def probabilities(row: list[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def kept(logits: torch.Tensor) -> list[set[int]]:
    return [{i for i, x in enumerate(row) if x != -math.inf} for row in logits.tolist()]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 1000])
def test_top_k_keeps_the_k_best_and_ties(k: int) -> None:
    """Guards: a k above the vocabulary crashes topk; an off-by-one keeps k - 1 or k + 1."""
    expected = [{i for i, x in enumerate(row) if sum(y > x for y in row) < k} for row in ROWS]
    assert kept(sampling.keep_top_k(LOGITS, k)) == expected


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.2, 0.333, 0.5, 0.6, 0.8, 0.9, 0.99, 1.0])
def test_top_p_is_the_smallest_set_that_reaches_p(p: float) -> None:
    """Guards: a nucleus that stops before p, goes on past it, or is empty for a tiny p."""
    expected = []
    for row in ROWS:
        q = probabilities(row)
        order = sorted(range(5), key=lambda i: -q[i])
        mass, nucleus = 0.0, set()
        for i in order:
            if p >= 1.0 or mass < p - 1e-12:
                nucleus.add(i)
            mass += q[i]
        lowest = min(row[i] for i in nucleus)
        expected.append({i for i in range(5) if row[i] >= lowest})
    assert kept(sampling.keep_top_p(LOGITS, p)) == expected


def test_top_p_does_not_depend_on_the_partial_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a nucleus wider than the first guess is cut off at the guess."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[0.0], [0.3], [2.0], [9.0]]
    )
    whole = sampling.keep_top_p(logits, 0.9)
    for guesses in [(1,), (7, 50), (299,), (300,)]:
        monkeypatch.setattr(sampling, "_NUCLEUS_GUESSES", guesses)
        assert torch.equal(sampling.keep_top_p(logits, 0.9), whole)
    assert kept(whole)[0] == set(range(300))


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.3, 0.5, 0.999, 1.0])
def test_min_p_is_relative_to_the_best(p: float) -> None:
    """Guards: min-p taken as an absolute probability."""
    expected = []
    for row in ROWS:
        q = probabilities(row)
        expected.append({i for i in range(5) if q[i] >= p * max(q) * (1 - 1e-6)})
    assert kept(sampling.keep_min_p(LOGITS, p)) == expected


def test_repetition_penalty_always_lowers_a_seen_token() -> None:
    """Guards: dividing a negative logit, which would reward repetition."""
    seen = torch.tensor([[True, False, True, False, True]] * 5)
    got = sampling.penalise_repetition(LOGITS, seen, 2.0)
    expected = [
        [(x / 2 if x > 0 else x * 2) if i % 2 == 0 else x for i, x in enumerate(row)]
        for row in ROWS
    ]
    assert got.tolist() == expected


def test_filters_run_in_the_order_of_transformers() -> None:
    """Guards: top-p before temperature, which changes the nucleus; top-k after top-p."""
    row = [0.0, 1.0, 2.0, 3.0, 4.0]
    for temperature in (0.3, 1.0, 3.0):
        got = sampling.filter_logits(torch.tensor([row]), temperature, 3, 0.8, 0.2)
        hot = [x / temperature for x in row]
        ids = sorted(range(5), key=lambda i: -hot[i])[:3]
        q = dict(zip(ids, probabilities([hot[i] for i in ids]), strict=True))
        mass, nucleus = 0.0, []
        for i in ids:
            if mass < 0.8:
                nucleus.append(i)
            mass += q[i]
        expected = {i for i in nucleus if q[i] >= 0.2 * max(q.values())}
        assert kept(got) == [expected]


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3, 1.0, 1e30, 1e308])
@pytest.mark.parametrize("penalty", [1e-320, 0.5, 1e308])
def test_extreme_settings_stay_finite(temperature: float, penalty: float) -> None:
    """Guards: inf - inf in fp32, which would draw token 0 or crash."""
    seen = torch.ones(5, 5, dtype=torch.bool)
    logits = sampling.penalise_repetition(LOGITS, seen, penalty)
    logits = sampling.filter_logits(logits, temperature, None, 0.9, 0.1)
    assert not logits.isnan().any()
    assert all(kept(logits))


def test_temperature_near_zero_is_greedy() -> None:
    """Guards: overflow when logits are divided by a tiny temperature."""
    logits = sampling.filter_logits(LOGITS[:1] * 1000, 1e-30, None, 1.0, 0.0)
    assert sampling.draw(logits, torch.tensor([0.999999], dtype=torch.float64)).tolist() == [4]


def test_draw_inverts_the_cdf() -> None:
    """Guards: the token before or after the one whose interval holds the uniform."""
    for row in ROWS:
        q = probabilities(row)
        edges = [0.0, *np.cumsum(q)]
        for i in range(5):
            for inside in (0.01, 0.5, 0.99):
                u = edges[i] + (edges[i + 1] - edges[i]) * inside
                got = sampling.draw(torch.tensor([row]), torch.tensor([u], dtype=torch.float64))
                assert got.tolist() == [i] or q[i] < 1e-6


def test_draw_never_takes_a_removed_token() -> None:
    """Guards: u = 0 takes a removed first token, u close to 1 a removed last one."""
    inf = -math.inf
    logits = torch.tensor([[inf, 0.0, inf, 0.0, inf]] * 2)
    ends = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    assert sampling.draw(logits, ends).tolist() == [1, 3]
    tail = torch.tensor([[0.0, -40.0, -80.0, -2000.0, inf]])
    assert sampling.draw(tail, ends[1:]).tolist()[0] < 4


def test_frequencies_follow_the_probabilities() -> None:
    """Guards: biased uniforms or a biased inversion (chi-square over 20000 draws)."""
    row, n = [1.0, 0.0, -1.0, 2.0, -4.0], 20000
    u = sampling.uniform_numbers(sampling.stream_key(5, [1, 2]), np.arange(n), 3)
    got = sampling.draw(torch.tensor([row]).expand(n, 5), torch.from_numpy(u))
    counts = torch.bincount(got, minlength=5).double().numpy()
    expected = np.array(probabilities(row)) * n
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 99.9 % of chi-square(4)


def test_uniforms_are_uniform_and_independent() -> None:
    """Guards: neighbouring samples or positions that move together (weak hash mixing)."""
    key = sampling.stream_key(0, [256])
    table = np.stack([sampling.uniform_numbers(key, np.arange(300), t) for t in range(300)])
    assert table.min() >= 0.0
    assert table.max() <= 1 - 2.0**-52
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 160  # 99.99 % of chi-square(99) is 161
    for a, b in [(table[1:], table[:-1]), (table[:, 1:], table[:, :-1]), (table, table.T)]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015
    assert len(np.unique(table)) == table.size


def test_uniforms_depend_on_seed_prompt_sample_and_position_only() -> None:
    """Guards: numbers that shift when rows leave the batch, or that ignore the prompt or seed."""
    key = sampling.stream_key(7, [1, 2, 3])
    whole = sampling.uniform_numbers(key, np.arange(8), 4)
    some = sampling.uniform_numbers(key, np.array([5, 2]), 4)
    assert some.tolist() == [whole[5], whole[2]]
    keys = {sampling.stream_key(s, p) for s in (0, 1, -1) for p in ([1], [1, 1], [11], [])}
    assert len(keys) == 12


def test_uniforms_never_change() -> None:
    """Guards: another hash, or another platform, changes the texts of every seed."""
    # The first two outputs of splitmix64 from seed 1234567, as its authors' C code prints them.
    states = np.array([1234567], dtype=np.uint64) + np.array([1, 2], np.uint64) * np.uint64(GAMMA)
    assert sampling._mix(states).tolist() == [6457827717110365317, 3203168211198807973]
    key = sampling.stream_key(1337, [0, 1])
    assert key == 6111395052560482369
    got = sampling.uniform_numbers(key, np.array([0, 1]), 2).tolist()
    assert got == [0.23007975536909275, 0.26885060288122276]


def test_non_finite_logits_are_a_checkpoint_error() -> None:
    """Guards: nan logits that argmax or sampling silently turns into a token."""
    for bad in (math.nan, math.inf, -math.inf):
        logits = LOGITS.clone()
        logits[2, 3] = bad
        with pytest.raises(CheckpointError, match="produces non-finite logits"):
            sampling.check_finite(logits)
    sampling.check_finite(LOGITS)
