"""word2vec and GloVe text files as the first token embeddings."""

import gzip
import hashlib
import json
import logging
import math
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, DataError
from gptcli.interop.word_vectors import check_word_vectors, start_from_word_vectors
from gptcli.model.gpt import GPT, initialise

WIDTH = 4
WORDS = [b"the", b" the", b" The", b"THE", b" cat", b"Cat", b" dog", b" caf\xc3\xa9", b" Paris"]
GLOVE = """\
the 1 2 3 4
cat -2 0 0.5 1e-1
Cat 9 9 9 9
café 4 3 2 1
zebra 7 7 7 7
paris 1 1 1 1
the 5 5 5 5
"""


def words_tokenizer() -> Tokenizer:
    """The 256 bytes, then whole words with and without their space."""
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {word: 256 + i for i, word in enumerate(WORDS)}
    return Tokenizer("bpe", ranks, r"\S+|\s+", len(ranks))


def new_model(tokenizer: Tokenizer, **changes: object) -> GPT:
    shape = {"n_layer": 1, "n_head": 1, "n_embd": WIDTH, "block_size": 8, **changes}
    model = GPT(ModelConfig.model_validate(shape), tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    return model


def expected_rows() -> dict[int, list[float]]:
    """By hand: exact words first, then lower case, a word's first line only."""
    the, cat, capital = [1, 2, 3, 4], [-2, 0, 0.5, 0.1], [9, 9, 9, 9]
    of = {
        b"the": the,
        b" the": the,
        b" The": the,
        b"THE": the,
        b" cat": cat,
        b"Cat": capital,
        b" caf\xc3\xa9": [4, 3, 2, 1],
        b" Paris": [1, 1, 1, 1],
    }
    numbers = [x for row in of.values() for x in row]
    scale = 0.02 / math.sqrt(sum(x * x for x in numbers) / len(numbers))
    return {256 + WORDS.index(word): [scale * x for x in row] for word, row in of.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_file(content: str | bytes, name: str = "vectors.txt") -> Path:
        path = tmp_path / name
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write_file


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("glove", "v.txt"),
        ("word2vec", "v.txt"),
        ("word2vec", "v.txt.gz"),
        ("spaces", "v.vec"),
        ("tabs", "v.tsv"),
    ],
)
def test_rows_by_hand(write: Callable[..., Path], form: str, name: str, tied: bool) -> None:
    """A header read as a word, a lower-case word before the exact one, vectors that are not scaled,
    a tied head that keeps its old rows: each leaves other rows than these."""
    text = {
        "glove": GLOVE,
        "word2vec": f"7 {WIDTH}\n{GLOVE}",
        "spaces": f"7 {WIDTH}\n{GLOVE}".replace("\n", " \r\n"),  # the first tools end lines so
        "tabs": GLOVE.replace(" ", "\t"),
    }[form]
    path, tokenizer = write(text, name), words_tokenizer()
    model = new_model(tokenizer, tie_embeddings=tied)
    before, head = model.wte.weight.clone(), model.head.weight.clone()
    start = start_from_word_vectors(model, tokenizer, path)
    rows = expected_rows()
    for token in range(tokenizer.vocab_size):
        want = torch.tensor(rows[token]) if token in rows else before[token]
        assert torch.allclose(model.wte.weight[token], want, atol=1e-7), token
    assert (model.head.weight is model.wte.weight) is tied
    assert torch.equal(model.head.weight, head) is not tied
    assert (start.words, start.bad_lines) == (7, 0)
    assert (start.matched_tokens, start.lower_cased_tokens) == (8, 3)  # " The", "THE", " Paris"
    assert start.bytes == path.stat().st_size
    assert start.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_scale_is_that_of_the_initialisation() -> None:
    """Were the initialisation changed, the scale of word vectors would no longer be its."""
    weight = new_model(words_tokenizer(), n_embd=64).wte.weight.detach()
    assert float(weight.square().mean().sqrt()) == pytest.approx(0.02, rel=0.05)


def test_bad_lines_are_counted(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """One damaged line in a million must not end a run, nor move the others' words."""
    caplog.set_level(logging.INFO, logger="gptcli")
    bad = b"cat 1 2 3\nbo\xffy 1 2 3 4\n\xff 1 2 3 4\ncat 1 2 three 4\n\n   \n"
    path = write(b"a phrase 1 2 3 4\n" + b"x y 1 1 1 1\n" + bad + GLOVE.encode())
    # The first line's phrase would be read as a word and five numbers.
    with pytest.raises(DataError, match=r":1: not a word and its vector"):
        check_word_vectors(path, WIDTH)
    path = write(GLOVE.encode() + b"a phrase 1 2 3 4\n" + bad)
    model, tokenizer = new_model(words_tokenizer()), words_tokenizer()
    start = start_from_word_vectors(model, tokenizer, path)
    assert (start.words, start.bad_lines, start.matched_tokens) == (8, 4, 8)
    assert f"4 of 12 lines hold no vector and are skipped; the first is {path}:9" in caplog.text


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e99"])
def test_numbers_that_are_not_finite(write: Callable[..., Path], number: str) -> None:
    """One NaN row makes every later loss NaN."""
    path = write(GLOVE + f"dog 1 2 {number} 4\nmouse 1 2 nan 4\n")
    with pytest.raises(DataError, match=rf"{path}:8: the vector of 'dog' holds a number") as error:
        start_from_word_vectors(new_model(words_tokenizer()), words_tokenizer(), path)
    assert error.value.hint


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        (b"", "v.txt", r"v.txt:1: not a word and its vector"),
        (b"5 4\n", "v.txt", r"v.txt:2: not a word and its vector"),
        (b"5 0\nthe\n", "v.txt", r"v.txt:2: not a word and its vector \(no numbers"),
        (b"5 4\nthe \x00\x01\xff\xfe\n\n", "v.bin", r"v.bin:2: not a word and its vector"),
        (b"PK\x03\x04\x00\x00", "v.zip", r"v.zip:1: not a word and its vector"),
        (b"once upon a time there\n", "v.txt", r"\(not all of them numbers\)"),
        (b"x" * (1 << 20), "v.txt", r"v.txt:1: a line of more than 1048576 bytes"),
        (b"word 1 2 3 4\n", "v.txt", "none of its 1 words is a token"),
        (b"the 0 0 0 0\n", "v.txt", "vectors of all matching words are zero"),
        (b"the 1 2 3 4\n" + b"dog 1\n" * 3, "v.txt", "3 of 4 lines hold no vector; the first is"),
    ],
)
def test_what_is_no_file_of_vectors(
    write: Callable[..., Path], content: bytes, name: str, problem: str
) -> None:
    """Binary word2vec, a zip, an empty or another file: refused by name, not with a traceback."""
    path = write(content, name)
    with pytest.raises(DataError, match=problem) as error:
        start_from_word_vectors(new_model(words_tokenizer()), words_tokenizer(), path)
    assert error.value.exit_code == 3


def test_files_that_cannot_be_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    """A missing, cut or mispacked file is the user's to correct, not a bug."""
    cut = write(GLOVE * 3000, "cut.txt.gz")
    cut.write_bytes(cut.read_bytes()[:-40])
    plain = write(GLOVE, "plain.txt")
    plain = plain.rename(tmp_path / "plain.gz")
    for path in (tmp_path / "no.txt", plain):
        with pytest.raises(DataError, match=f"model.embedding_file: {path} cannot be read"):
            check_word_vectors(path, WIDTH)
    with pytest.raises(DataError, match="is not a file"):
        check_word_vectors(tmp_path, WIDTH)
    check_word_vectors(cut, WIDTH)  # the beginning is whole
    with pytest.raises(DataError, match="cannot be read"):
        start_from_word_vectors(new_model(words_tokenizer()), words_tokenizer(), cut)


@pytest.mark.parametrize("header", ["", "7 4\n"])
def test_another_width(write: Callable[..., Path], header: str) -> None:
    """Vectors of another width than n_embd cannot be cut or padded; both numbers are named."""
    with pytest.raises(ConfigError, match=r"vectors of 4 numbers, but model.n_embd is 8") as error:
        check_word_vectors(write(header + GLOVE), 8)
    assert error.value.exit_code == 2
    assert error.value.hint == "set model.n_embd to 4, or take a file of vectors of 8"


def test_a_file_that_is_shorter_than_it_says(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A download that broke off gives fewer words, without a sign."""
    path = write(f"400000 {WIDTH}\n{GLOVE}")
    start_from_word_vectors(new_model(words_tokenizer()), words_tokenizer(), path)
    assert "says that it holds 400,000 words, but has 7 lines" in caplog.text


def test_memory_holds_matched_vectors_only(write: Callable[..., Path]) -> None:
    """GloVe's largest file is 5 GB; the vocabulary's rows of it are a few megabytes."""
    rng, width = random.Random(0), 64
    numbers = " ".join(f"{rng.random():.5f}" for _ in range(width))
    text = "".join(f"word{i} {numbers}\n" for i in range(20_000)) + f"the {numbers}\n"
    path, tokenizer = write(text), words_tokenizer()
    assert path.stat().st_size > 10e6
    model = new_model(tokenizer, n_embd=width)
    tracemalloc.start()
    start = start_from_word_vectors(model, tokenizer, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert start.matched_tokens == 4
    assert peak < 4e6


def test_a_stop_request_is_heard(write: Callable[..., Path]) -> None:
    """Reading gigabytes takes a minute, in which Ctrl-C must work."""
    path = write(GLOVE * 1000)
    stop.request(15)  # type: ignore[arg-type]
    with pytest.raises(stop.Stopped):
        start_from_word_vectors(new_model(words_tokenizer()), words_tokenizer(), path)


CONFIG = """\
tokenizer: {kind: bytes}
data: {train: book.txt, val_fraction: 0.2}
model: {n_layer: 1, n_head: 1, n_embd: 4, block_size: 16, embedding_file: vectors.txt}
schedule: {warmup_steps: 1}
training: {max_steps: 2, tokens_per_step: 32, eval_every: 2, save_every: 1}
samples: {prompts: [], n: 1, max_new_tokens: 1}
"""


def test_pretrain_from_word_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt: Callable[..., tuple[int, str, str]]
) -> None:
    """End to end: a file that is read but not used, not recorded, or needed again by a resume; and
    refusals that come only after the corpus was read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("a sun on a moon, a tree by a river.\n" * 20)
    (tmp_path / "vectors.txt").write_text("a 1 2 3 4\nE 1 1 1 1\nzebra 1 2 3 4\n")
    (tmp_path / "c.yaml").write_text(CONFIG)
    run = tmp_path / "run"
    code, _, err = gpt("pretrain", "c.yaml", "--run-dir", str(run))
    assert code == 0, err
    line = "embedding_file: 3 of 257 tokens start from word vectors (1 of them"  # a, E, A
    assert line in err
    assert line in (run / "log.txt").read_text()
    about = json.loads((run / "run.json").read_text())["embedding_file"]
    assert about["path"] == "vectors.txt"
    assert (about["words"], about["matched_tokens"]) == (3, 3)
    assert len(about["sha256"]) == 64

    (tmp_path / "vectors.txt").unlink()
    more = ["--run-dir", str(run), "--resume", "--set", "training.max_steps=3"]
    code, _, err = gpt("pretrain", str(run / "config.yaml"), *more)
    assert code == 0, err
    assert json.loads((run / "run.json").read_text())["embedding_file"] == about

    code, _, err = gpt("pretrain", "c.yaml", "--run-dir", "again")
    assert code == 3
    assert "model.embedding_file: vectors.txt cannot be read: No such file" in err
    assert "reading book.txt" not in err
    (tmp_path / "vectors.txt").write_text("a 1 2 3\n")
    code, _, err = gpt("pretrain", "c.yaml", "--dry-run")
    assert code == 2
    assert "vectors of 3 numbers, but model.n_embd is 4" in err
    code, _, err = gpt("pretrain", "c.yaml", "--set", f"init={run}", "--dry-run")
    assert code == 2
    assert "model.embedding_file starts the token embeddings of a new model" in err
