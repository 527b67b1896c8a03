"""Sampling against brute force over a vocabulary of five tokens."""

import itertools
import math

import numpy as np
import pytest
import torch

from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError
from gptcli.generation import filters
from gptcli.generation.draw import stream, uniforms
from gptcli.generation.sampling import Sampler, Sampling, check_finite

ROWS = [
    [0.0, 1.0, 2.0, 3.0, 4.0],
    [2.0, -1.0, 0.5, 2.0, -3.0],  # ties at the top
    [0.0, 0.0, 0.0, 0.0, 0.0],  # ties everywhere
    [-5.0, 10.0, -5.0, 9.5, -30.0],
    [1.0, 1.0, 1.0, 0.0, 0.0],  # ties at both levels
]
TOKENIZER = Tokenizer.of_bytes()
CPU = torch.device("cpu")
PROMPT = [0, 3, 3]


def softmax(row: list[float]) -> list[float]:
    """Probabilities; those of -inf are 0."""
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def brute(row: list[float], asked: Sampling, text: list[int]) -> list[float]:
    """The probability of each of the tokens after PROMPT and `text`, by definition."""
    x = list(row)
    for i in range(len(x)):
        if i in PROMPT + text:
            penalty = asked.repetition_penalty
            x[i] = x[i] / penalty if x[i] > 0 else x[i] * penalty
        x[i] -= asked.frequency_penalty * text.count(i)
        x[i] -= asked.presence_penalty if i in text else 0.0
        spelled = bytes([*text, i])
        if any(word.encode() in spelled for word in asked.bad_words):
            x[i] = -math.inf
    if asked.temperature == 0.0:
        return [float(i == x.index(max(x))) for i in range(len(x))]
    x = [y / asked.temperature for y in x]
    if asked.top_k is not None:
        x = [y if sum(z > y for z in x) < asked.top_k else -math.inf for y in x]
    q = softmax(x)
    likelier = [sum(r for r in q if r > p * (1 + 1e-9)) for p in q]
    kept = [mass < asked.top_p * (1 - 1e-9) or asked.top_p == 1.0 for mass in likelier]
    best = max(q)
    kept = [some and p >= asked.min_p * best * (1 - 1e-6) for some, p in zip(kept, q, strict=True)]
    q = [p if some else 0.0 for some, p in zip(kept, q, strict=True)]
    return [p / sum(q) for p in q]


def drawn(q: list[float], uniform: float) -> int | None:
    """The token at which the CDF passes; None where the uniform is too close to say."""
    edges = np.cumsum(q)
    if min(abs(edges - uniform)) < 1e-5:
        return None
    return int((edges > uniform).argmax())


def number(asked: Sampling, sample: int, position: int) -> float:
    streams = np.array([stream(asked.seed, PROMPT, sample)], dtype=np.uint64)
    return float(uniforms(streams, np.array([position]))[0])


def first_tokens(rows: list[list[float]], asked: Sampling, n: int) -> list[list[int]]:
    """The first tokens of `n` samples for each of the logits."""
    sampler = Sampler(n, TOKENIZER, len(rows[0]), CPU)
    for slot in range(n):
        sampler.begin(slot, asked, PROMPT, slot)
    slots, positions = np.arange(n), np.zeros(n, dtype=np.int64)
    return [
        sampler.choose(torch.tensor([row]).expand(n, -1), slots, positions).tolist() for row in rows
    ]


def kept(asked: Sampling, n: int = 4000) -> list[set[int]]:
    """What is ever drawn, of all tokens that have at least a chance of 1 %."""
    return [set(tokens) for tokens in first_tokens(ROWS, asked, n)]


def check_first_tokens(asked: Sampling, n: int = 200) -> None:
    """Every first token is the one that brute force and the uniform say."""
    for row, got in zip(ROWS, first_tokens(ROWS, asked, n), strict=True):
        q = brute(row, asked, [])
        for sample, token in enumerate(got):
            assert drawn(q, number(asked, sample, 0)) in (token, None)


@pytest.mark.parametrize("temperature", [0.0, 0.01, 0.3, 0.8, 1.0, 1.7, 30.0])
def test_temperature(temperature: float) -> None:
    """Guards: logits multiplied instead of divided, or greedy that is not the first of the best."""
    check_first_tokens(Sampling(temperature=temperature))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 1000])
def test_top_k_keeps_the_k_best_and_ties(k: int) -> None:
    """Guards: a k above the vocabulary crashes; an off-by-one keeps k - 1 or k + 1."""
    check_first_tokens(Sampling(top_k=k))
    hot = Sampling(top_k=k, temperature=1e4)  # all that stay are as likely
    expected = [{i for i, x in enumerate(row) if sum(y > x for y in row) < k} for row in ROWS]
    assert kept(hot) == expected


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.2, 0.333, 0.5, 0.6, 0.8, 0.9, 0.99, 1.0])
def test_top_p_is_the_smallest_set_that_reaches_p(p: float) -> None:
    """Guards: a nucleus that stops before p, goes on past it, or is empty for a tiny p."""
    check_first_tokens(Sampling(top_p=p))


def test_top_p_by_trying_all_sets() -> None:
    """Guards: an oracle that shares the misunderstanding of the code: here the smallest of all 31
    sets that reach p, without ties."""
    random = np.random.default_rng(1)
    for p in (0.05, 0.4, 0.7, 0.95):
        row = random.normal(0, 1.5, 5).tolist()
        q = softmax(row)
        sets = [s for n in range(1, 6) for s in itertools.combinations(range(5), n)]
        reaching = [s for s in sets if sum(q[i] for i in s) >= p]
        smallest = min(reaching, key=lambda s: (len(s), -sum(q[i] for i in s)))
        assert {i for i, x in enumerate(brute(row, Sampling(top_p=p), [])) if x} == set(smallest)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.3, 0.5, 0.999, 1.0])
def test_min_p_is_relative_to_the_best(p: float) -> None:
    """Guards: min-p taken as an absolute probability, or before temperature."""
    for temperature in (0.5, 1.0, 3.0):
        check_first_tokens(Sampling(min_p=p, temperature=temperature))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.6])
def test_all_settings_together(temperature: float, n: int) -> None:
    """Guards: an order other than penalties, temperature, top-k, top-p, min-p; penalties over the
    wrong tokens (presence and frequency: the text; repetition: the prompt too)."""
    choices = itertools.product(
        [None, 1, 3], [0.6, 1.0], [0.0, 0.15], [1.0, 1.8, 0.5], [0.0, 0.9], [0.0, 0.4, -0.3]
    )
    generator = torch.Generator().manual_seed(n)
    checked = 0
    for k, p, m, repetition, presence, frequency in list(choices)[n::4]:
        asked = Sampling(
            temperature=temperature,
            top_k=k,
            top_p=p,
            min_p=m,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            bad_words=("\x02\x02", "\x04\x01\x00") if n == 2 else (),
            seed=3,
        )
        sampler = Sampler(n, TOKENIZER, 5, CPU)
        for slot in range(n):
            sampler.begin(slot, asked, PROMPT, slot)
        texts: list[list[int]] = [[] for _ in range(n)]
        for position in range(8):
            logits = torch.randn(n, 5, generator=generator) * 2
            got = sampler.choose(logits, np.arange(n), np.full(n, position)).tolist()
            for slot, token in enumerate(got):
                q = brute(logits[slot].tolist(), asked, texts[slot])
                expected = drawn(q, number(asked, slot, position))
                checked += expected is not None
                assert token in (expected, token if expected is None else None)
                texts[slot].append(token)
    assert checked > 0.99 * 8 * n * 54


@pytest.mark.parametrize(
    "asked",
    [
        Sampling(),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(temperature=1.3, top_k=3, min_p=0.1),
        Sampling(repetition_penalty=1.5, top_p=0.95, seed=8),
    ],
)
def test_frequencies_follow_the_probabilities(asked: Sampling) -> None:
    """Guards: samples that are not independent draws of the filtered distribution (chi-square)."""
    row, n = [1.0, 0.0, -1.0, 2.0, 0.5], 20000
    got = np.bincount(first_tokens([row], asked, n)[0], minlength=5)
    expected = np.array(brute(row, asked, [])) * n
    assert (got[expected == 0] == 0).all()
    some = expected > 0
    assert ((got - expected)[some] ** 2 / expected[some]).sum() < 18.5  # 99.9 % of chi2(4)


MIXED = [
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(temperature=0.8, top_p=0.95, seed=1),
    Sampling(top_k=7, repetition_penalty=1.3),
    Sampling(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.2),
    Sampling(min_p=0.05, bad_words=("a", "bc"), seed=2),
    Sampling(temperature=2.0, top_p=0.5, frequency_penalty=-0.1, repetition_penalty=0.9),
    Sampling(temperature=0.0, bad_words=("x",), repetition_penalty=1.1),
    Sampling(temperature=0.6),
]


def test_a_text_does_not_depend_on_its_batch() -> None:
    """Guards: settings, penalties or random numbers that go by the row instead of the slot when
    rows leave, come or change places."""
    steps, count = 30, len(MIXED)
    logits = torch.randn(count, steps, 257, generator=torch.Generator().manual_seed(5)) * 3
    alone = []
    for i, asked in enumerate(MIXED):
        sampler = Sampler(1, TOKENIZER, 257, CPU)
        sampler.begin(0, asked, PROMPT, i)
        one = np.zeros(1, dtype=np.int64)
        alone.append([int(sampler.choose(x[None], one, one + t)) for t, x in enumerate(logits[i])])
    random = np.random.default_rng(0)
    sampler = Sampler(4, TOKENIZER, 257, CPU)
    texts: list[list[int]] = [[] for _ in MIXED]
    slots = {}
    waiting, free = list(range(count)), [0, 1, 2, 3]
    places = np.zeros(4, dtype=np.int64)  # one array for all steps, as a caller may have it
    while waiting or slots:
        while waiting and free:
            i = waiting.pop()
            slots[i] = free.pop(random.integers(len(free)))
            sampler.begin(slots[i], MIXED[i], PROMPT, i)
        rows = [i for i in random.permutation(list(slots)) if random.random() < 0.7]
        if rows:
            positions = np.array([len(texts[i]) for i in rows])
            x = torch.stack([logits[i, len(texts[i])] for i in rows])
            places[: len(rows)] = [slots[i] for i in rows]
            ids = sampler.choose(x, places[: len(rows)], positions)
            for i, token in zip(rows, ids.tolist(), strict=True):
                texts[i].append(token)
                if len(texts[i]) == steps:
                    free.append(slots.pop(i))
    assert texts == alone


@pytest.mark.parametrize("asked", MIXED)
def test_a_new_text_begins_afresh(asked: Sampling) -> None:
    """Guards: penalties or half a bad word left over from the text that had the slot before."""
    logits = torch.randn(20, 257, generator=torch.Generator().manual_seed(8)) * 2
    zero = np.zeros(1, dtype=np.int64)
    used, texts = Sampler(1, TOKENIZER, 257, CPU), []
    for sampler in (used, used, Sampler(1, TOKENIZER, 257, CPU)):
        sampler.begin(0, asked, PROMPT if texts else [5, 6, *range(60, 150)], 0)
        texts.append([int(sampler.choose(x[None], zero, zero + t)) for t, x in enumerate(logits)])
    assert texts[1] == texts[2]


def test_the_logits_stay_as_they_are() -> None:
    """Guards: log-probabilities reported after a penalty that was applied in place."""
    logits = torch.randn(len(MIXED), 257, generator=torch.Generator().manual_seed(7))
    before = logits.clone()
    sampler = Sampler(len(MIXED), TOKENIZER, 257, CPU)
    for slot, asked in enumerate(MIXED):
        sampler.begin(slot, asked, PROMPT, 0)
    for position in range(3):
        sampler.choose(logits, np.arange(len(MIXED)), np.full(len(MIXED), position))
    assert torch.equal(logits, before)


def test_a_prompt_has_tokens_beyond_the_vocabulary() -> None:
    """Guards: an index error for ids of a padded head, given as --prompt-tokens."""
    sampler = Sampler(1, TOKENIZER, 5, CPU)
    sampler.begin(0, Sampling(temperature=0.0, repetition_penalty=9.0), [4, 7, 5], 0)
    zero = np.zeros(1, dtype=np.int64)
    assert sampler.choose(torch.tensor([ROWS[0]]), zero, zero).tolist() == [3]


def test_the_number_of_candidates_decides_nothing() -> None:
    """Guards: a nucleus or a tie wider than the candidates is cut off with them."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 300, generator=generator) * torch.tensor(
        [[0.0], [0.3], [2.0], [9.0], [1.0], [3.0]]
    )
    logits[4] = logits[4].round()
    scaled = filters.scale(logits, torch.ones(6, 1))
    best = scaled.softmax(-1).amax(-1).numpy()
    order = scaled.sort(descending=True).values
    for k, p in itertools.product([1, 7, 50, 299, 300], [0.01, 0.9, 0.999, math.inf]):
        top_k = np.full(6, k)
        top_p = np.full(6, p)
        expected = []
        for row in order.tolist():
            q = softmax([x if x >= row[k - 1] else -math.inf for x in row])
            before = [0.0, *itertools.accumulate(q[:-1])]
            kept = [x for x, b, r in zip(row, before, q, strict=True) if r and b < p - 1e-9]
            limited = k < 300 or p < math.inf
            expected.append(kept[-1] if limited else -math.inf)
        for candidates in (1, 7, 50, 299, 1024):
            got = filters.smallest_kept(scaled, best, top_k, top_p, candidates)
            assert got.tolist() == expected, (k, p, candidates)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-30, 1e-3, 1.0, 1e30, 1e308])
@pytest.mark.parametrize("penalty", [1e-320, 0.5, 1e308])
def test_extreme_settings_stay_in_the_vocabulary(temperature: float, penalty: float) -> None:
    """Guards: inf - inf in fp32, which would draw token 0 or crash."""
    for more in (0.0, 1e308, -1e308):
        asked = Sampling(
            temperature=temperature,
            top_k=4,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=penalty,
            presence_penalty=more,
            frequency_penalty=more,
        )
        sampler = Sampler(5, TOKENIZER, 5, CPU)
        for slot in range(5):
            sampler.begin(slot, asked, PROMPT, slot)
        texts = []
        for position in range(6):
            got = sampler.choose(torch.tensor(ROWS), np.arange(5), np.full(5, position))
            texts.append(got.tolist())
        assert all(0 <= token < 5 for row in texts for token in row)
        plain = penalty == 0.5 and temperature <= 1.0
        if plain and more > 0.0:
            assert all(set(text) == set(range(5)) for text in zip(*texts[:5], strict=True))
        if plain and more < 0.0:
            assert all(len(set(text)) == 1 for text in zip(*texts, strict=True))


def test_temperature_near_zero_is_greedy() -> None:
    """Guards: overflow when logits are divided by a tiny temperature."""
    rows = [[x * 1000 for x in ROWS[0]], [3e38, 0.0, 1.0, 2.0, -3e38]]
    for row, expected in zip(rows, (4, 0), strict=True):
        assert first_tokens([row], Sampling(temperature=1e-30), 50) == [[expected] * 50]


def test_non_finite_logits_are_a_checkpoint_error() -> None:
    """Guards: nan logits that argmax or sampling silently turns into a token."""
    for bad in (math.nan, math.inf, -math.inf):
        logits = torch.tensor(ROWS)
        logits[2, 3] = bad
        with pytest.raises(CheckpointError, match="produces non-finite logits"):
            check_finite(logits)
    check_finite(torch.tensor(ROWS))
    check_finite(torch.full((5, 5), 3e38))  # their sum is not finite
