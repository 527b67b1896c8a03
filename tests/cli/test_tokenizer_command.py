"""`gpt tokenizer train` and `show`, as users call them."""

import gzip
import json
from pathlib import Path

import pytest

from gptcli.data.tokenizer import Tokenizer, train_bpe

TEXT = "The cat sat on the mat, and the cat ate the rat.\n" * 40


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT + "猫が座る。\n" * 20, encoding="utf-8")
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    train_bpe([TEXT], 270, "gpt4", 10**6).save(tmp_path / "saved")
    return tmp_path / "saved"


def test_train_then_show(gpt, corpus, tmp_path):
    """The command's tokenizer is the library's, and other commands read it."""
    out = tmp_path / "own"
    arguments = ["--vocab-size", "270", "--pattern", "cjk", "--out", str(out)]
    code, text, err = gpt("tokenizer", "train", str(corpus), *arguments)
    assert code == 0, err
    facts = dict(line.split("  ", 1) for line in text.splitlines())
    assert facts["vocabulary"].strip() == "270 tokens"
    assert float(facts["bytes per token"].split()[0]) > 1.5
    wanted = train_bpe([corpus.read_text(encoding="utf-8")], 270, "cjk", 10**6)
    assert Tokenizer.load(out).identity == wanted.identity
    code, text, _ = gpt("tokenizer", "show", str(out), "bytes", "--text", "the cat")
    assert code == 0
    lines = [line.split() for line in text.splitlines() if line]
    assert lines[0][:4] == ["TOKENIZER", "VOCABULARY", "EOT", "TOKENS"]
    assert lines[1][:4] == [str(out), "270", "269", str(len(wanted.encode("the cat")))]
    assert lines[2] == ["bytes", "257", "256", "7", "1.000", "1.000"]
    assert "|t|h|e| |c|a|t|" in text
    assert "116 104 101 32 99 97 116" in text


def test_train_as_json(gpt, corpus, tmp_path):
    """Progress and warnings stay out of stdout: it is one object."""
    out = tmp_path / "own"
    code, text, err = gpt("tokenizer", "train", str(corpus), "--out", str(out), "--json")
    assert code == 0
    figures = json.loads(text)
    assert figures["vocab_size"] == Tokenizer.load(out).vocab_size < 2048
    assert figures["text_bytes"] == corpus.stat().st_size
    assert figures["identity"] == Tokenizer.load(out).identity
    assert "too small for 2,048 tokens" in err


def test_train_reads_no_more_than_asked_for(gpt, corpus, tmp_path):
    """--max-bytes ends the reading at the next piece of text."""
    big = tmp_path / "big.txt"
    big.write_text(TEXT * 200, encoding="utf-8")
    arguments = ["--out", str(tmp_path / "own"), "--max-bytes", "10KB", "--json"]
    code, text, _ = gpt("tokenizer", "train", str(big), *arguments)
    assert code == 0
    assert json.loads(text)["text_bytes"] < 100_000 < big.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.txt"], 3, "no such file"),
        (["{corpus}", "--out", "{saved}"], 2, "exists already"),
        (["{corpus}", "--pattern", "gpt5"], 2, "there are gpt2, gpt4, cjk"),
        (["{corpus}", "--max-bytes", "lots"], 2, "not a size"),
        (["{corpus}", "--vocab-size", "256"], 2, "257"),
        ([], 2, "SOURCE"),
    ],
)
def test_train_refuses(gpt, corpus, saved, tmp_path, monkeypatch, arguments, code, message):
    """Each before anything is learned, and without a trace of it on disk."""
    monkeypatch.chdir(tmp_path)
    given = [a.format(corpus=corpus, saved=saved) for a in arguments]
    found, out, err = gpt("tokenizer", "train", *given)
    assert (found, out) == (code, "")
    assert message in err
    assert not (tmp_path / "tokenizer").exists()


def test_an_empty_corpus_is_an_error(gpt, tmp_path):
    """D3: guards against a tokenizer of 256 bytes learned from nothing."""
    (tmp_path / "empty.txt").write_text(" \n")
    arguments = [str(tmp_path / "empty.txt"), "--out", str(tmp_path / "own")]
    code, _, err = gpt("tokenizer", "train", *arguments)
    assert code == 3, err
    assert "no text in" in err
    assert "too small" not in err
    assert not (tmp_path / "own").exists()


def test_show_tells_scripts_apart(gpt, saved, tmp_path):
    """A mean over two scripts hides that one of them costs three tokens a character."""
    path = tmp_path / "mixed.txt"
    path.write_text("the cat 猫猫猫猫", encoding="utf-8")
    code, out, _ = gpt("tokenizer", "show", str(saved), "bytes", "--file", str(path), "--json")
    assert code == 0
    about = json.loads(out)
    assert (about["bytes"], about["characters"]) == (20, 12)
    ours, plain = about["tokenizers"]
    assert ours["tokens"] == len(Tokenizer.load(saved).encode("the cat 猫猫猫猫"))
    assert ours["bytes_per_token_by_script"]["Han"] == pytest.approx(1.0)
    assert ours["bytes_per_token_by_script"]["Latin"] > 1.5
    assert plain["bytes_per_token_by_script"] == {"Latin": 1.0, "Han": 1.0}
    assert "ids" not in ours


def test_show_opens_a_file_as_sources_are_opened(gpt, saved, tmp_path):
    """D9: guards against figures of zero bytes, a byte-order mark, or a compressed file's bytes."""
    wide, marked, packed = (tmp_path / name for name in ("w.rst", "m.rst", "p.txt.gz"))
    marked.write_bytes(b"\xef\xbb\xbfthe cat")
    packed.write_bytes(gzip.compress(b"the cat"))
    for path in (marked, packed):
        code, out, err = gpt("tokenizer", "show", str(saved), "--file", str(path), "--json")
        assert code == 0, err
        assert json.loads(out)["bytes"] == 7
    for encoding in ("utf-16", "utf-16-le"):
        wide.write_bytes("the cat".encode(encoding))
        code, out, err = gpt("tokenizer", "show", str(saved), "--file", str(wide))
        assert (code, out) == (3, "")
        assert f"{wide.name}: UTF-16 text, not utf-8" in err
        assert f"encoding: {encoding}" in err


def test_show_makes_control_characters_visible(gpt, saved):
    """D19: guards against a text that steers the terminal, and tokens that break the line."""
    code, out, _ = gpt("tokenizer", "show", str(saved), "--text", "a\x1b[31m\n\t猫\u202e\x00")
    assert code == 0
    shown = next(line for line in out.splitlines() if line.startswith("|"))
    assert shown == "|a|\\x1b|[|3|1|m|\\n|\\t|\\xe7|\\x8c|\\xab|\\xe2|\\x80|\\xae|\\x00|"


def test_show_json_has_the_tokens(gpt, saved):
    """Guards against ids and pieces that do not belong together."""
    code, out, _ = gpt("tokenizer", "show", str(saved), "--text", "the <|endoftext|>", "--json")
    (about,) = json.loads(out)["tokenizers"]
    assert code == 0
    assert "".join(about["pieces"]) == "the <|endoftext|>"
    assert len(about["ids"]) == len(about["pieces"]) == about["tokens"]
    assert about["eot"] not in about["ids"]


def test_show_without_text(gpt, saved):
    """Guards against figures per token of no text."""
    code, out, _ = gpt("tokenizer", "show", str(saved))
    assert code == 0
    assert out.splitlines()[0].split() == ["TOKENIZER", "VOCABULARY", "EOT"]
    (about,) = json.loads(gpt("tokenizer", "show", str(saved), "--json")[1])["tokenizers"]
    assert about["vocab_size"] == 270
    assert gpt("tokenizer", "show", str(saved), "--text", "")[0] == 0


def test_show_reads_runs_and_checkpoints(gpt, saved, tmp_path):
    """Guards against having to know where in a run its tokenizer lies."""
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "step-00000010"
    Tokenizer.load(saved).save(checkpoint / "tokenizer")
    for name in ("mine", str(tmp_path / "runs" / "mine"), str(checkpoint)):
        code, out, err = gpt("tokenizer", "show", name, "--json")
        assert code == 0, err
        assert json.loads(out)["tokenizers"][0]["identity"] == Tokenizer.load(saved).identity


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gpt9"], 3, "no tokenizer of this name"),
        (["bytes", "--file", "nowhere.txt"], 3, "cannot be read"),
        (["bytes", "--file", "a", "--text", "b"], 2, "exclude each other"),
        (["{tmp}"], 4, "not a saved tokenizer"),
        (["{tmp}/notes.md"], 3, "neither a saved tokenizer"),
    ],
)
def test_show_refuses(gpt, tmp_path, arguments, code, message):
    (tmp_path / "notes.md").write_text("notes")
    found, out, err = gpt("tokenizer", "show", *(a.format(tmp=tmp_path) for a in arguments))
    assert (found, out) == (code, "")
    assert message in err


def test_help_comes_at_once(shell):
    """Guards against help that waits for torch or tokenizers to load."""
    check = (
        "import sys; from gptcli.cli.main import main; code = main(['tokenizer', 'show', '-h']);"
        " sys.exit(code or any(m in sys.modules for m in ('torch', 'tokenizers', 'tiktoken')))"
    )
    done = shell(f'{__import__("sys").executable} -c "{check}"')
    assert done.returncode == 0, done.stderr
    assert "TOKENIZER..." in done.stdout


def test_show_reads_stdin(shell, saved):
    """Guards against bytes that are no UTF-8, and a mark at the beginning, on stdin."""
    done = shell(rf"printf '\xef\xbb\xbfthe \xff' | gpt tokenizer show {saved} --file - --json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["characters"] == 5
