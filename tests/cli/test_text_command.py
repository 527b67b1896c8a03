"""`gpt pretrain book.txt`: all is chosen, nothing is hidden, and the user has the last word."""

import json
import random
from pathlib import Path

import pytest
import yaml

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "home", "to", "sleep")


def english(size: int) -> str:
    """Sentences of random words: repetitive enough to learn, too varied to be one line."""
    draw, text = random.Random(0), ""
    while len(text) < size:
        text += " ".join(draw.choices(WORDS, k=9)).capitalize() + ".\n"
    return text


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with a book. Reports, whose plots take a second, are left out."""
    (tmp_path / "book.txt").write_text(english(20_000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)


def plan_of(gpt, *arguments: str) -> dict[str, str]:
    code, out, err = gpt("pretrain", *arguments, "--dry-run", "--max-time", "2s")
    assert code == 0, err
    return dict(line.split(maxsplit=1) for line in out.splitlines())


def test_a_text_becomes_a_run(gpt, tmp_path):
    """One command, from a text to a model whose config repeats it: no key may stay automatic."""
    code, out, err = gpt("pretrain", "book.txt", "--max-time", "2s", "--run-dir", "r")
    assert code == 0, err
    assert out.splitlines() == ["r", "r/report.html"]
    shown = [line.split()[0] for line in err.splitlines()]
    assert [word for word in shown if word in ("text", "tokenizer", "model", "why")] == [
        "text",
        "tokenizer",
        "model",
        "why",
    ]
    assert err.splitlines()[-1].startswith("finished at step ")
    config = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert config["name"] == "book"
    assert config["data"]["train"][0]["path"] == "book.txt"
    assert config["training"]["max_time"] == "2s"
    assert isinstance(config["optimizer"]["lr"], float)
    assert config["samples"]["prompts"] != ["Once upon a time"]
    assert (tmp_path / "book.txt").read_text().startswith(config["samples"]["prompts"][0])
    assert gpt("pretrain", "r/config.yaml", "--dry-run")[0] == 0


def test_a_dry_run_writes_no_run(gpt, tmp_path):
    plan = plan_of(gpt, "book.txt")
    assert list(plan) == ["text", "tokenizer", "model", "training", "why"]
    assert plan["text"].startswith("book.txt: 20,0")
    assert plan["tokenizer"].startswith("bytes, 257 tokens, 1.00 bytes each: 18,0")
    assert "until 2s" in plan["training"]
    assert not (tmp_path / "runs").exists()


def test_the_user_wins(gpt):
    """A choice that overrides --set takes the choice away from the user."""
    sets = ("model.n_layer=1", "model.block_size=48", "tokenizer.vocab_size=300", "model.dropout=0")
    plan = plan_of(gpt, "book.txt", *(f"--set={s}" for s in (*sets, "training.max_steps=3")))
    assert plan["model"].startswith("1 layers, 2 heads, 64 wide, block 48: ")
    assert plan["tokenizer"].startswith("bpe, 300 tokens, ")
    assert plan["training"].startswith("about ")
    assert int(plan["training"].split()[1]) <= 3


def test_chinese(gpt, tmp_path):
    """Words cut at spaces leave Chinese uncut: a vocabulary of whole sentences."""
    draw = random.Random(0)
    signs = [chr(0x4E00 + n) for n in range(400)]
    lines = ("".join(draw.choices(signs, k=12)) + "\u3002\n" for _ in range(4500))
    (tmp_path / "\u8bcd.txt").write_text("".join(lines), encoding="utf-8")
    code, _, err = gpt(
        "pretrain", "\u8bcd.txt", "--max-time=2s", "--run-dir=r", "--set=training.max_steps=2"
    )
    assert code == 0, err
    config = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text(encoding="utf-8"))
    assert config["name"] == "text"
    assert config["tokenizer"] == {
        "kind": "bpe",
        "vocab_size": 2048,
        "pattern": "cjk",
        "train_bytes": "100MB",
    }


def test_a_directory_and_rows(gpt, tmp_path):
    """Books are often kept as many files, and corpora as rows."""
    (tmp_path / "books").mkdir()
    for n in range(3):
        (tmp_path / "books" / f"{n}.md").write_text(english(4000))
    assert "in 3 documents" in plan_of(gpt, "books")["text"]
    rows = [json.dumps({"body": english(900)}) for _ in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    code, _, err = gpt("pretrain", "rows.jsonl", "--dry-run")
    assert code == 3
    assert "no field 'text' (has: body)" in err
    assert plan_of(gpt, "rows.jsonl", "--set=data.train[0].text_field=body")["text"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.txt", None, "missing.txt: no such file"),
        ("empty.txt", b"", "empty.txt"),
        ("blank.md", b" \n\n\t\n", "blank.md"),
        ("short.txt", b"Too short.\n", "short.txt: 11 bytes of text are too few"),
        ("image.txt", bytes(random.Random(0).randbytes(9000)), "image.txt: "),
        ("controls.txt", b"a\x01b\x02" * 2000, "controls.txt: not UTF-8 text: "),
        ("latin.txt", "Gr\u00fc\u00dfe aus K\u00f6ln. ".encode("latin-1") * 300, "not UTF-8 text"),
        ("wide.txt", english(5000).encode("utf-16"), "UTF-16 text, not utf-8"),
        ("damaged.txt.gz", b"no archive", "damaged.txt.gz: damaged"),
    ],
)
def test_what_is_no_text(gpt, tmp_path, name, content, problem):
    """Trained on noise, a model of noise would come out, after five minutes."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = gpt("pretrain", name)
    assert (code, out) == (3, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert problem in errors[0]
    assert not (tmp_path / "runs").exists()


def test_latin_1_with_the_hint(gpt, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Gr\u00fc\u00dfe aus K\u00f6ln. ".encode("latin-1") * 300)
    _, _, err = gpt("pretrain", "latin.txt")
    flag = next(word for word in err.split() if word.startswith("data.train[0].encoding="))
    assert plan_of(gpt, "latin.txt", "--set", flag)["text"].startswith("latin.txt: ")


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("--max-time", "soon"), 2, "training.max_time"),
        (("--set", "model.n_layers=3"), 2, "unknown key 'n_layers' in model"),
        (("--set", "training.max_steps=0"), 2, "must be above 0"),
        (("--set", "init=gpt2"), 2, "init: "),
        (("--set", "data.train=other.txt"), 2, "data.train: the text to train on is book.txt"),
        (("--set", "data.train[0].encoding=binary", "--set", "tokenizer.kind=bytes"), 2, "binary"),
        (("--set", "training.device=cuda:77"), 6, "cuda:77"),
        (("--resume",), 4, "nothing to resume: no unfinished run of 'book'"),
        (("--resume", "--run-dir", "nowhere"), 4, "nowhere has no checkpoint"),
    ],
)
def test_wrong_wishes(gpt, tmp_path, arguments, code, problem):
    """Each is refused before anything is measured or written."""
    found, out, err = gpt("pretrain", "book.txt", *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert problem in err
    assert not (tmp_path / "runs").exists()


def test_an_empty_directory(gpt, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = gpt("pretrain", "empty")
    assert code == 3
    assert "no file in this directory" in err


@pytest.mark.parametrize("name", ["book.epub", "book.pdf"])
def test_books_of_other_kinds(gpt, tmp_path, name):
    """Read as YAML they give a riddle; the hint says which endings are texts."""
    (tmp_path / name).write_bytes(b"%PDF-1.7 \xff\xfe")
    code, _, err = gpt("pretrain", name)
    assert code == 2
    assert "hint: " in err


def test_resume_goes_on_with_the_same_model(gpt, tmp_path):
    """Planned anew on a busier machine, a resume would ask for another model, and be refused."""
    flags = ("--max-time", "1h", "--set", "training.tokens_per_step=128")
    first = ("--set", "training.max_steps=3", "--set", "training.save_every=2")
    code, _, err = gpt("pretrain", "book.txt", *flags, *first, "--run-dir", "runs/r")
    assert code == 0, err
    about = json.loads((tmp_path / "runs" / "r" / "run.json").read_text())
    about["status"] = "stopped"  # as if by a signal
    (tmp_path / "runs" / "r" / "run.json").write_text(json.dumps(about))
    before = yaml.safe_load((tmp_path / "runs" / "r" / "config.yaml").read_text())
    code, out, err = gpt("pretrain", "book.txt", "--resume", "--set", "training.max_steps=5")
    assert code == 0, err
    assert out.splitlines()[0].endswith("runs/r")
    assert "finished at step 5" in err
    assert not any(line.startswith("why ") for line in err.splitlines())
    after = yaml.safe_load((tmp_path / "runs" / "r" / "config.yaml").read_text())
    before["training"]["max_steps"] = 5
    assert after == before


def test_resume_of_another_book(gpt, tmp_path):
    """Two books of one name share the run's name: one must not go on with the other's run."""
    flags = ("--max-time", "1h", "--set", "training.tokens_per_step=128")
    limit = ("--set", "training.max_steps=1")
    assert gpt("pretrain", "book.txt", *flags, *limit, "--run-dir", "runs/r")[0] == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "book.txt").write_text(english(9000))
    code, _, err = gpt("pretrain", "b/book.txt", "--resume", "--run-dir", "runs/r")
    assert code == 4
    assert "runs/r is a run on book.txt, not on b/book.txt" in err
