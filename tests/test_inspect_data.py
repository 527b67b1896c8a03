"""What `gpt data check` and `gpt data show` find, against figures counted by hand."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from published import publish_folder, random_model

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, DataError
from gptcli.inspect_data import check_data, show_data

WORDS = [a + b for a in ("ba", "ke", "li", "mo", "nu", "ra", "so", "ti") for b in "bdfgklmnprst"]


def sentence(rng: random.Random, words: int = 40) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def documents(count: int, seed: int = 0, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [sentence(rng, words) for _ in range(count)]


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(train: Path | str, *, val: Path | None = None, **data: object) -> Config:
    values = {"train": str(train), "val": str(val) if val else None, "cache": "off", **data}
    return Config.model_validate(
        {
            "tokenizer": {"kind": "bytes"},
            "data": values,
            "model": {"block_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 1},
            "training": {"tokens_per_step": 256},
        }
    )


def levels(check) -> dict[str, str]:
    """The worst level of each check."""
    rank = ["ok", "note", "warning"]
    worst: dict[str, str] = {}
    for finding in check.findings:
        before = worst.get(finding.check, "ok")
        worst[finding.check] = max(before, finding.level, key=rank.index)
    return worst


# --- check ----------------------------------------------------------------------------------------


def test_a_clean_corpus_has_no_warning(tmp_path):
    """A check that warns of clean text would be switched off."""
    texts = documents(300)
    check = check_data(config(write_rows(tmp_path / "a.jsonl", texts)))
    assert check.warnings == 0, check.findings
    train = check.report["train"]
    assert train["documents"] + check.report["validation"]["documents"] == 300
    assert train["tokens"] == train["bytes"] + train["documents"]  # bytes tokenizer, eot each
    assert check.report["read"]["complete"]
    assert json.loads(json.dumps(check.report)) == check.report


def test_bytes_per_token_are_those_of_the_text_that_was_encoded(tmp_path):
    """Guards against bytes on disk: of token ids, or of text whose damaged bytes became U+FFFD.
    The bytes tokenizer has 1 byte a token of any text."""
    (tmp_path / "a.txt").write_bytes("明月幾時有，把酒問青天。\n".encode("gb18030") * 200)
    np.save(tmp_path / "b.npy", np.arange(4000, dtype=np.uint16) % 256)
    held = write_rows(tmp_path / "val.jsonl", documents(5))
    for names in (["a.txt"], ["a.txt", "b.npy"]):
        sources = [{"path": str(tmp_path / name)} for name in names]
        base = config("unused", val=held).model_dump()
        base["data"]["train"] = sources
        train = check_data(Config.model_validate(base)).report["train"]
        assert train["bytes_per_token"] == 1.0
        assert train["bytes"] != train["tokens"]


def test_every_fault_is_found(tmp_path):
    """Each planted fault is found with its count, and the finding names the key that helps."""
    texts = documents(300)
    texts += texts[:30]  # exact duplicates
    texts += [text.replace("bab", "bob", 1) + " x" for text in documents(20, seed=5, words=400)]
    texts += documents(20, seed=5, words=400)  # near duplicates of those
    texts += (
        ["a"] * 10
        + ["bell \x07 and esc \x1b[0m " * 20] * 2
        + ["bad \ufffd " + sentence(random.Random(9))]
    )
    texts += ["mail jane.doe@example.org or card 4111 1111 1111 1111 " + sentence(random.Random(8))]
    texts += ["same line\n" * 30]
    other = write_rows(tmp_path / "val.jsonl", texts[:5] + documents(30, seed=77))
    check = check_data(config(write_rows(tmp_path / "a.jsonl", texts), val=other))
    report, found = check.report, levels(check)
    assert report["duplicates"]["exact"]["count"] == 30 + 9 + 1
    assert report["duplicates"]["near"]["count"] == 20
    assert report["empty"]["count"] == 10
    assert report["control_characters"]["count"] == 80
    assert report["control_characters"]["codes"] == {"U+0007": 40, "U+001B": 40}
    assert report["replacement_characters"]["count"] == 1
    assert {kind: about["count"] for kind, about in report["personal"].items()} == {
        "card": 1,
        "email": 1,
    }
    assert report["repetitive"]["count"] == 1
    assert report["validation"]["exact"] == 5
    assert found["duplicates"] == found["overlap"] == found["personal data"] == "warning"
    assert found["control"] == "warning"
    said = " ".join(finding.text for finding in check.findings)
    for key in (
        "exact_duplicates: true",
        "near_duplicates",
        "min_characters",
        "redact: [card, email]",
    ):
        assert key in said
    assert "jane" not in json.dumps(report)  # places only, never the data
    assert "4111" not in json.dumps(report)


def test_filters_clear_the_findings(tmp_path):
    """The key that a finding names must be the one that removes its cause."""
    texts = documents(300)
    path = write_rows(
        tmp_path / "a.jsonl", texts + texts[:30] + ["mail a.b@example.org " + texts[3]]
    )
    filters = {"exact_duplicates": True, "redact": ["email"]}
    cleaned = config(path).model_copy(
        update={
            "data": config(path).data.model_validate(
                {"train": {"path": str(path), "filters": filters}, "cache": "off"}
            )
        }
    )
    before, after = check_data(config(path)), check_data(cleaned)
    assert before.warnings > 0
    assert after.warnings == 0, after.findings
    assert after.report["sources"][0]["filters"]


def test_invalid_utf8_is_a_warning(tmp_path):
    """D5: damaged bytes are replaced while reading; the check must not call that text sound."""
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe broken".join(t.encode() for t in documents(50)))
    check = check_data(config(tmp_path / "a.txt"))
    assert levels(check)["encoding"] == "warning"


def test_train_and_validation_overlap(tmp_path):
    """D15: the same file on both sides makes validation a memory test."""
    path = write_rows(tmp_path / "a.jsonl", documents(50))
    check = check_data(config(path, val=path))
    held = check.report["validation"]
    assert (held["exact"], held["near"]) == (50, 0)
    assert held["ngrams_found"] == held["ngrams"] > 0
    assert levels(check)["overlap"] == "warning"


def test_only_the_beginning(tmp_path):
    """Figures of a part must not pass for figures of the whole."""
    path = write_rows(tmp_path / "a.jsonl", documents(300))
    check = check_data(config(path), max_bytes=3000)
    assert not check.report["read"]["complete"]
    assert 3000 <= check.report["train"]["bytes"] < 4000
    assert levels(check)["reading"] == "note"


def test_a_stop_request_ends_it(tmp_path):
    """Ctrl-C during a long check must not wait for its end."""
    path = write_rows(tmp_path / "a.jsonl", documents(300))

    def ask(done: int, total: int) -> None:
        stop.request(2)

    with pytest.raises(stop.Stopped):
        check_data(config(path), progress=ask)


def test_progress_reaches_the_end(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", documents(300))
    calls: list[tuple[int, int]] = []
    check_data(config(path), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)


def test_binary_and_tokens(tmp_path):
    """Images and token ids have no scripts or duplicates lines; counting them must not crash."""
    data = bytes(range(256)) * 40
    (tmp_path / "a.png").write_bytes(data)
    source = {"path": str(tmp_path / "a.png"), "encoding": "binary"}
    check = check_data(
        config("x").model_copy(
            update={"data": config("x").data.model_validate({"train": source, "cache": "off"})}
        )
    )
    assert not check.report["text"]
    assert check.report["train"]["bytes"] == pytest.approx(0.98 * len(data), rel=0.02)
    np.save(tmp_path / "t.npy", np.arange(5000, dtype=np.uint16) % 250)
    assert check.report["no_text"]["outside_vocabulary"]["count"] == 0
    tokens = check_data(config(tmp_path / "t.npy"))
    assert tokens.report["train"]["tokens"] == pytest.approx(4900, abs=20)


def test_documents_of_tokens(tmp_path):
    """Guards against pieces of a token file counted as documents: each eot begins one, and repeated
    ones and ids outside the vocabulary are found."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, n) for n in rng.integers(10, 400, 300)]  # several pieces of 16384
    texts += [texts[k] for k in range(5)] + [np.array([65, 999, 300, 66])]
    np.save(tmp_path / "t.npy", np.concatenate([[256, *t] for t in texts]).astype(np.uint16))
    np.save(tmp_path / "v.npy", np.arange(600, dtype=np.uint16) % 250)
    check = check_data(config(tmp_path / "t.npy", val=tmp_path / "v.npy"))
    report = check.report
    assert report["train"]["documents"] == len(texts) == report["no_text"]["documents"]
    assert report["train"]["tokens"] == sum(map(len, texts)) + len(texts)
    assert report["lengths"]["max"] == max(map(len, texts))
    assert report["lengths"]["min"] == 4
    assert report["no_text"]["duplicates"]["count"] == 5
    assert report["no_text"]["outside_vocabulary"]["count"] == 2
    assert report["no_text"]["largest_id"] == 999
    found = levels(check)
    assert found["vocabulary"] == found["duplicates"] == "warning"
    assert found["no text"] == "note"
    assert json.loads(json.dumps(report)) == report


def test_finetuning_rows(tmp_path):
    """Rows of prompt and response are checked as text, not refused."""
    texts = documents(200)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"q": t, "a": "yes"}) + "\n" for t in texts))
    values = config(path).model_dump() | {"finetune": {"fields": {"prompt": "q", "response": "a"}}}
    values["eval"].pop("data", None)
    check = check_data(Config.model_validate(values))
    assert check.report["job"] == "finetune"
    assert check.report["train"]["documents"] + check.report["validation"]["documents"] == 200


def test_no_such_file(tmp_path):
    """D2: reading stops with the name of what is missing."""
    with pytest.raises(DataError, match=r"nothing\.txt"):
        check_data(config(tmp_path / "nothing.txt"))


# --- show -----------------------------------------------------------------------------------------


def rows_of(tmp_path: Path, **data: object):
    path = write_rows(tmp_path / "a.jsonl", documents(200, words=6))
    return show_data(config(path, **{"cache": "on"} | data), rows=3)


def test_rows_hold_the_text(tmp_path):
    """What is shown must be what was packed: the shown ids decode to the corpus."""
    shown = rows_of(tmp_path, shuffle_window=0)
    tokenizer = Tokenizer.of_bytes()
    text = b"".join(
        b"\n" if token.kind == "eot" else tokenizer.token_bytes(token.id)
        for token in shown.rows[0].tokens
    ).decode()
    first = documents(200, words=6)
    assert any(text.strip().split("\n")[0] in document for document in first)
    row = shown.rows[0]
    assert row.targets == 64
    assert [token.position for token in row.tokens] == [*range(64), None]
    assert [token.loss for token in row.tokens] == [False] + [True] * 64


def test_positions_restart_with_a_document_mask(tmp_path):
    """A position shown must be the one that the model is told."""
    for row in rows_of(tmp_path, document_mask=True).rows:
        assert row.segments > 1
        for token in row.tokens:
            if token.begins:
                assert token.position == 0
            assert token.begins or token.position != 0


def test_best_fit_shows_padding_and_both_neighbours(tmp_path):
    """In a best-fit row the target behind a document's end is not the next input: both show."""
    shown = rows_of(tmp_path, packing="best_fit", document_mask=True)
    for row in shown.rows:
        inputs = [token for token in row.tokens if token.position is not None]
        assert len(inputs) + row.padding == shown.block_size
        assert sum(token.loss for token in row.tokens) == row.targets == len(inputs)


def test_step(tmp_path):
    """--step 1 begins behind the rows of step 0."""
    path = write_rows(tmp_path / "a.jsonl", documents(200))
    step = 256 // 64
    settings = config(path, cache="on")
    first = show_data(settings, rows=step + 1).rows
    assert show_data(settings, rows=1, step=1).rows[0] == first[step]


def test_examples_need_a_tokenizer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": "a", "a": "b"}) + "\n")
    values = config(path).model_dump() | {"finetune": {"fields": {"prompt": "q", "response": "a"}}}
    with pytest.raises(ConfigError, match="tokenizer"):
        show_data(Config.model_validate(values))


def test_pretraining_that_starts_from_a_model(tmp_path):
    """With `init`, text is not taken for rows to finetune on; the block size beside it holds."""
    folder = publish_folder(tmp_path / "published", random_model())
    (tmp_path / "a.txt").write_text("\n\n".join(documents(20)))
    settings = Config.model_validate(
        {
            "init": str(folder),
            "data": {"train": str(tmp_path / "a.txt"), "cache": "off"},
            "model": {"block_size": 16},
            "training": {"tokens_per_step": 64},
        }
    )
    shown = show_data(settings, rows=2)
    assert shown.block_size == 16
    assert [row.targets for row in shown.rows] == [16, 16]
    assert check_data(settings).report["job"] == "pretrain"
