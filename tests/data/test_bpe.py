"""Learning BPE: the same result in every process, whole documents, the pattern for CJK scripts."""

import argparse
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import regex
import tiktoken
from tokenizers import Regex, pre_tokenizers

from gptcli.data import bpe
from gptcli.data.bpe import learn_ranks, whole_words
from gptcli.data.tiktoken_tables import PATTERNS
from gptcli.data.tokenizer import train_bpe

MIXED = (
    "Hello世界，你好World3天 2024年3月5日（水）カタカナーとひらがなー漢字交じり文。\n"
    "한국어 텍스트는 띄어쓰기를 한다. abc가나다def 𠮷野家 〆切 々 コーヒー ｶﾀｶﾅ ㄅㄆㄇ Ελληνικά "
    "русский don't I'LL we're l'été naïve e\u0301 ＡＢＣ１２３ ①② \t\r\n\n  「引用」…… --- "
    "12345678 हिन्दी ไทย\u3000全角\n"
)


def english() -> str:
    return Path(str(argparse.__file__)).read_text(encoding="utf-8")


def chinese(characters: int, seed: int = 0) -> str:
    """Words of one to four characters in clauses, without spaces."""
    rng = random.Random(seed)
    words = [
        "".join(chr(rng.randrange(0x4E00, 0x5200)) for _ in range(k % 4 + 1)) for k in range(99)
    ]
    clauses = ["".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(characters // 12)]
    return "，".join(clauses)


def library_split(pattern: str, text: str) -> list[str]:
    pieces = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated").pre_tokenize_str(text)
    return [piece for piece, _ in pieces]


def tiktoken_split(pattern: str, text: str, words: list[str]) -> list[str]:
    """tiktoken tells no words, but with every expected word a token, other words show."""
    ranks = {bytes([b]): b for b in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    encoding = tiktoken.Encoding(
        "words", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
    )
    tokens = encoding.encode_ordinary(text)
    return [encoding.decode_single_token_bytes(t).decode("utf-8", "replace") for t in tokens]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_libraries_split_alike(pattern: str):
    """Guards against words learned by one regex engine that the other never cuts out of a text."""
    rng = random.Random(1)
    shuffled = "".join(rng.choices([*MIXED, *map(chr, range(0x3000, 0x3400, 3))], k=20_000))
    for text in (MIXED, shuffled, english()):
        words = library_split(pattern, text)
        assert "".join(words) == text
        assert tiktoken_split(pattern, text, words) == words


def test_cjk_words_are_apart_from_latin_ones_and_short():
    """Guards against clauses learned as words, and Latin letters glued to them."""
    words = library_split("cjk", "Hello世界World3天，你好カタカナひらがな한국어 텍스트")
    wanted = [
        "Hello",
        "世界",
        "World",
        "3",
        "天",
        "，你好",
        "カタカナ",
        "ひらがな",
        "한국어",
        " 텍스트",
    ]
    assert words == wanted
    assert max(map(len, library_split("cjk", "漢" * 1000))) == 4
    # Where there is no CJK, it is gpt4.
    assert library_split("cjk", english()) == library_split("gpt4", english())


def test_cjk_learns_chinese_words():
    """Guards against a pattern under which BPE finds no words: bytes a token far above 3."""
    text, held_out = chinese(60_000), chinese(5_000, seed=0)[-20_000:]
    tokenizer = train_bpe([text], 4096, "cjk", 10**9)
    assert len(held_out.encode()) / len(tokenizer.encode(held_out)) > 4.0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_unspaced_text_is_encoded_in_time(pattern: str):
    """D11: guards against quadratic time on 300,000 characters without a space, or a million ^."""
    tokenizer = train_bpe([english(), chinese(3000), "^" * 64], 1000, pattern, 10**9)
    rng = random.Random(2)
    letters = "".join(rng.choices("abcdefgh", k=300_000))
    for text in (letters, "a" * 300_000, chinese(300_000), "中" * 300_000, "^" * 1_000_000):
        begun = time.process_time()
        tokens = tokenizer.encode_numpy(text)
        assert time.process_time() - begun < 2.0
        assert tokenizer.decode(tokens.tolist()) == text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_unspaced_text_is_learned_in_time(pattern: str):
    """D11: guards against learning in quadratic time from 300,000 letters or a million ^."""
    runs = ["x" * 300_000, "^" * 1_000_000, " " * 300_000, "7" * 300_000, "中" * 300_000]
    begun = time.process_time()
    tokenizer = train_bpe([english(), *runs, "".join(runs)], 700, pattern, 10**9)
    assert time.process_time() - begun < 5.0
    assert tokenizer.vocab_size == 700
    records = [{"part": k, "text": runs[0][:65_536]} for k in range(5)]
    assert train_bpe(whole_words(records), 262, pattern, 10**9).vocab_size == 262


@pytest.mark.parametrize("pattern", PATTERNS)
def test_only_long_runs_are_cut(pattern: str, monkeypatch: pytest.MonkeyPatch):
    """Guards against other words learned from English, Chinese and code because runs are cut."""
    texts = [english(), chinese(30_000), MIXED * 9, "=" * 240 + "\n" + " " * 200 + "x" * 240]
    cut = train_bpe(texts, 1200, pattern, 10**9)
    assert all(list(bpe._without_long_words(text)) == [text] for text in texts)
    monkeypatch.setattr(bpe, "_without_long_words", lambda text: iter([text]))
    assert train_bpe(texts, 1200, pattern, 10**9).identity == cut.identity


def test_long_runs_are_found_wherever_they_are():
    """Guards against runs missed between the places that are looked at."""
    kinds = (r"\p{L}", r"\p{N}", r"\s", r"[^\s\p{L}\p{N}]")
    longer = regex.compile("|".join(rf"(?<!{kind}){kind}{{241,}}+" for kind in kinds))
    rng = random.Random(3)
    lengths = [1, 3, 119, 120, 121, 239, 240, 241, 242, 360, 500, 1000]
    for _ in range(1000):
        parts = [rng.choice("a1 ^中") * rng.choice(lengths) for _ in range(rng.randint(0, 8))]
        text = "".join(parts)
        assert list(bpe._long_runs(text)) == [run.span() for run in longer.finditer(text)]
        pieces = list(bpe._without_long_words(text))
        assert "".join(pieces) == text
        assert not any(longer.search(piece) for piece in pieces)


_TRAIN = """
import sys
from gptcli.data.tokenizer import train_bpe
text = open(sys.argv[1], encoding="utf-8").read()
print(train_bpe(text.splitlines(keepends=True), 1500, "cjk", 10**9).identity)
"""


def test_every_process_learns_the_same(tmp_path: Path):
    """Guards against an order of hashing or threads that decides between equally frequent pairs."""
    path = tmp_path / "text.txt"
    path.write_text(english() + chinese(20_000), encoding="utf-8")
    identities = set()
    for seed, threads in (("1", "1"), ("2", "2"), ("3", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", _TRAIN, str(path)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        identities.add(done.stdout.strip())
    assert len(identities) == 1


def pieces_of(text: str, size: int) -> list[dict[str, object]]:
    return [
        {"part": k, "text": text[k * size : (k + 1) * size]} for k in range(-(-len(text) // size))
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_teach_as_whole_documents_do(pattern: str):
    """Guards against words cut at the ends of pieces: half words would be learned."""
    documents = [
        english()[:30_000],
        MIXED * 20,
        "no border" * 50,
        "",
        " ",
        english()[30_000:50_000],
    ]
    records = [record for text in documents for record in pieces_of(text, 97)]
    texts = list(whole_words(records))
    assert "".join(texts) == "".join(documents)
    assert len(texts) > 200
    whole = learn_ranks(documents, 1200, pattern, 10**9)
    assert learn_ranks(texts, 1200, pattern, 10**9) == whole
    naive = [str(record["text"]) for record in records]
    assert learn_ranks(naive, 1200, pattern, 10**9) != whole  # the test can tell


def test_a_document_without_word_ends_is_not_held_in_memory():
    """Guards against a file of one unspaced line read whole before anything is learned."""
    texts = list(whole_words({"part": k, "text": "中" * 65_536} for k in range(20)))
    assert max(map(len, texts)) <= 6 * 65_536
    assert sum(map(len, texts)) == 20 * 65_536


def test_a_small_corpus_says_so(caplog: pytest.LogCaptureFixture):
    """Guards against a vocabulary smaller than asked for without a word."""
    with caplog.at_level(logging.WARNING, "gptcli"):
        assert train_bpe(["ab"], 5000, "cjk", 10**9).vocab_size == 258
    assert "too small for 5,000 tokens: the tokenizer has 258" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "gptcli"):
        train_bpe([english()], 300, "cjk", 10**9)
    assert not caplog.records
