"""tokenizer.json written from our tokenizers, against the library `tokenizers`."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import Metaspace

from gptcli.data.bpe import learn_ranks
from gptcli.data.special_tokens import EOT_TEXT, SpecialTokens
from gptcli.data.tiktoken_tables import GPT2_PATTERN, GPT4_PATTERN, PATTERNS, named_encoding
from gptcli.data.tokenizer import Tokenizer, load_tokenizer_json, train_bpe
from gptcli.errors import DataError
from gptcli.generation.prompt import encode_prompt
from gptcli.interop.tokenizer_export import merges_of, token_name, tokenizer_files, tokenizer_json

TEXT = """The quick brown fox doesn't jump over 12345 lazy dogs. def f(x): return x + 1
床前明月光,疑是地上霜。举头望明月,低头思故乡。 Und über allem: Straße, naïve café 🙂
"""
TEXTS = [
    TEXT,
    "",
    " ",
    EOT_TEXT,
    f"a{EOT_TEXT}b",
    "  \n\n\t  x\r\n",
    "e\u0301\u212b",
    "1234567 3.14",
    "👩\u200d👩\u200d👧 🇩🇪",
    "if x:\n    return {}\n",
]
BYTES = {bytes([b]): b for b in range(256)}


def library(tokenizer: Tokenizer) -> Library:
    read = Library.from_str(tokenizer_json(tokenizer).decode())
    read.encode_special_tokens = True
    return read


def written(tokenizer: Tokenizer, folder: Path) -> Path:
    for name, content in tokenizer_files(tokenizer, 64).items():
        (folder / name).write_bytes(content)
    return folder / "tokenizer.json"


def made(kind: str) -> Tokenizer:
    if kind == "bytes":
        return Tokenizer.of_bytes()
    if kind in PATTERNS:
        return train_bpe([TEXT] * 3, 340, kind, 10**6)
    ranks = learn_ranks([TEXT] * 3, 340, "gpt4", 10**6)
    size = len(ranks)
    names = {"<bos>": size + 7, "<end>": size + 2, "<|im_end|>": size + 9, "<tag>": size}
    special = SpecialTokens(names, "<end>", "<bos>", ("<tag>",), (size + 9,))
    return Tokenizer("file", ranks, PATTERNS["gpt4"], size + 2, special, nfc=True)


@pytest.mark.parametrize("kind", ["bytes", *PATTERNS, "special"])
def test_library_gives_our_ids(kind: str, tmp_path: Path):
    """Merges in another order, another split, or a start token that is not put before a text."""
    tokenizer = made(kind)
    read = library(tokenizer)
    for text in [*TEXTS, "a<tag>b<bos> c<end><|im_end|>"]:
        assert read.encode(text).ids == encode_prompt(tokenizer, text)


@pytest.mark.parametrize("kind", ["bytes", *PATTERNS, "special"])
def test_read_back(kind: str, tmp_path: Path):
    """A model that is exported and imported again would begin or end its texts otherwise."""
    tokenizer = made(kind)
    read = load_tokenizer_json(written(tokenizer, tmp_path))
    assert (read.eot, read.start) == (tokenizer.eot, tokenizer.start)
    assert read.vocab_size == tokenizer.vocab_size
    assert read.special.in_text == tokenizer.special.in_text
    assert read.nfc == tokenizer.nfc == (kind == "special")
    assert type(read) is Tokenizer  # tiktoken's speed is kept
    for text in [*TEXTS, "a<tag>b<bos>"]:
        assert encode_prompt(read, text) == encode_prompt(tokenizer, text)


def test_pairs_make_their_tokens():
    """A pair whose union is another token would shift all later merges."""
    ranks = learn_ranks([TEXT] * 3, 340, "gpt4", 10**6)
    pairs, reached = merges_of(ranks)
    assert reached
    assert [ranks[a + b] for a, b in pairs] == list(range(256, len(ranks)))


def test_token_that_its_bytes_do_not_reach():
    """tiktoken takes a whole word for a token, and any two neighbours; a list of pairs does not."""
    ranks = {**BYTES, b"bc": 256, b"ab": 257, b"abc": 258, b"abcd": 259, b"xyz": 260}
    tokenizer = Tokenizer("file", ranks, GPT2_PATTERN, 261)
    assert merges_of(ranks)[1] is False
    read = library(tokenizer)
    for text in ("xyz", "axyz", "abc", "abcd", "abcabcd xyz", "zabcdxyz", " xyz"):
        assert read.encode(text).ids == [261, *tokenizer.encode(text)]


def test_ids_with_gaps():
    """The library gives added tokens the next free ids, not those they have (cl100k_base's eot)."""
    tokenizer = Tokenizer("file", {**BYTES, b"ab": 300}, GPT4_PATTERN, 512)
    assert library(tokenizer).encode("ab").ids == [512, 300]


def test_split_that_the_library_reads_otherwise():
    """tiktoken drops what a pattern does not match, the library keeps it: other ids, silently."""
    with pytest.raises(DataError, match="other ids"):
        tokenizer_json(Tokenizer("file", {**BYTES, b"ab": 256}, r"\p{L}+", 257))


def test_special_token_that_is_ordinary_text():
    """One name for two ids: the vocabulary of a tokenizer.json would lose one of them."""
    special = SpecialTokens({"ab": 300}, "ab")
    with pytest.raises(DataError, match="'ab' is an ordinary token"):
        tokenizer_json(Tokenizer("file", {**BYTES, b"ab": 256}, GPT2_PATTERN, 300, special))


def test_tokenizer_without_a_start():
    """With neither bos nor eot a template would name no token."""
    tokenizer = Tokenizer("file", BYTES, GPT2_PATTERN, None)
    files = tokenizer_files(tokenizer, 64)
    assert library(tokenizer).encode("ab").ids == [97, 98]
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["add_bos_token"]) == (
        None,
        None,
        False,
    )


def test_no_tokenizer():
    """A model of bare ids gets no tokenizer files that nobody could use."""
    assert tokenizer_files(Tokenizer.of_ids(7), 64) == {}


def sentencepiece_like(folder: Path, with_bos: bool) -> Tokenizer:
    """A tokenizer that tiktoken cannot do."""
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -1.0), ("▁a", -1.5)]
    vocabulary += [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz<>|/ "]
    model = Library(Unigram(vocabulary, unk_id=0))
    model.pre_tokenizer = Metaspace()
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": with_bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer_json(folder / "tokenizer.json")


@pytest.mark.parametrize("with_bos", [True, False])
def test_library_tokenizer(with_bos: bool, tmp_path: Path):
    """The original file puts no start before a text, or its own rule beside tokenizer_config."""
    tokenizer = sentencepiece_like(tmp_path, with_bos)
    assert tokenizer.kind == "hf"
    assert token_name(tokenizer, tokenizer.start) == ("<s>" if with_bos else "</s>")
    out = tmp_path / "out"
    out.mkdir()
    read = load_tokenizer_json(written(tokenizer, out))
    assert (read.eot, read.start) == (tokenizer.eot, tokenizer.start)
    direct = library(tokenizer)
    assert read.prompt_start == tokenizer.prompt_start == (tokenizer.bos if with_bos else None)
    for text in ("a fox", "  x", "a</s>b", "ü"):
        assert direct.encode(text).ids == encode_prompt(tokenizer, text)
        assert encode_prompt(read, text) == encode_prompt(tokenizer, text)


def test_end_that_was_added_to_a_library_tokenizer(tmp_path: Path):
    """The eot that training needed is in no tokenizer.json; without it texts would not end."""
    vocabulary = {"<unk>": 0, **{letter: i + 1 for i, letter in enumerate("abcdefgh ")}}
    Library(BPE(vocabulary, [], unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer_json(tmp_path / "tokenizer.json", needs_eot=True)
    assert tokenizer.kind == "hf"
    read = library(tokenizer)
    assert read.encode("abc").ids == [10, 1, 2, 3]
    assert read.token_to_id(EOT_TEXT) == tokenizer.eot == 10


@pytest.mark.parametrize(
    "name", ["gpt2", pytest.param("cl100k_base", marks=pytest.mark.slow)], ids=str
)
def test_published_tables(name: str):
    """Merges derived from 50,000 and 100,000 ranks, each of which must be the published one."""
    try:
        found = named_encoding(name)
    except DataError as error:
        pytest.skip(error.message)
    tokenizer = Tokenizer(name, found.ranks, found.pattern, found.eot)
    read = library(tokenizer)
    for text in TEXTS:
        assert read.encode(text).ids == encode_prompt(tokenizer, text)
