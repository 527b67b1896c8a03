"""Verbatim continuations against real decoding; shared runs against a search of all of them."""

import random

import numpy as np
import pytest
import torch

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import resolve_device
from gptcli.evaluation import memorization
from gptcli.evaluation.memorization import (
    LEAST_RUN,
    PassageSample,
    SharedRuns,
    passage_sizes,
    verbatim_rates,
)
from gptcli.evaluation.statistics import share_interval
from gptcli.generation.engine import Request, decode
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT, initialise

BYTES = Tokenizer.of_bytes()
CPU = resolve_device("cpu")


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights that depend on the whole context."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=24, zero_init_output=False)
    made = GPT(config, BYTES.vocab_size)
    initialise(made, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
            parameter.add_(noise * 0.3)
    return made.eval()


def greedy(model: GPT, prefixes: np.ndarray, tokens: int) -> list[list[int]]:
    sampling = Sampling(temperature=0.0, max_new_tokens=tokens)
    requests = [Request("", prefix.tolist(), sampling) for prefix in prefixes]
    return [samples[0].tokens for _, samples in decode(model, BYTES, requests)]


def test_same_as_decoding(model: GPT) -> None:
    """Bug: a passage counts as continued that greedy decoding would not write, or the reverse."""
    prefixes, continuation = passage_sizes(24)
    assert (prefixes, continuation) == ([8], 12)
    rng = np.random.default_rng(1)
    given = rng.integers(256, size=(40, 12))
    continued = [tokens for tokens in greedy(model, given, 12) if len(tokens) == 12]
    assert len(continued) > 20  # the others met eot
    passages = np.concatenate([given[: len(continued)], continued], axis=1)
    passages[::3, -1] ^= 1  # one wrong token at the very end
    (twelve, four) = verbatim_rates(model, passages, [12, 4], 12, CPU)
    for rate, prefix in ((twelve, 12), (four, 4)):
        written = greedy(model, passages[:, 12 - prefix : 12], 12)
        right = [w == p for w, p in zip(written, passages[:, 12:].tolist(), strict=True)]
        assert (rate.prefix_tokens, rate.verbatim) == (prefix, sum(right))
        assert rate.share == sum(right) / len(passages)
    wrong = len(passages[::3])
    assert twelve.verbatim == len(passages) - wrong
    assert twelve.right_tokens == pytest.approx(12 - wrong / len(passages))
    assert four.verbatim < twelve.verbatim
    stop.request(2)
    with pytest.raises(stop.Stopped):
        verbatim_rates(model, passages, [12], 12, CPU)


def test_sizes() -> None:
    """Bug: prefix and continuation together are longer than the block of a small model."""
    assert passage_sizes(1024) == ([8, 16, 32, 64], 32)
    assert passage_sizes(64) == ([8, 16, 32], 32)
    assert passage_sizes(8) == ([4], 4)


def test_sample_is_even() -> None:
    """Bug: long or early texts give too many or too few passages, or passages overlap."""
    texts = [np.arange(100), np.arange(1000, 1009), np.arange(2000, 2900)]  # 10, 0 and 90 passages
    first = 0
    for seed in range(40):
        sample = PassageSample(20, 10, seed)
        for text in texts:
            sample.add(text)
        found = sample.passages
        assert found.shape == (20, 10)
        assert all((row == np.arange(row[0], row[0] + 10)).all() for row in found)
        assert all(begin % 10 == 0 for begin in found[:, 0])
        assert len(set(found[:, 0])) == 20
        first += int((found[:, 0] < 100).sum())
    assert 50 <= first <= 110  # 80 on average, of 800
    few = PassageSample(200, 10)
    for text in texts:
        few.add(text)
    assert len(few.passages) == 100
    assert PassageSample(5, 10).passages.shape == (0, 10)


def longest_shared(text: bytes, documents: list[bytes]) -> int:
    """The oracle: every run of the text, looked for in every document."""
    best = 0
    for begin in range(len(text)):
        while any(text[begin : begin + best + 1] in d for d in documents):
            if begin + best + 1 > len(text):
                break
            best += 1
    return best


def test_shared_runs() -> None:
    """Bug: a longer run is missed at a piece's border or at an odd place, or parts of two documents
    are taken for one."""
    chosen = random.Random(2)
    documents = [bytes(chosen.choices(b"ab", k=2000)) for _ in range(6)]
    texts = []
    for length in (31, 37, 60, 200):
        document = chosen.choice(documents)
        begin = chosen.randrange(len(document) - length)
        copied = document[begin : begin + length]
        before, after = bytes(chosen.choices(b"ab", k=15)), bytes(chosen.choices(b"xy", k=9))
        texts.append(before + copied + after)
    texts += [b"nothing like it" * 4, b"", documents[0][-40:] + documents[1][:40]]
    runs = SharedRuns(texts)
    for number, document in enumerate(documents):
        for begin in range(0, len(document), 300):
            runs.add(document[begin : begin + 300], f"document {number}", begin == 0)
    for text, found in zip(texts, runs.found, strict=True):
        expected = longest_shared(text, documents)
        if expected < LEAST_RUN:
            assert found is None
            continue
        assert found is not None
        assert len(found.data) == expected
        assert found.data in text
        assert found.data in documents[int(found.document.split()[1])]


def test_interval_of_a_share() -> None:
    """Bug: no hits at all are reported as certainly none."""
    assert share_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert share_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert share_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="at least one"):
        share_interval(0, 0)


def test_shared_runs_of_repetitive_text() -> None:
    """Bug: a run is looked up from the middle of another alone, and is cut short there."""
    chosen = random.Random(4)
    for trial in range(60):
        weights = (chosen.choice((1, 9)), 1)
        documents = [bytes(chosen.choices(b"ab", weights, k=150)) for _ in range(2)]
        texts = [bytes(chosen.choices(b"ab", weights, k=70)) for _ in range(3)]
        texts += [documents[trial % 2][9:70], b"a" * 50]
        runs = SharedRuns(texts)
        for number, document in enumerate(documents):
            runs.add(document[:80], str(number), True)
            runs.add(document[80:], str(number), False)
        for text, found in zip(texts, runs.found, strict=True):
            expected = longest_shared(text, documents)
            assert (len(found.data) if found else 0) == (expected if expected >= LEAST_RUN else 0)
            assert found is None or found.data in documents[int(found.document)]


def test_blanks_are_no_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: blanks against blanks compare every place with every other, and nothing stops that."""
    calls = []
    plain = memorization._common_prefix

    def counted(one: bytes, other: bytes) -> int:
        calls.append(len(one))
        return plain(one, other)

    monkeypatch.setattr(memorization, "_common_prefix", counted)
    runs = SharedRuns([b" " * 200 + b"x"])
    runs.add(b" " * 3200, "blanks", True)
    (found,) = runs.found
    assert found is not None
    assert len(found.data) == 200
    assert len(calls) < 2 * (3200 + 200)  # of 37,000 hits
    stop.request(2)
    with pytest.raises(stop.Stopped):
        runs.add(b" " * 3200, "blanks", True)
