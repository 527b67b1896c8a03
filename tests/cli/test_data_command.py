import json
import random
import subprocess
import sys

import numpy as np
import pytest

TINY = [
    "--set=tokenizer.kind=bytes",
    "--set=schedule.warmup_steps=0",
    "--set=data.cache=on",
    "--set=model={block_size: 32, n_layer: 1, n_head: 1, n_embd: 16}",
    "--set=training={max_steps: 2, tokens_per_step: 128, device: cpu}",
]


@pytest.fixture
def corpus(tmp_path):
    """200 documents of made-up words, and a config for them."""
    rng = random.Random(0)
    words = [a + b for a in ("ba", "ke", "li", "mo", "nu", "ra") for b in "dfgklmnprst"]
    texts = [" ".join(rng.choice(words) for _ in range(20)) + ".\n" for _ in range(200)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = tmp_path / "tiny.yaml"
    config.write_text(f"name: tiny\ndata: {{train: {path}}}\n")
    return path, str(config)


def test_check(gpt, corpus):
    """Plain text in a pipe: one finding a line, no colours."""
    code, out, _ = gpt("data", "check", corpus[1], *TINY)
    assert code == 0
    assert "\x1b" not in out
    assert "bytes per token" in out
    assert "Latin" in out
    assert any(line.startswith("ok       duplicates") for line in out.splitlines())


def test_check_json(gpt, corpus):
    code, out, _ = gpt("data", "check", corpus[1], *TINY, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["name"] == "tiny"
    assert {finding["level"] for finding in report["findings"]} <= {"ok", "note", "warning"}


def test_strict(gpt, corpus):
    """--strict is for CI: a warning must end it with 3, after the findings were printed."""
    path, config = corpus
    assert gpt("data", "check", config, *TINY, "--strict")[0] == 0
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, *lines[:50]]) + "\n")
    assert gpt("data", "check", config, *TINY)[0] == 0
    code, out, err = gpt("data", "check", config, *TINY, "--strict")
    assert code == 3
    assert "warning  duplicates" in out
    count = sum(line.startswith("warning") for line in out.splitlines())
    noun = "warning" if count == 1 else "warnings"
    assert err.splitlines()[-2] == f"error: {count} {noun} about the data"


def test_check_page(gpt, corpus, tmp_path):
    page = tmp_path / "check.html"
    code, _, _ = gpt("data", "check", corpus[1], *TINY, "--out", str(page))
    assert code == 0
    assert page.read_text().startswith("<!doctype html>")


def test_page_that_cannot_be_written(gpt, corpus, tmp_path):
    code, _, err = gpt("data", "show", corpus[1], *TINY, "--html", str(tmp_path / "no" / "x.html"))
    assert code == 6
    assert "cannot be written" in err


@pytest.mark.parametrize("size", ["many", "0", "-3"])
def test_bad_size(gpt, corpus, size):
    code, out, err = gpt("data", "check", corpus[1], f"--max-bytes={size}")
    assert (code, out) == (2, "")
    assert err.startswith("error: --max-bytes")


def test_missing_data(gpt, corpus, tmp_path):
    """D1, D2: said before anything is measured."""
    for name in ("none.txt", "*.none"):
        code, out, err = gpt("data", "check", corpus[1], "--set", f"data.train={tmp_path / name}")
        assert (code, out) == (3, "")
        assert name in err


def test_check_and_show_without_text(gpt, tmp_path, monkeypatch):
    """Guards against a crash on a corpus of token ids or binary data, without text findings."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, 50) for _ in range(99)] + [np.arange(20)] * 2
    ids = np.concatenate([[256, *document] for document in documents]).astype(np.uint16)
    np.save(tmp_path / "t.npy", ids)
    (tmp_path / "a.bin").write_bytes(rng.bytes(5000))
    for source in ("{path: t.npy}", "{path: a.bin, encoding: binary}"):
        config = tmp_path / "other.yaml"
        config.write_text(f"data: {{train: [{source}], val_fraction: 0.2}}\n")
        page = tmp_path / "page.html"
        code, out, err = gpt("data", "check", str(config), *TINY, "--out", str(page))
        assert code == 0, err
        assert "near duplicates, overlap with the validation data and" in out
        assert "bytes per token" not in out
        assert "are not looked for in token ids" in page.read_text()
        code, out, err = gpt("data", "show", str(config), *TINY, "-n", "1")
        assert code == 0, err
        assert "[   0]" in out
    np.save(tmp_path / "t.npy", np.where(np.arange(len(ids)) == 7, 300, ids).astype(np.uint16))
    config.write_text("data: {train: t.npy}\n")
    code, out, err = gpt("data", "check", str(config), *TINY)
    assert code == 0, err
    assert "1 token ids, up to 300, are outside the vocabulary of 257, as in" in out
    code, _, err = gpt("data", "show", str(config), *TINY)
    assert (code, "token id 300 is outside the vocabulary" in err) == (3, True)


def test_show_makes_controls_visible(gpt, tmp_path, monkeypatch):
    """D19: guards against C1 commands, bidi overrides and line ends shown as they are, where they
    end a character whose first byte is another token."""
    monkeypatch.chdir(tmp_path)
    text = "a\x9b31m b\u202ec d\u2066e \x1b[0m \x7f f\ufeff g\u2028h" * 9
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "c.yaml").write_text("data: {train: a.txt}\n")
    monkeypatch.setenv("TERM", "xterm-256color")
    for flags in ((), ("--html", str(tmp_path / "p.html")), ("--json",)):
        code, out, err = gpt("data", "show", str(tmp_path / "c.yaml"), *TINY, "-n", "4", *flags)
        assert code == 0, err
        for text in (out, (tmp_path / "p.html").read_text() if "--html" in flags else ""):
            assert [c for c in text if not c.isprintable() and c != "\n"] == []
    code, out, _ = gpt("data", "show", str(tmp_path / "c.yaml"), *TINY, "-n", "4")
    assert "=\\x9b" in out
    assert "=\\u202e" in out


def test_show(gpt, corpus):
    """Everything is visible without colours: borders, separators, positions, loss."""
    code, out, _ = gpt("data", "show", corpus[1], *TINY, "-n", "2")
    assert code == 0
    assert "\x1b" not in out
    assert "row 0: 32 of 32 targets with loss" in out
    assert "row 1" in out
    assert "row 2" not in out
    assert "⟨eot⟩" in out
    assert any(line.startswith("[   0] ¦") for line in out.splitlines())
    assert max(map(len, out.splitlines())) <= 100


def test_show_restarts_positions(gpt, corpus):
    """With a document mask a document in the middle of a row begins at position 0 again."""
    flags = ["--set=data.document_mask=true", "--set=model.block_size=128"]
    code, out, _ = gpt("data", "show", corpus[1], *TINY, *flags, "-n", "1")
    assert code == 0
    assert out.count("[   0]") >= 2


def test_show_json(gpt, corpus):
    code, out, _ = gpt("data", "show", corpus[1], *TINY, "-n", "1", "--json")
    assert code == 0
    (row,) = json.loads(out)["rows"]
    assert len(row["tokens"]) == 33
    assert row["tokens"][0]["position"] == 0


def test_show_page(gpt, corpus, tmp_path):
    page = tmp_path / "rows.html"
    code, _, _ = gpt("data", "show", corpus[1], *TINY, "--html", str(page))
    assert code == 0
    assert page.read_text().count('<section class="row">') == 4


def test_show_examples(gpt, corpus, tmp_path, monkeypatch):
    """Of a finetuning row, prompt tokens carry no loss and response tokens do."""
    monkeypatch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)
    run = tmp_path / "run"
    code, _, err = gpt("pretrain", corpus[1], *TINY, "--run-dir", str(run))
    assert code == 0, err
    rows = tmp_path / "rows.jsonl"
    pairs = [{"q": f"what {i}", "a": f"yes{i}"} for i in range(20)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = tmp_path / "tune.yaml"
    config.write_text(
        f"data: {{train: {rows}}}\nfinetune: {{fields: {{prompt: q, response: a}}}}\n"
        "schedule: {warmup_steps: 0}\ntraining: {max_steps: 1, tokens_per_step: 128}\n"
    )
    code, _, err = gpt("data", "show", str(config))
    assert code == 2
    assert "--model" in err
    code, out, err = gpt("data", "show", str(config), "--model", str(run), "-n", "1", "--json")
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    learned = "".join(t["text"] for t in row["tokens"] if t["loss"])
    given = "".join(t["text"] for t in row["tokens"] if not t["loss"])
    assert learned.startswith("yes")
    assert given.startswith("what ")


def test_help_needs_no_torch():
    """Half a second of torch for a help text."""
    line = "import sys; from gptcli.cli.main import main; main(['data', 'check', '--help']);"
    line += "sys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", line], capture_output=True, check=False)
    assert found.returncode == 0, found.stderr
