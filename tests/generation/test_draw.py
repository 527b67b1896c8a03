"""The counter hash against plain integers, and the inverse CDF against a plain sum."""

import hashlib

import numpy as np
import pytest
import torch

from gptcli.generation.draw import invert_cdf, stream, uniforms

MASK = 2**64 - 1
MOST = 1 - 2.0**-52


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def scalar_uniform(seed: int, prompt: list[int], sample: int, position: int) -> float:
    """The uniform of one token, in integers."""
    text = f"{seed}:{','.join(map(str, prompt))}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    start = mix((key + sample * 0x9E3779B97F4A7C15) & MASK)
    return (mix((start + (position + 1) * 0x9E3779B97F4A7C15) & MASK) >> 12) * 2.0**-52


def one(seed: int, prompt: list[int], sample: int, position: int) -> float:
    streams = np.array([stream(seed, prompt, sample)], dtype=np.uint64)
    return float(uniforms(streams, np.array([position]))[0])


def table(samples: int, positions: int) -> np.ndarray:
    streams = np.array([stream(0, [256], k) for k in range(samples)], dtype=np.uint64)
    return np.stack([uniforms(streams, np.full(samples, t)) for t in range(positions)])


def test_the_integers_of_the_oracle_are_splitmix64() -> None:
    """Guards: an oracle that shares a mistake with the code it checks."""
    # The first two outputs of splitmix64 from seed 1234567, as its authors' C code prints them.
    states = [1234567 + i * 0x9E3779B97F4A7C15 & MASK for i in (1, 2)]
    assert [mix(z) for z in states] == [6457827717110365317, 3203168211198807973]


def test_the_vectorised_hash_equals_the_scalar_one() -> None:
    """Guards: overflow of the arrays, or rows that take each other's stream or position."""
    random = np.random.default_rng(0)
    rows = [
        (
            int(random.integers(-5, 2**40)),
            random.integers(0, 50000, random.integers(0, 9)).tolist(),
            int(random.integers(0, 2**31)),
            int(random.integers(0, 2**31)),
        )
        for _ in range(300)
    ]
    streams = np.array([stream(*row[:3]) for row in rows], dtype=np.uint64)
    got = uniforms(streams, np.array([row[3] for row in rows]))
    assert got.tolist() == [scalar_uniform(*row) for row in rows]


def test_uniforms_never_change() -> None:
    """Guards: another hash, or another platform, changes the texts of every seed."""
    got = [one(1337, [0, 1], sample, 2) for sample in (0, 1)]
    assert got == [0.23007975536909275, 0.26885060288122276]


def test_uniforms_are_uniform_and_independent() -> None:
    """Guards: neighbouring samples or positions that move together (weak hash mixing)."""
    numbers = table(300, 300)
    assert numbers.min() >= 0.0
    assert numbers.max() <= MOST
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 160  # 99.99 % of chi-square(99) is 161
    pairs = [(numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]), (numbers, numbers.T)]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015
    assert len(np.unique(numbers)) == numbers.size


def test_seed_prompt_sample_and_position_all_count() -> None:
    """Guards: numbers that ignore the seed or the prompt, or confuse [1, 1] with [11]."""
    prompts = ([1], [1, 1], [11], [])
    streams = {stream(seed, p, k) for seed in (0, 1, -1) for p in prompts for k in (0, 1)}
    assert len(streams) == 24


def plain(weights: torch.Tensor, uniform: float) -> int:
    """The first token whose CDF exceeds the uniform, in double precision."""
    cdf = np.cumsum(weights.double().numpy())
    return int((cdf > uniform * cdf[-1]).argmax())


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 255, 256, 257, 700, 1024])
def test_draw_inverts_the_cdf(vocab_size: int) -> None:
    """Guards: blocks cut or numbered wrongly, or a uniform that is not handed down into them."""
    generator = torch.Generator().manual_seed(vocab_size)
    weights = torch.rand(20, vocab_size, generator=generator) ** 9
    weights[weights < 1e-3] = 0.0
    weights[:, -1] += 1e-3
    for row in weights[:: 1 + vocab_size // 300]:
        q = row.double() / row.double().sum()
        edges = [0.0, *q.cumsum(0).tolist()]
        for i in row.nonzero()[:, 0].tolist():
            inside = [edges[i] + (edges[i + 1] - edges[i]) * share for share in (0.01, 0.5, 0.99)]
            uniform = np.array(inside)
            assert [plain(row, u) for u in inside] == [i] * 3
            assert invert_cdf(row.expand(3, -1), uniform).tolist() == [i] * 3


@pytest.mark.parametrize("vocab_size", [5, 256, 600])
def test_draw_never_takes_a_weight_of_zero(vocab_size: int) -> None:
    """Guards: u = 0 takes a removed first token, u close to 1 a removed last one."""
    ends = np.array([0.0, MOST])
    for first, last in [(0, vocab_size - 1), (1, vocab_size - 2), (2, 2)]:
        for scale in (1.0, 1e-38, 1e-45, 1e30):
            weights = torch.zeros(2, vocab_size)
            weights[:, [first, last]] = scale
            assert invert_cdf(weights, ends).tolist() == [first, last]
    tail = torch.tensor([[1.0, 1e-20, 1e-44, 0.0, 0.0]])
    assert invert_cdf(tail, ends[1:]).tolist()[0] < 3


def test_a_row_is_drawn_as_if_alone() -> None:
    """Guards: sums over blocks whose rounding depends on the number of rows."""
    weights = torch.rand(64, 3000, generator=torch.Generator().manual_seed(3)) ** 20
    uniform = table(64, 1)[0]
    together = invert_cdf(weights, uniform)
    alone = [invert_cdf(weights[i : i + 1], uniform[i : i + 1]) for i in range(64)]
    assert together.tolist() == np.concatenate(alone).tolist()


def test_frequencies_follow_the_weights() -> None:
    """Guards: biased uniforms or a biased inversion (chi-square over 20000 draws)."""
    n = 20000
    probabilities = np.array([0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    weights = torch.zeros(1, 1000)
    ids = [0, 255, 256, 511, 700, 999]  # at and between the borders of blocks
    weights[0, ids] = torch.from_numpy(probabilities).float()
    streams = np.array([stream(5, [1, 2], k) for k in range(n)], dtype=np.uint64)
    uniform = uniforms(streams, np.full(n, 3))
    counts = np.bincount(invert_cdf(weights.expand(n, -1), uniform), minlength=1000)
    assert int(counts.sum()) == int(counts[ids].sum()) == n
    expected = probabilities * n
    assert ((counts[ids] - expected) ** 2 / expected).sum() < 20.5  # 99.9 % of chi2(5)
