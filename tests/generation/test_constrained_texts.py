"""Texts held to a constraint: random models, every kind of tokenizer, oracles by brute force."""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, normalizers
from tokenizers.models import BPE

from gptcli.config.model_schema import ModelConfig
from gptcli.data.special_tokens import SpecialTokens
from gptcli.data.tokenizer import Tokenizer, load_tokenizer_json, train_bpe
from gptcli.errors import ConfigError
from gptcli.generation import grammar
from gptcli.generation.constraint import Constraint
from gptcli.generation.engine import Request, decode, generate_samples
from gptcli.generation.grammar import Vocabulary, check_spelled, vocabulary_of
from gptcli.generation.row import Generated
from gptcli.generation.sampling import Sampler, Sampling
from gptcli.model.gpt import GPT

pytest.importorskip("llguidance", reason="needs the extra constrain")

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?-_+*/'\"(){}[]\\\n"
TEXT = "the cat sat on the mat, and the hat: é 好 🙂 12345 yes no maybe true false null " * 20


def library(vocabulary: list[str], merges: list[tuple[str, str]], decoder: Any, **model: Any):
    ids = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *vocabulary])}
    made = Library(BPE(vocab=ids, merges=merges, unk_token="<unk>", **model))
    made.decoder = decoder
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def characters() -> Library:
    """A token a character, and no other character can be written."""
    return library(list(LETTERS + "é好"), [], decoders.Fuse())


def pieces() -> Library:
    """As sentencepiece: ▁ for a space, bytes as tokens, some of them besides as characters."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [
        ("▁", "y"),
        ("▁y", "e"),
        ("▁ye", "s"),
        ("n", "o"),
        ("t", "r"),
        ("tr", "u"),
        ("1", "2"),
    ]
    words = [*LETTERS.replace(" ", "▁"), "é", *(a + b for a, b in merges)]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    made = library([*byte_tokens, *words], merges, decoder, byte_fallback=True, fuse_unk=True)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return made


def published(made: Library, folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    return load_tokenizer_json(folder / "tokenizer.json")


def more_ends(_: Path) -> Tokenizer:
    """Two ids that end a text, one of them an ordinary word, and ids that are no token."""
    ranks = {bytes([b]): b for b in range(256)} | {b"no": 300, b"true": 301}
    special = SpecialTokens({"<|endoftext|>": 280, "<s>": 290}, more_ends=(300,))
    return Tokenizer("gaps", ranks, r"[\s\S]", 280, special)


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "bytes": lambda _: Tokenizer.of_bytes(),
    "bpe": lambda _: train_bpe([TEXT], 300, "gpt4", 10**6),
    "characters": lambda folder: published(characters(), folder),
    "pieces": lambda folder: published(pieces(), folder),
    "more ends": more_ends,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return KINDS[request.param](tmp_path_factory.mktemp("kind"))


def random_model(vocab_size: int, seed: int = 3, block_size: int = 24, **shape: Any) -> GPT:
    """Weights wide enough that every token has its turn."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "tie_embeddings": False, **shape}
    model = GPT(ModelConfig(block_size=block_size, **shape), vocab_size)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = float(parameter.ndim == 1 and name.endswith("weight"))  # norms
        parameter.data.normal_(mean, 0.5 if parameter.ndim > 1 else 0.1, generator=generator)
    return model.requires_grad_(False).eval()


def texts(model: GPT, tokenizer: Tokenizer, asked: Sampling, n: int, **how: Any) -> list[Generated]:
    [(_, samples)] = decode(model, tokenizer, [Request("", [1], asked, n)], **how)
    return samples


PERSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "ok": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["a", "no", "é"]}, "maxItems": 3},
    },
    "required": ["age", "ok", "tags"],
    "additionalProperties": False,
}


def is_person(text: str) -> bool:
    found = json.loads(text)
    return (
        list(found) == ["age", "ok", "tags"]
        and type(found["age"]) is int
        and 0 <= found["age"] <= 120
        and type(found["ok"]) is bool
        and len(found["tags"]) <= 3
        and set(found["tags"]) <= {"a", "no", "é"}
    )


WORDS = ["yes", " yes", "no", "not", "true", "12", "é好"]
LINES = "(?i)(yes|no| é)(, (12|好.)){0,4}[^a-z/]"
LIST = {"type": "array", "items": {"type": "integer"}, "maxItems": 2}
CASES: dict[str, tuple[Callable[[], Constraint], Callable[[str], Any]]] = {
    "choices": (lambda: Constraint.choices(WORDS), WORDS.__contains__),
    "date": (
        lambda: Constraint.regex(r"\d{4}-[01]\d\n?"),
        lambda text: re.fullmatch(r"[0-9]{4}-[01][0-9]\n?", text),
    ),
    "words": (lambda: Constraint.regex(LINES), lambda text: re.fullmatch(LINES, text)),
    "person": (lambda: Constraint.json_schema(PERSON), is_person),
    "list": (
        lambda: Constraint.json_schema(LIST),
        lambda text: all(type(item) is int for item in json.loads(text)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_text_fulfils_it(tokenizer: Tokenizer, case: str) -> None:
    """Guards: tokens whose bytes are taken for others, special tokens as text, a character cut in
    two at the end, an end where the grammar has none; heads that are padded or cut."""
    make, fulfils = CASES[case]
    constraint = make()
    seen = Counter[str]()
    for seed in range(3):
        model = random_model(tokenizer.vocab_size + 7, seed)
        asked = Sampling(constraint=constraint, max_new_tokens=300, seed=seed)
        for sample in texts(model, tokenizer, asked, 16):
            assert fulfils(sample.text), repr(sample.text)
            assert sample.finish_reason in ("stop", "eot")
            assert sample.complete is True
            assert b"".join(map(tokenizer.token_bytes, sample.tokens)) == sample.text.encode()
            seen[sample.text] += 1
    assert len(seen) >= 4


# Tokens that overlap: most choices can be spelled in several ways.
TINY = ["a", "b", "c", "ab", "ba", "abc", "bc"]


def tiny(tokens: list[str] = TINY, ends: bool = True) -> tuple[Tokenizer, int]:
    """A tokenizer whose first ids are `tokens`, then eot (or a special token); and how many."""
    ranks = {token.encode(): i for i, token in enumerate(tokens)}
    eot = len(ranks)
    rest = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    ranks |= {token: eot + 1 + i for i, token in enumerate(rest)}
    special = None if ends else SpecialTokens({"<s>": eot}, None)
    return Tokenizer("tiny", ranks, r"[\s\S]", eot if ends else None, special), eot + 1


CHOICES = [
    ["ab", "abc", "ba"],
    ["a"],
    ["abcabc", "bcbc", "c"],
    ["a", "aa", "aaa", "b"],
    ["cab", "cabba", "abba"],
]


@pytest.mark.parametrize("choices", CHOICES, ids=" ".join)
def test_masks_against_all_texts(choices: list[str]) -> None:
    """Guards: tokens that are allowed only as the tokenizer would choose them; an end that is
    allowed before, or not where, a choice is whole; a grammar that is done too late."""
    tokenizer, size = tiny()
    vocabulary = Vocabulary(tokenizer, size)

    def walk(tokens: list[int]) -> int:
        matcher = vocabulary.matcher(Constraint.choices(choices))
        for token in tokens:
            matcher.advance(token)
        text = "".join(TINY[token] for token in tokens)
        going_on = [i for i, t in enumerate(TINY) if any(c.startswith(text + t) for c in choices)]
        allowed = going_on + [len(TINY)] * (text in choices)
        assert np.flatnonzero(~matcher.banned).tolist() == allowed
        assert matcher.accepting == (text in choices)
        assert matcher.done == (not going_on)
        return 1 + sum(walk([*tokens, token]) for token in going_on)

    assert walk([]) > len(choices)


def chances(model: GPT, size: int, choices: list[str]) -> dict[tuple[int, ...], float]:
    """How likely each sequence of tokens is that spells a choice: the model's probabilities of the
    tokens that can go on, scaled to add up to 1 at each step."""
    found: dict[tuple[int, ...], float] = {}

    def walk(tokens: tuple[int, ...], chance: float) -> None:
        text = "".join(TINY[token] for token in tokens)
        going_on = [i for i, t in enumerate(TINY) if any(c.startswith(text + t) for c in choices)]
        if not going_on:
            found[tokens] = chance
            return
        logits = model(torch.tensor([[1, *tokens]]))[0, -1, :size].double()
        allowed = going_on + [len(TINY)] * (text in choices)
        weights = logits[allowed].softmax(dim=0).tolist()
        for token, weight in zip(allowed, weights, strict=True):
            if token == len(TINY):
                found[tokens] = chance * weight
            else:
                walk((*tokens, token), chance * weight)

    walk((), 1.0)
    return found


@pytest.mark.parametrize("choices", [CHOICES[0], CHOICES[3]], ids=" ".join)
def test_choices_come_as_often_as_the_model_has_them(choices: list[str]) -> None:
    """Guards: probabilities of tokens that are not allowed lost to one of the others, filters that
    count them, an end that is always or never taken."""
    tokenizer, size = tiny()
    model, n = random_model(tokenizer.vocab_size), 4000
    expected = chances(model, size, choices)
    assert math.isclose(sum(expected.values()), 1.0)
    # Cut to the vocabulary of the oracle: the single bytes would spell the choices too.
    cut = random_model(size)
    cut.load_state_dict(
        {
            k: v[:size] if v.size(0) == tokenizer.vocab_size else v
            for k, v in model.state_dict().items()
        }
    )
    samples = texts(cut, tokenizer, Sampling(constraint=Constraint.choices(choices), seed=5), n)
    found = Counter(tuple(sample.tokens) for sample in samples)
    assert found.keys() <= expected.keys()
    for tokens, chance in expected.items():
        deviation = math.sqrt(chance * (1 - chance) / n)
        assert abs(found[tokens] / n - chance) < 4.5 * deviation + 1e-9, tokens


def test_temperature_and_filters_see_allowed_tokens_alone() -> None:
    """Guards: top-k, top-p and min-p that keep only tokens which are banned afterwards."""
    tokenizer, size = tiny()
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0]])
    slot, at = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.9}):
        sampler = Sampler(1, tokenizer, size, torch.device("cpu"))
        asked = Sampling(constraint=Constraint.regex("[abc]"), **settings)
        for seed in range(20):
            sampler.begin(0, replace(asked, seed=seed), [0], 0)
            assert sampler.choose(logits, slot, at).tolist() == [2]
    assert logits[0, 3] == 9.0  # reports of log-probabilities come from these


@pytest.mark.parametrize("how", [{"speculate": True}, {"use_cache": False}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_texts_in_other_ways(how: dict[str, bool], temperature: float) -> None:
    """Guards: guesses that move a grammar on though they are not taken; windows that restart."""
    tokenizer = Tokenizer.of_bytes()
    model = random_model(257)
    asked = Sampling(
        temperature=temperature,
        repetition_penalty=1.1,
        constraint=Constraint.regex("((ab|cd)[12]){40,60}"),
        bad_words=("d1",),
        max_new_tokens=400,
        logprobs=2,
    )
    plain = texts(model, tokenizer, asked, 6)
    other = texts(model, tokenizer, asked, 6, **how)
    assert [s.tokens for s in plain] == [s.tokens for s in other]
    assert [(s.text, s.finish_reason) for s in plain] == [(s.text, s.finish_reason) for s in other]
    assert all(len(sample.tokens) >= 120 for sample in plain)  # five windows
    assert all("d1" not in sample.text for sample in plain)
    if how.get("speculate"):
        assert sum(sample.accepted for sample in other) > 100


def test_rows_of_a_batch_do_not_meet() -> None:
    """Guards: a mask that reaches a neighbour's row, a slot that keeps the last text's grammar, and
    texts without a constraint that change beside one."""
    tokenizer, model = Tokenizer.of_bytes(), random_model(257)
    kinds = [None, Constraint.choices(["yes", "no"]), Constraint.regex("[0-9]{20}"), None]
    kinds.append(Constraint.json_schema(PERSON))
    settings = [
        Sampling(constraint=kinds[i % 5], seed=i, max_new_tokens=12 + i, temperature=0.5 * (i % 3))
        for i in range(80)  # more than enter at once
    ]
    requests = [Request("", [i], asked) for i, asked in enumerate(settings)]
    together = [samples for _, samples in decode(model, tokenizer, requests)]
    for request, samples in list(zip(requests, together, strict=True))[::4]:
        [(_, alone)] = decode(model, tokenizer, [request])
        assert samples == alone
        assert (samples[0].complete is None) == (request.sampling.constraint is None)


def test_logprobs_are_the_models_own() -> None:
    """Guards: probabilities after the mask, which say nothing of what the model thinks."""
    tokenizer, model = Tokenizer.of_bytes(), random_model(257)
    asked = Sampling(constraint=Constraint.regex("[xyz]{8}"), logprobs=3, seed=2)
    [sample] = texts(model, tokenizer, asked, 1)
    assert sample.logprobs is not None
    ids = torch.tensor([[1, *sample.tokens]])
    own = model(ids)[0].log_softmax(dim=-1)
    for i, entry in enumerate(sample.logprobs):
        assert entry["logprob"] == pytest.approx(float(own[i, sample.tokens[i]]), abs=1e-4)
        assert [t[0] for t in entry["top"]] == own[i].topk(3).indices.tolist()


@pytest.mark.parametrize("ends", [True, False])
def test_how_texts_end(ends: bool) -> None:
    """Guards: an end that the model never chose told as its own; a text that is cut told as whole,
    and the reverse; one more token when nothing can follow."""
    tokenizer, size = tiny(ends=ends)
    model = random_model(size)

    def ended(pattern: str, most: int, **more: Any) -> set[tuple[str, str, bool | None]]:
        asked = Sampling(constraint=Constraint.regex(pattern), max_new_tokens=most, **more)
        found = texts(model, tokenizer, asked, 40)
        return {(s.text, s.finish_reason, s.complete) for s in found}

    assert ended("c", 1) == {("c", "stop", True)}
    assert ended("cc", 1) == {("c", "length", False)}
    reasons = {reason for _, reason, _ in ended("c+", 3)}
    assert reasons == ({"eot", "length"} if ends else {"length"})
    assert all(complete for _, _, complete in ended("c+", 3))
    assert ended("ccac{3}", 9, stop=("a",)) == {("cc", "stop", False)}
    assert ended("c{2}(ac)?", 9, stop=("a",)) <= {("cc", "stop", True), ("cc", "eot", True)}


def test_a_text_that_nothing_goes_on_with() -> None:
    """Guards: a token that is not allowed, an exception that ends the other texts of the batch, a
    text that is half done told as whole."""
    tokenizer = Tokenizer.of_bytes()
    cut = random_model(128)  # a head without the bytes of é
    requests = [
        Request("", [1], Sampling(constraint=Constraint.regex("ab(é|è)"), max_new_tokens=9)),
        Request("", [1], Sampling(constraint=Constraint.regex("é"), max_new_tokens=9)),
        Request("", [1], Sampling(constraint=Constraint.regex("ab+c"), bad_words=("b",))),
        Request("", [1], Sampling(constraint=Constraint.regex("a(b|)"), bad_words=("b",))),
        Request("", [1], Sampling(max_new_tokens=9)),
    ]
    found = [samples[0] for _, samples in decode(cut, tokenizer, requests)]
    assert [(s.text, s.finish_reason, s.complete) for s in found[:4]] == [
        ("ab", "failed", False),
        ("", "failed", False),
        ("a", "failed", False),
        ("a", "stop", True),
    ]
    assert found[0].failure == found[1].failure == "none of the model's tokens goes on with it"
    assert found[2].failure == "what the bad words leave does not fulfil it"
    assert found[4] == texts(cut, tokenizer, requests[4].sampling, 1)[0]
    assert len(found[4].tokens) == 9


def test_what_cannot_be_spelled_is_told_before() -> None:
    """Guards: minutes of decoding before the first text shows that there can be none."""
    tokenizer = Tokenizer.of_bytes()
    check_spelled(Constraint.choices(["é", "a"]), tokenizer, 257)
    with pytest.raises(ConfigError, match=r"^choices: .* cannot spell 'é' and 1 more$"):
        check_spelled(Constraint.choices(["é", "a", "aé"]), tokenizer, 128)
    with pytest.raises(ConfigError, match=r"^regex 'é\+': none of the model's tokens"):
        check_spelled(Constraint.regex("é+"), tokenizer, 128)
    words, size = tiny(["ab", "c", "cd"])
    for text in map("".join, itertools.product("abcd", repeat=4)):
        spelled = Vocabulary(words, size).unspelled([text]) == []
        assert spelled == (re.fullmatch("(ab|c|cd)+", text) is not None)


def test_tokens_that_are_no_text(tmp_path: Path) -> None:
    """Guards: the unknown token, which shows as U+FFFD, and special ones, whose names are text, as
    ways to spell either; bytes that UTF-8 never has taken for text."""
    tokenizer = published(characters(), tmp_path)
    names = Constraint.regex("(<unk>|</s>|<s>|\ufffd|.)")
    banned = vocabulary_of(tokenizer, tokenizer.vocab_size).matcher(names).banned
    assert banned[[0, 1, 2]].all()
    assert not banned[3:].all()
    tokenizer = Tokenizer.of_bytes()
    banned = vocabulary_of(tokenizer, 257).matcher(Constraint.regex("(?s).+")).banned
    never = [0xC0, 0xC1, *range(0xF5, 0x100)]  # in UTF-8
    assert banned[never].all()
    assert banned[256]
    assert not banned[:0x80].any()


def test_a_vocabulary_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: 0.2 s for 50,000 tokens at every request, and a grammar compiled for every text;
    grammars kept for ever."""
    made: list[int] = []
    monkeypatch.setattr(grammar, "_spelled", lambda tokenizer, token: made.append(token) or b"a")
    tokenizer = Tokenizer.of_bytes()
    asked = Sampling(constraint=Constraint.regex("a{3}"))
    for _ in range(3):
        sampler = Sampler(4, tokenizer, 257, torch.device("cpu"))
        matchers = [sampler.begin(slot, asked, [0], slot) for slot in range(4)]
    assert len(made) == 257
    assert len({id(matcher._grammar) for matcher in matchers if matcher is not None}) == 1
    assert len({id(matcher) for matcher in matchers}) == 4
    for count in range(1, 100):
        vocabulary_of(tokenizer, 257).matcher(Constraint.regex(f"a{{{count}}}"))
    assert len(vocabulary_of(tokenizer, 257)._recent) == grammar._MOST_KEPT


def test_without_constraints_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: time taken from texts that have no constraint."""
    monkeypatch.setattr(grammar, "library", None)
    monkeypatch.setattr("gptcli.generation.sampling.vocabulary_of", None)
    tokenizer, model = Tokenizer.of_bytes(), random_model(257)
    [sample] = generate_samples(model, tokenizer, [1], 1, Sampling(max_new_tokens=5))
    assert sample.complete is None
    assert "complete" not in sample.to_json()
    logits = torch.zeros(1, 257)
    sampler = Sampler(1, tokenizer, 257, torch.device("cpu"))
    sampler.begin(0, Sampling(), [1], 0)
    kept, dead = sampler._without_banned(logits, sampler._rows_in(np.zeros(1, dtype=np.int64)))
    assert kept is logits
    assert dead == []
