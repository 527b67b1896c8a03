"""Bad words against a search of all texts of tiny vocabularies."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from gptcli.config.model_schema import ModelConfig
from gptcli.data.special_tokens import SpecialTokens
from gptcli.data.tokenizer import Tokenizer
from gptcli.generation.bad_words import BadWords, Vocabulary
from gptcli.generation.engine import Request, decode
from gptcli.generation.sampling import Sampler, Sampling
from gptcli.model.gpt import GPT, initialise

CPU = torch.device("cpu")


def tokenizer_of(tokens: list[bytes]) -> tuple[Tokenizer, int]:
    """A tokenizer whose first ids are `tokens`, then eot; and the number of ids up to eot."""
    ranks = {token: i for i, token in enumerate(tokens)}
    eot = len(ranks)
    rest = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    ranks |= {token: eot + 1 + i for i, token in enumerate(rest)}
    return Tokenizer("tiny", ranks, r"[\s\S]", eot), eot + 1


def strings(alphabet: list[bytes], longest: int) -> list[bytes]:
    """All strings of 1 to `longest` letters."""
    lengths = range(1, longest + 1)
    return [b"".join(s) for n in lengths for s in itertools.product(alphabet, repeat=n)]


AB = strings([b"a", b"b"], 3)


@pytest.mark.parametrize(
    "words",
    [(w.decode(),) for w in strings([b"a", b"b"], 4)]
    + [("ab", "ba"), ("aab", "ab"), ("aba", "bab"), ("abaab", "aabaa"), ("aaaa", "abab", "bbb")],
)
def test_every_text_of_four_tokens(words: tuple[str, ...]) -> None:
    """Guards: a word missed across token borders or inside one, a token banned without need, a
    text forgotten too early where words overlap themselves or each other."""
    tokenizer, vocab_size = tokenizer_of(AB)
    bad = BadWords(words, Vocabulary(tokenizer, vocab_size), tokenizer)

    def follow(text: bytes, pending: bytes, left: int) -> int:
        banned = set(bad.banned(pending).tolist())
        assert vocab_size - 1 not in banned
        for token, spelled in enumerate(AB):
            longer = text + spelled
            assert (token in banned) == any(word.encode() in longer for word in words)
        if left == 0:
            return 1
        allowed = set(range(len(AB))) - banned
        return sum(follow(text + AB[t], bad.advance(pending, t), left - 1) for t in allowed)

    assert follow(b"", b"", 3) >= 1


def test_a_character_cut_into_bytes() -> None:
    """Guards: words compared as characters, which misses one whose bytes are separate tokens."""
    pieces = [bytes([b]) for b in "é🙂".encode()] + ["é".encode(), b"x\xc3", b"\xa9x"]
    tokenizer, vocab_size = tokenizer_of(pieces)
    bad = BadWords(("é",), Vocabulary(tokenizer, vocab_size), tokenizer)
    for tokens in itertools.product(range(len(pieces)), repeat=3):
        pending, text = b"", b""
        for token in tokens:
            completes = "é".encode() in text + pieces[token]
            assert (token in bad.banned(pending).tolist()) == completes
            if completes:
                break
            pending, text = bad.advance(pending, token), text + pieces[token]


def test_words_that_are_no_text() -> None:
    """Guards: a crash for an argument that was no UTF-8; an empty word, which all texts contain."""
    tokenizer = Tokenizer.of_bytes()
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)
    assert BadWords((b"\xff".decode("utf-8", "surrogateescape"),), vocabulary, tokenizer).banned(
        b""
    ).tolist() == [255]
    assert BadWords(("\ud800",), vocabulary, tokenizer).banned(b"").tolist() == []
    with pytest.raises(ValueError, match="empty"):
        BadWords(("a", ""), vocabulary, tokenizer)


def test_tokens_without_text_and_ends_are_free() -> None:
    """Guards: eot banned because of its name's letters, or unused ids that crash."""
    ranks = {bytes([b]): b for b in range(256)} | {b"bad": 300}
    tokenizer = Tokenizer("gaps", ranks, r"[\s\S]", 260)
    bad = BadWords(("<|endoftext|>", "b"), Vocabulary(tokenizer, 301), tokenizer)
    assert bad.banned(b"").tolist() == [ord("b"), 300]
    assert bad.banned(b"<|endoftext|").tolist() == [ord(">"), ord("b"), 300]
    assert Vocabulary(tokenizer, 256).containing(b"bad") == []  # beyond the model's vocabulary
    ends = SpecialTokens({"<|endoftext|>": 260}, more_ends=(ord("b"),))
    tokenizer = Tokenizer("ends", ranks, r"[\s\S]", 260, ends)
    assert BadWords(("b",), Vocabulary(tokenizer, 301), tokenizer).banned(b"").tolist() == [300]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_texts_of_a_batch(temperature: float) -> None:
    """Guards: a ban that reaches the neighbouring rows, or that a slot's next text inherits."""
    tokenizer, vocab_size = tokenizer_of(AB)
    settings = [
        Sampling(temperature=temperature, bad_words=words)
        for words in [(), ("ab",), ("aa", "bbb"), (), ("ab",), ("bab", "abba")]
    ]
    sampler = Sampler(6, tokenizer, vocab_size, CPU)
    generator = torch.Generator().manual_seed(1)
    hit = 0
    for round_ in range(40):
        slots = np.array([(i + round_) % 6 for i in range(6)])
        for slot, asked in zip(slots, settings, strict=True):
            sampler.begin(int(slot), asked, [round_], 0)
        texts = [b""] * 6
        for position in range(8):
            logits = torch.randn(6, vocab_size, generator=generator) * 3
            logits[:, -1] = -50.0
            ids = sampler.choose(logits, slots, np.full(6, position))
            texts = [t + AB[i] for t, i in zip(texts, ids.tolist(), strict=True)]
        for text, asked in zip(texts, settings, strict=True):
            assert not any(word.encode() in text for word in asked.bad_words)
        hit += b"ab" in texts[0]
    assert hit > 30


def test_a_new_text_begins_afresh() -> None:
    """Guards: the end of the slot's last text taken for the beginning of this one."""
    tokenizer, vocab_size = tokenizer_of(AB)
    sampler, zero = Sampler(1, tokenizer, vocab_size, CPU), np.zeros(1, dtype=np.int64)
    for token in (0, 1):  # a, then b of another text
        sampler.begin(0, Sampling(temperature=0.0, bad_words=("ab",)), [0], 0)
        logits = torch.zeros(1, vocab_size)
        logits[0, token] = 1.0
        assert sampler.choose(logits, zero, zero).tolist() == [token]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left(temperature: float) -> None:
    """Guards: a banned token, nan or an exception where no token is allowed; eot banned."""
    tokenizer, vocab_size = tokenizer_of([b"a", b"b", b"ba"])
    asked = Sampling(temperature=temperature, top_p=0.9, top_k=2, bad_words=("a", "b"))
    free = replace(asked, bad_words=())
    logits = torch.tensor([[3.0, 2.0, 1.0, -9.0]]).expand(2, -1)
    slots, positions = np.array([0, 1]), np.zeros(2, dtype=np.int64)
    for size, expected in [(vocab_size, 3), (vocab_size - 1, -1)]:
        sampler = Sampler(2, tokenizer, size, CPU)
        sampler.begin(0, asked, [0], 0)
        sampler.begin(1, free, [0], 0)
        for _ in range(2):
            got = sampler.choose(logits[:, :size], slots, positions).tolist()
            assert got[0] == expected
            assert got[1] in (0, 1)


@pytest.mark.parametrize("speculate", [False, True])
def test_texts_of_a_model(speculate: bool) -> None:
    """Guards: guesses that bring a bad word in, or a text begun in the prompt that counts too."""
    tokenizer = Tokenizer.of_bytes()
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=16, block_size=64), 128)  # ASCII alone
    initialise(model, torch.Generator().manual_seed(1))
    prompt = tokenizer.encode("abcabc")

    def texts(asked: Sampling, speculate: bool) -> list[str]:
        batches = decode(model, tokenizer, [Request("", prompt, asked, 4)], speculate=speculate)
        return [sample.text for sample in next(batches)[1]]

    plain = Sampling(temperature=0.9, top_k=2, max_new_tokens=60, seed=1)
    words = tuple({text[9:12] for text in texts(plain, speculate)})
    asked = replace(plain, bad_words=words)
    got = texts(asked, speculate)
    assert [len(text) for text in got] == [60] * 4
    assert not any(word in text for word in words for text in got)
    assert got == texts(asked, speculate=False)
