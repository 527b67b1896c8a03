"""Bad data as a user meets them: the D rows of the fault matrix, one after the other.

Each test names its row and says what the row owes: exit code, message, hint, and what is kept.
"""

import datetime
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from update_hook import UpdateHook

from gptcli import stop
from gptcli.config.data_schema import DataConfig, SourceConfig
from gptcli.data import corpus, readers, remote, scan, shards, stream
from gptcli.data.corpus import open_corpus
from gptcli.data.stream import RecordStream, ShardReader
from gptcli.data.tokenizer import train_bpe
from gptcli.model.gpt import GPT
from gptcli.runs import checkpoint
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # tests are no package

from hub_server import HubServer
from outcome import errors, hints, warnings
from small import PROSE

Gpt = Callable[..., tuple[int, str, str]]

TUNED = """\
name: tuned
data: {train: rows.jsonl, val: val.jsonl}
finetune: {fields: {prompt: q, response: a}, template: "{{ prompt }}:"}
training: {max_steps: 8, tokens_per_step: 128, log_every: 1, eval_every: 100, save_every: 100,
           micro_batch_size: 4, precision: fp32, compile: off, device: cpu}
schedule: {warmup_steps: 1}
samples: {n: 1, max_new_tokens: 2}
"""


@pytest.fixture(autouse=True)
def tuned(folder: Path) -> None:
    """A config for finetuning beside the other."""
    (folder / "tuned.yaml").write_text(TUNED)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever builds a model ends with exit code 1."""

    def build(*_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(GPT, "__init__", build)


def train_on(path: str, **options: str) -> str:
    """The flag that makes `path` the source."""
    source = json.dumps({"path": path, **options})
    return f"--set=data.train=[{source}]"


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(number: int) -> list[dict[str, str]]:
    return [{"text": f"document {i} tells of day {i * i}"} for i in range(number)]


def weights(run_dir: Path) -> bytes:
    return (checkpoint.list_checkpoints(run_dir)[-1] / "model.safetensors").read_bytes()


def content(run_dir: Path) -> dict[str, bytes]:
    """All that a run holds but its log of messages and its lock."""
    files = [p for p in run_dir.rglob("*") if p.is_file() and p.name not in ("log.txt", ".lock")]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run_dir) if r["event"] == "train"]


def stop_after(updates: int) -> Any:
    """Ask for a stop in update number `updates`; returns the hook's handle."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == updates:
            stop.request(signal.SIGTERM)

    return UpdateHook(count)


@pytest.mark.parametrize("key", ["train", "val"])
@pytest.mark.usefixtures("no_model")
def test_d01_a_pattern_that_matches_nothing(key: str, gpt: Gpt, folder: Path) -> None:
    """D1: exit 3 with the pattern, before a model is built; a run on 0 rows is no run."""
    flags = ("pretrain", "tiny.yaml", f"--set=data.{key}=books/*.txt")
    for extra in ("--run-dir=r", "--dry-run"):
        code, out, err = gpt(*flags, extra)
        assert (code, out) == (3, "")
        assert errors(err) == ["books/*.txt: the pattern matches no files"]
        assert hints(err) == "what is there: ls ."
    assert not (folder / "r" / "checkpoints").exists()
    assert read_run_json(folder / "r")["status"] == "failed"


@pytest.mark.usefixtures("no_model")
def test_d02_missing_and_unreadable_files(gpt: Gpt, folder: Path) -> None:
    """D2: exit 3, and all files that are wrong are listed, not the first one only."""
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe.txt")
    (folder / "secret.txt").write_text(PROSE)
    (folder / "secret.txt").chmod(0)
    named = ["gone.txt", "empty", "text.txt", "pipe.txt", "rows.jsonl"]
    wrong = ["gone.txt", "empty", "pipe.txt", "rows.jsonl"]
    if not os.access("secret.txt", os.R_OK):  # root may read it
        named.append("secret.txt")
        wrong.append("secret.txt")
    code, out, err = gpt("pretrain", "tiny.yaml", f"--set=data.train=[{', '.join(named)}]")
    assert (code, out) == (3, "")
    assert [line.split(":")[0] for line in errors(err)] == wrong


@pytest.mark.usefixtures("no_model")
def test_d03_nothing_in_it(gpt: Gpt, folder: Path) -> None:
    """D3: exit 3 for a corpus that is empty, blank, null or filtered away; how many rows were."""
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\t\n\r\n" * 99)
    write_rows(folder / "blank.jsonl", [{"text": " "}] * 7)
    write_rows(folder / "null.jsonl", [{"text": None}] * 7)
    write_rows(folder / "short.jsonl", texts(7))
    for name, filters, what in [
        ("empty.txt", "{}", "empty"),
        ("blank.txt", "{}", "empty"),
        ("blank.jsonl", "{}", "empty: blank.jsonl (7 rows were left out)"),
        ("null.jsonl", "{}", "7 rows"),
        ("short.jsonl", "{min_characters: 900}", "0 documents are left after filtering 7"),
    ]:
        source = f"--set=data.train=[{{path: {name}, filters: {filters}}}]"
        code, out, err = gpt("pretrain", "tiny.yaml", source, "--dry-run")
        assert (code, out) == (3, ""), name
        (line,) = errors(err)
        assert name in line
        assert what in line


def test_d03_blank_rows_are_counted(gpt: Gpt, folder: Path) -> None:
    """D3: blank rows among others are left out and counted, in the log and in the run's record."""
    write_rows(folder / "rows.jsonl", [*texts(90), {"text": " "}, {"text": ""}, {"text": "\n"}])
    code, _, err = gpt("pretrain", "tiny.yaml", train_on("rows.jsonl"), "--run-dir=r")
    assert code == 0, err
    assert "rows.jsonl: 3 rows whose text is blank were left out" in warnings(err)
    assert read_run_json(folder / "r")["skipped_text"] == {"blank_rows": {"rows.jsonl": 3}}
    code, out, err = gpt("data", "check", "tiny.yaml", train_on("rows.jsonl"), "--json")
    assert json.loads(out)["problems"]["blank_rows"] == {"rows.jsonl": 3}, err


def test_d04_shorter_than_a_block(gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D4: exit 3 with the token counts, before a model is built; the block_size that the hint
    gives works."""
    (folder / "text.txt").write_text("just twenty bytes!!\n")
    share = "--set=data.val_fraction=0.1"
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "__init__", None)
        code, out, err = gpt("pretrain", "tiny.yaml", share)
    assert (code, out) == (3, "")
    (line,) = errors(err)
    assert re.match(r"the training text has 1[789] tokens, less than one block of 32 \+ 1", line)
    assert hints(err) == "add text, or --set model.block_size=16"
    code, _, err = gpt("pretrain", "tiny.yaml", share, *hints(err).split()[-2:])
    assert code == 0, err


def test_d05_invalid_utf8_is_replaced_and_counted(gpt: Gpt, folder: Path) -> None:
    """D5: by default invalid bytes become U+FFFD; the run says how many, and so does its record."""
    data = bytearray(PROSE.encode())
    data[0], data[3000] = 0xFF, 0xC3
    (folder / "text.txt").write_bytes(data)
    code, _, err = gpt("pretrain", "tiny.yaml", "--run-dir=r")
    assert code == 0, err
    assert "text.txt: 2 invalid UTF-8 sequences were read as U+FFFD" in warnings(err)
    assert read_run_json(folder / "r")["skipped_text"] == {"invalid_utf8": {"text.txt": 2}}


@pytest.mark.parametrize("place", [0, 11_000_000])
@pytest.mark.usefixtures("no_model")
def test_d05_invalid_utf8_is_an_error(place: int, gpt: Gpt, folder: Path) -> None:
    """D5: on_bad_text: error ends with exit 3 and the byte, be it 11 MB inside the file."""
    with (folder / "large.txt").open("wb") as f:
        f.truncate(11_500_000)
        f.seek(place)
        f.write(b"\xff")
    flag = train_on("large.txt", on_bad_text="error")
    code, out, err = gpt("pretrain", "tiny.yaml", flag, "--dry-run")
    assert (code, out) == (3, "")
    assert errors(err) == [f"large.txt: invalid UTF-8 at byte {place}"]
    assert "on_bad_text: replace" in hints(err)


@pytest.mark.parametrize("bad", ['{"text": oops}\n', '["text"]\n', '{"text": "cut off'])
def test_d06_bad_rows(bad: str, gpt: Gpt, folder: Path) -> None:
    """D6: exit 3 with file and line; on_bad_row: skip counts such rows, up to 1 % of them."""
    lines = [json.dumps(row) + "\n" for row in texts(200)]
    where = 200 if "cut" in bad else 121
    path = folder / "rows.jsonl"
    path.write_text("".join([*lines[:where], bad, *lines[where:]]))
    code, out, err = gpt("pretrain", "tiny.yaml", train_on("rows.jsonl"), "--dry-run")
    assert (code, out) == (3, "")
    (line,) = errors(err)
    assert line.startswith(f"rows.jsonl:{where + 1}: ")
    assert "on_bad_row: skip" in hints(err)

    skip = train_on("rows.jsonl", on_bad_row="skip")
    code, _, err = gpt("pretrain", "tiny.yaml", skip, "--run-dir=r")
    assert code == 0, err
    assert "rows.jsonl: 1 rows that cannot be used were left out" in warnings(err)
    assert read_run_json(folder / "r")["skipped_text"] == {"skipped_rows": {"rows.jsonl": 1}}

    path.write_text("".join([*lines[:50], '{"text"\n' * 3, *lines[50:]]))
    code, out, err = gpt("pretrain", "tiny.yaml", skip, "--dry-run")
    assert (code, out) == (3, "")
    assert errors(err) == ["rows.jsonl: 3 of 203 rows cannot be used, more than 1 %"]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"body": "x", "id": 1}, "no field 'text' (has: body, id)"),
        ({"id": 1, "text": 3}, "field 'text' is not text but int (has: id, text)"),
        ({"text": 1.5}, "field 'text' is not text but float (has: text)"),
        ({"text": ["a", "b"]}, "field 'text' is not text but list (has: text)"),
        ({"text": {"a": "b"}}, "field 'text' is not text but dict (has: text)"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_d07_fields_that_are_no_text(
    row: dict[str, Any], what: str, gpt: Gpt, folder: Path
) -> None:
    """D7: exit 3 with file, line and field, and how to name another field; never `3` as text."""
    write_rows(folder / "rows.jsonl", [*texts(5), row, *texts(5)])
    code, out, err = gpt("pretrain", "tiny.yaml", train_on("rows.jsonl"), "--dry-run")
    assert (code, out) == (3, "")
    assert errors(err) == [f"rows.jsonl:6: {what}"]
    assert "text_field" in hints(err)


@pytest.mark.usefixtures("no_model")
def test_d07_columns_that_are_no_text(gpt: Gpt, folder: Path) -> None:
    """D7: a table's missing or date-typed column ends with exit 3; its columns are named."""
    day, numbers = [datetime.date(2024, 1, 1)] * 50, list(range(50))
    pq.write_table(pa.table({"body": ["abc"] * 50, "id": numbers}), folder / "other.parquet")
    pq.write_table(pa.table({"text": day, "id": numbers}), folder / "dates.parquet")
    for name, what in [
        ("other.parquet", "no field 'text' (has: body, id)"),
        ("dates.parquet", "field 'text' is not text but date32[day] (has: text, id)"),
    ]:
        code, out, err = gpt("pretrain", "tiny.yaml", train_on(name), "--dry-run")
        assert (code, out) == (3, "")
        assert errors(err) == [f"{name}: {what}"]
        assert "text_field" in hints(err)


def test_d07_null_rows_and_dates_in_text(gpt: Gpt, folder: Path) -> None:
    """D7: null rows are skipped and counted; text that looks like a date stays text."""
    dates = [{"text": f"2024-01-{i % 28 + 1:02d}"} for i in range(99)]
    write_rows(folder / "rows.jsonl", [*dates, {"text": None}, {"text": None}])
    (folder / "rows.csv").write_text("id,text\n" + "".join(f"1,{r['text']}\n" for r in dates))
    code, _, err = gpt("pretrain", "tiny.yaml", train_on("rows.jsonl"), "--run-dir=r")
    assert code == 0, err
    assert "rows.jsonl: 2 rows whose text is null were left out" in warnings(err)
    assert read_run_json(folder / "r")["skipped_text"] == {"null_rows": {"rows.jsonl": 2}}
    for name in ("rows.jsonl", "rows.csv"):
        code, out, err = gpt("data", "show", "tiny.yaml", train_on(name), "--json")
        assert code == 0, err
        shown = "".join(t["text"] for row in json.loads(out)["rows"] for t in row["tokens"])
        assert "2024-01-" in shown


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.parquet", "a.arrow", "a.npy"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
@pytest.mark.usefixtures("no_model")
def test_d08_truncated_files(name: str, kept: float, gpt: Gpt, folder: Path) -> None:
    """D8: a download that broke off ends with exit 3 and the file's name, not a bare EOFError; the
    command of the hint shows how much of it there is."""
    rows = "".join(json.dumps(row) + "\n" for row in texts(400))
    if name.endswith(".gz"):
        data = gzip.compress((rows if "jsonl" in name else PROSE).encode())
    elif name == "a.npy":
        data = b"\x93NUMPY\x01\x00" + b"v\x00{'descr': '<u2', 'fortran_order': False, "
    else:
        table, sink = pa.table({"text": [r["text"] for r in texts(400)]}), pa.BufferOutputStream()
        if name == "a.parquet":
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        data = sink.getvalue().to_pybytes()
    name = f"my {name}"
    (folder / name).write_bytes(data[: int(len(data) * kept)])
    code, out, err = gpt("pretrain", "tiny.yaml", train_on(name), "--dry-run")
    assert (code, out) == (3, "")
    (line,) = errors(err)
    assert line.startswith(f"{name}: ")
    assert len(line) > len(name) + 20  # says what is wrong
    *_, look, again = hints(err).splitlines()
    shown = subprocess.run(look.partition(": ")[2], shell=True, capture_output=True, text=True)
    assert shown.stdout.split()[4] == str(int(len(data) * kept))
    assert again == "download or copy it again, or leave it out of data.train"
    assert not any(bare in err for bare in ("EOFError", "StopIteration", "ArrowInvalid", "BadGzip"))


def test_d09_utf16_and_byte_order_marks(gpt: Gpt, folder: Path) -> None:
    """D9: UTF-16 is an error (exit 3) whose hint works as it stands; a mark is no character."""
    path = folder / "other.txt"
    path.write_bytes(PROSE.encode("utf-16"))
    code, out, err = gpt("pretrain", "tiny.yaml", train_on("other.txt"), "--dry-run")
    assert (code, out) == (3, "")
    assert errors(err) == ["other.txt: UTF-16 text, not utf-8"]
    assert "encoding: utf-16" in hints(err)

    def shown(flag: str) -> Any:
        code, out, err = gpt("data", "show", "tiny.yaml", flag, "--json", "-n", "400")
        assert code == 0, err
        return json.loads(out)["rows"]

    path.write_text(PROSE)
    plain = shown(train_on("other.txt"))
    path.write_bytes(PROSE.encode("utf-16"))
    source = hints(err).partition("eval.data): ")[2]
    assert shown(f"--set=data.train=[{source}]") == plain
    path.write_bytes(b"\xef\xbb\xbf" + PROSE.encode())
    assert shown(train_on("other.txt")) == plain


@pytest.mark.parametrize("tokenizer", ["{kind: bytes}", "{kind: bpe, vocab_size: 300}"])
def test_d10_end_of_text_in_the_text(tokenizer: str, gpt: Gpt, folder: Path) -> None:
    """D10: `<|endoftext|>` in text and prompts is ordinary text; such a file is trained on."""
    special = "<|endoftext|>"
    write_rows(folder / "rows.jsonl", [{"text": f"{special} {i} {special}"} for i in range(200)])
    flags = (f"--set=tokenizer={tokenizer}", train_on("rows.jsonl"))
    long = ("--set=model.block_size=1024", "--set=training.tokens_per_step=2048")
    code, out, err = gpt("data", "show", "tiny.yaml", *flags, *long, "--json", "-n", "1")
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    ids = [token["id"] for token in row["tokens"]]
    eot = next(token["id"] for token in row["tokens"] if token["kind"] == "eot")
    written = "".join(t["text"] for t in row["tokens"] if t["kind"] != "eot").count(special)
    assert written > 20
    # One stands before each document, and each says it twice.
    assert ids.count(eot) == pytest.approx(written / 2, abs=1)

    code, _, err = gpt("pretrain", "tiny.yaml", *flags, "--run-dir=r")
    assert code == 0, err
    # 31 of them are far too long for the window as text, and just fit as tokens.
    prompt = ("generate", "--model=r", "--truncate=error", "--max-new-tokens=1", "--prompt")
    code, _, err = gpt(*prompt, special * 31)
    assert code == 2
    count = int(errors(err)[0].removeprefix("the prompt has ").split()[0])
    assert count >= 2 * 31
    assert gpt(*prompt, special * 31, "--allow-special")[0] == 0


def test_d11_long_lines_without_spaces(gpt: Gpt, folder: Path) -> None:
    """D11: 300,000 characters without a space, a million ^ and a line of 10 MB take seconds."""
    train_bpe([PROSE, "^" * 64], 400, "gpt4", 10**9).save(folder / "bpe")
    (folder / "text.txt").write_text("x" * 300_000 + "\n" + "^" * 1_000_000 + "\n" + PROSE)
    (folder / "rows.jsonl").write_text(json.dumps({"text": "ab" * 5_000_000}) + "\n")
    own = ("--set=tokenizer={kind: file, path: bpe}", "--set=eval.max_tokens=500")
    begun = time.process_time()
    assert gpt("pretrain", "tiny.yaml", *own, "--run-dir=r")[0] == 0
    code, _, err = gpt(
        "pretrain", "tiny.yaml", train_on("rows.jsonl"), "--set=eval.max_tokens=500", "--dry-run"
    )
    assert code == 0, err
    assert time.process_time() - begun < 12


@pytest.fixture
def base(gpt: Gpt, folder: Path) -> Path:
    """A pretrained run to finetune."""
    assert gpt("pretrain", "tiny.yaml", "--run-dir=base", "--set=training.max_steps=1")[0] == 0
    write_rows(folder / "val.jsonl", [{"q": f"v{i}", "a": "yes"} for i in range(8)])
    return folder / "base"


@pytest.mark.usefixtures("base")
def test_d12_rows_that_leave_nothing_to_learn(gpt: Gpt, folder: Path) -> None:
    """D12: a row that fills the block is skipped and counted, a prompt that does is shortened:
    no loss over zero targets, which is NaN; a set of such rows only ends with exit 3."""
    good = [{"q": f"q{i}", "a": "abc"[i % 3]} for i in range(10)]
    filling = {"q": "what", "a": "an answer much longer than the block of 32"}
    write_rows(folder / "rows.jsonl", [*good, filling, {"q": "long " * 20, "a": "y"}])
    code, _, err = gpt("finetune", "tuned.yaml", "--model=base", "--run-dir=f")
    assert code == 0, err
    assert None not in losses(folder / "f")
    counted = warnings(err)
    assert "1 that do not fit are left out" in counted
    assert "1 are cut" in counted

    write_rows(folder / "rows.jsonl", [filling] * 5)
    code, out, err = gpt("finetune", "tuned.yaml", "--model=base", "--run-dir=g")
    assert (code, out) == (3, "")
    assert "no training row fits" in errors(err)[0]
    assert "block_size 32" in errors(err)[0]


@pytest.mark.usefixtures("base")
def test_d13_rows_without_the_field(gpt: Gpt, folder: Path) -> None:
    """D13: exit 3 with line and field, before anything is trained or scored."""
    rows = [{"q": f"q{i}", "a": "b"} for i in range(60)]
    del rows[37]["a"]
    write_rows(folder / "rows.jsonl", rows)
    for extra in ("--run-dir=f", "--dry-run"):
        code, out, err = gpt("finetune", "tuned.yaml", "--model=base", extra)
        assert (code, out) == (3, "")
        assert errors(err) == ["rows.jsonl:38: no field 'a' (has: q)"]
        assert "finetune.fields" in hints(err)
    assert not (folder / "f" / "checkpoints").exists()


@pytest.mark.usefixtures("base")
def test_d13_rows_that_do_not_fill_the_template(gpt: Gpt, folder: Path) -> None:
    """D13: a variable that one row lacks ends with exit 3 and its line before anything trains."""
    rows = [{"q": f"q{i}", "a": "b", "topic": "t"} for i in range(60)]
    write_rows(folder / "val.jsonl", rows[:5])
    del rows[37]["topic"]
    write_rows(folder / "rows.jsonl", rows)
    template = "--set=finetune.template={{ topic }} {{ prompt }}"
    for extra in ("--run-dir=f", "--dry-run"):
        code, out, err = gpt("finetune", "tuned.yaml", "--model=base", template, extra)
        assert (code, out) == (3, "")
        assert errors(err) == ["rows.jsonl:38: finetune.template: 'topic' is undefined (has: q, a)"]
    assert not (folder / "f" / "checkpoints").exists()


def test_d04_an_empty_validation_file(gpt: Gpt, folder: Path) -> None:
    """D4: data.val without text ends with exit 3 and its name."""
    (folder / "empty.txt").write_text("")
    code, out, err = gpt("pretrain", "tiny.yaml", "--set=data.val=empty.txt", "--dry-run")
    assert (code, out) == (3, "")
    assert errors(err) == ["the validation data has 0 documents: empty.txt"]
    assert gpt("pretrain", "tiny.yaml", *hints(err).split()[-2:], "--dry-run")[0] == 0


def test_d14_data_that_changed(gpt: Gpt, folder: Path) -> None:
    """D14: a resume over other data ends with exit 4 and the file's name, and loses nothing;
    --allow-data-change goes on, with a warning."""
    handle = stop_after(2)
    try:
        assert gpt("pretrain", "tiny.yaml", "--run-dir=r")[0] == 143
    finally:
        handle.remove()
    with (folder / "text.txt").open("a") as f:
        f.write("one more line\n")
    saved = content(folder / "r")
    resume = ("pretrain", "tiny.yaml", "--run-dir=r", "--resume")
    code, out, err = gpt(*resume)
    assert (code, out) == (4, "")
    assert "text.txt (changed)" in errors(err)[0]
    assert "--allow-data-change" in hints(err)
    assert content(folder / "r") == saved
    code, _, err = gpt(*resume, "--allow-data-change")
    assert code == 0, err
    assert "text.txt (changed)" in warnings(err)
    assert read_metrics(folder / "r")[-1]["step"] == 4


def test_d14_a_longer_run_over_other_data(gpt: Gpt, folder: Path) -> None:
    """D14: a finished run that is to go on for longer, over other data, stays as it was: its best
    checkpoint, its log, its config."""
    saves = "--set=training.save_every=1"
    assert gpt("pretrain", "tiny.yaml", "--run-dir=r", saves)[0] == 0
    with (folder / "text.txt").open("a") as f:
        f.write("one more line\n")
    saved = content(folder / "r")
    more = ("--resume", saves, "--set=training.max_steps=9", "--set=optimizer.lr=0.1")
    assert gpt("pretrain", "tiny.yaml", "--run-dir=r", *more)[0] == 4
    assert content(folder / "r") == saved
    assert gpt("pretrain", "tiny.yaml", "--run-dir=r", *more, "--allow-data-change")[0] == 0
    assert read_metrics(folder / "r")[-1]["step"] == 9


def test_d14_files_of_a_pattern_that_come_and_go(gpt: Gpt, folder: Path) -> None:
    """D14: so do files that a pattern finds anew, or finds no more, each by its name."""
    for number in range(3):
        text = "".join(f"In year {number} on day {i} a dog ran away.\n" for i in range(60))
        (folder / f"part-{number}.txt").write_text(text)
    flags = ("pretrain", "tiny.yaml", "--run-dir=r", train_on("part-*.txt"))
    handle = stop_after(3)
    try:
        assert gpt(*flags)[0] == 143
    finally:
        handle.remove()
    (folder / "part-0.txt").unlink()
    (folder / "part-2.txt").rename(folder / "part-7.txt")
    saved = content(folder / "r")
    code, _, err = gpt(*flags, "--resume")
    assert code == 4
    changes = "part-0.txt (gone), part-2.txt (gone), part-7.txt (new)"
    assert errors(err)[0].endswith(f": {changes}")
    assert content(folder / "r") == saved
    code, _, err = gpt(*flags, "--resume", "--allow-data-change")
    assert code == 0, err
    assert changes in warnings(err)
    assert read_metrics(folder / "r")[-1]["step"] == 4


def sources(*weights: str) -> str:
    """--set for sources by file and weight."""
    each = (weight.split("=") for weight in weights)
    found = ", ".join(f"{{path: {file}, weight: {share}}}" for file, share in each)
    return f"--set=data.train=[{found}]"


@pytest.mark.parametrize("flag", [(), ("--allow-data-change",)])
def test_d14_other_sources(flag: tuple[str, ...], gpt: Gpt, folder: Path) -> None:
    """D14: a source of a mixture that is added, removed, weighted or named before another makes
    another run: exit 4, with --allow-data-change too, which is for what the files hold."""
    for name in ("b.txt", "c.txt"):
        (folder / name).write_text(PROSE.replace("cat", f"{name[0]} dog"))
    flags, own = ("pretrain", "tiny.yaml", "--run-dir=r"), sources("text.txt=1", "b.txt=2")
    handle = stop_after(2)
    try:
        assert gpt(*flags, own)[0] == 143
    finally:
        handle.remove()
    saved = content(folder / "r")
    for other in (
        sources("text.txt=1", "b.txt=2", "c.txt=1"),
        sources("text.txt=1"),
        sources("b.txt=2", "text.txt=1"),
        sources("text.txt=1", "b.txt=3"),
    ):
        code, out, err = gpt(*flags, other, "--resume", *flag)
        assert (code, out) == (4, "")
        assert "which a resume cannot change: data.train: " in errors(err)[0]
        assert content(folder / "r") == saved
    assert gpt(*flags, own, "--resume", *flag)[0] == 0


def test_d15_validation_text_that_is_trained_on(gpt: Gpt, folder: Path) -> None:
    """D15: a warning names the file that is in both parts, by its content, not by its name."""
    shutil.copy(folder / "text.txt", folder / "copy.txt")
    for name in ("text.txt", "copy.txt"):
        code, _, err = gpt("pretrain", "tiny.yaml", f"--set=data.val={name}", "--dry-run")
        assert code == 0, err
        assert warnings(err) == f"{name} is validation and training data at once"
    (folder / "copy.txt").write_text(PROSE.upper())
    assert warnings(gpt("pretrain", "tiny.yaml", "--set=data.val=copy.txt", "--dry-run")[2]) == ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on this machine with a corpus of several blocks; waiting is short."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", (0.01, 0.01, 0.01, 0.01))
    monkeypatch.setattr(remote, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(remote, "CACHE_BLOCKS", 2)
    monkeypatch.setattr(remote, "HEAD_BYTES", 64)
    monkeypatch.setattr(remote, "_CACHE", remote._Cache())
    # Records are read shortly before they are used, not 8 MiB ahead.
    monkeypatch.setattr("gptcli.data.encode.AHEAD_BYTES", 4096)
    monkeypatch.setattr("gptcli.data.encode._JOB_BYTES", 512)
    monkeypatch.setattr("gptcli.data.packing.GROUP_TOKENS", 256)
    monkeypatch.setattr("gptcli.data.rows.Prefetch._DEPTH", 1)
    huggingface_hub.close_session()
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        rows = "".join(json.dumps(row) + "\n" for row in texts(1200))
        server.commit("me/days", {"train.jsonl": rows.encode()})
        yield server
    huggingface_hub.close_session()


REMOTE = (
    "--set=data={train: 'hub:me/days', shuffle_window: 8}",
    "--set=eval.max_tokens=300",
    "--set=training={max_steps: 40, tokens_per_step: 256, log_every: 1, eval_every: 1000,"
    " save_every: 1000, micro_batch_size: 8, precision: fp32, compile: off, device: cpu}",
)


def test_d16_a_network_that_goes_away(
    gpt: Gpt, folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D16: after bounded retries the run ends with exit 3, its steps saved with the cursor;
    --resume, with the network back, ends with the model of a run that was never interrupted."""
    code, _, err = gpt("pretrain", "tiny.yaml", *REMOTE, "--run-dir=straight")
    assert code == 0, err
    updates = 0

    def network_goes(*_: Any) -> None:
        nonlocal updates
        updates += 1
        if updates == 5:
            hub.drop_after, hub.drops = 10, 10**6

    monkeypatch.setattr(remote, "_CACHE", remote._Cache())
    handle = UpdateHook(network_goes)
    try:
        code, out, err = gpt("pretrain", "tiny.yaml", *REMOTE, "--run-dir=r")
    finally:
        handle.remove()
    assert (code, out) == (3, "")
    (line,) = errors(err)
    assert "train.jsonl: the network failed: " in line
    assert "--resume" in hints(err)
    trained = losses(folder / "r")
    assert 5 <= len(trained) < 40
    last = checkpoint.list_checkpoints(folder / "r")[-1]
    checkpoint.verify(last)
    assert checkpoint.read_state(last)["train"]["step"] == len(trained)
    assert read_run_json(folder / "r")["status"] == "failed"

    hub.drops = 0
    monkeypatch.setattr(remote, "_CACHE", remote._Cache())
    code, _, err = gpt("pretrain", "tiny.yaml", *REMOTE, "--run-dir=r", "--resume")
    assert code == 0, err
    assert losses(folder / "r") == losses(folder / "straight")
    assert weights(folder / "r") == weights(folder / "straight")


def test_d16_a_network_that_stutters(
    gpt: Gpt, folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D16: drops now and then are bridged by retries and change nothing."""
    short = (*REMOTE, "--set=training.max_steps=20")
    assert gpt("pretrain", "tiny.yaml", *short, "--run-dir=straight")[0] == 0
    monkeypatch.setattr(remote, "_CACHE", remote._Cache())
    updates = 0

    def stutter(*_: Any) -> None:
        nonlocal updates
        updates += 1
        if updates in (3, 12):
            hub.drop_after, hub.drops = 100, hub.drops + 2

    handle = UpdateHook(stutter)
    try:
        code, _, err = gpt("pretrain", "tiny.yaml", *short, "--run-dir=r")
    finally:
        handle.remove()
    assert code == 0, err
    assert hub.drops == 0
    assert weights(folder / "r") == weights(folder / "straight")


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Half a minute, then TimeoutError, so that a test for hanging does not hang itself."""

    def expired(*_: Any) -> None:
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.usefixtures("no_hang")
def test_d17_a_reader_that_dies(
    cache: str, gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D17: what kills the reading thread is raised in the loop at the next batch: no hang."""
    write_rows(folder / "rows.jsonl", texts(99))
    read, windows = RecordStream._read_window, 0

    def read_and_die(self: RecordStream) -> None:
        nonlocal windows
        windows += 1
        if windows == 40:
            assert threading.current_thread() is not threading.main_thread()
            raise RuntimeError("the reader has died")
        read(self)

    monkeypatch.setattr(stream.RecordStream, "_read_window", read_and_die)
    monkeypatch.setattr("gptcli.data.packing.GROUP_TOKENS", 128)
    flags = ("--set=data.shuffle_window=2", f"--set=data.cache={cache}")
    code, out, err = gpt(
        "pretrain",
        "tiny.yaml",
        train_on("rows.jsonl"),
        *flags,
        "--set=training.max_steps=5000",
        "--run-dir=r",
    )
    assert (code, out) == (1, "")
    assert errors(err) == ["internal: RuntimeError: the reader has died"]
    assert 0 < len(losses(folder / "r")) < 5000
    assert read_run_json(folder / "r")["status"] == "failed"


@pytest.mark.parametrize("window", [1, 4, 1000])
def test_d18_epochs_after_a_resume(
    window: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D18: resumed in epoch 0, that epoch and the next have each document once, in a new order."""
    for module in (shards, readers, scan, corpus):
        monkeypatch.setattr(module, "PIECE_BYTES", 100)
    monkeypatch.setattr(corpus, "SHARD_BYTES", 400)
    write_rows(folder / "rows.jsonl", texts(120))
    found = open_corpus(DataConfig(train=[SourceConfig(path="rows.jsonl")], val_fraction=0.1))
    assert len(found.train) > 5

    def epoch(records: RecordStream) -> list[str]:
        return [record["text"] for record in iter(records.next, None)]

    straight = RecordStream(ShardReader(found.train), found.train_bytes, 7, window)
    first, second = epoch(straight), epoch(straight)
    written = sorted(record["text"] for record in found.train_records())
    assert sorted(first) == sorted(second) == written
    assert first != second
    for cut in (1, 37, len(first) - 1, len(first)):
        begun = RecordStream(ShardReader(found.train), found.train_bytes, 7, window)
        head = [record["text"] for record in islice(iter(begun.next, None), cut)]
        state = json.loads(json.dumps(begun.state()))
        resumed = RecordStream(ShardReader(found.train), found.train_bytes, 7, window, state)
        assert [*head, *epoch(resumed)] == first
        assert epoch(resumed) == second


def test_d18_an_epoch_of_a_resumed_run(gpt: Gpt, folder: Path) -> None:
    """D18: a run of two epochs, stopped in the first, has trained on each document twice."""
    write_rows(folder / "rows.jsonl", texts(104))
    limit = "--set=training={max_epochs: 2, tokens_per_step: 64, log_every: 1, device: cpu}"
    flags = (train_on("rows.jsonl"), limit, "--run-dir=r")
    handle = stop_after(7)
    try:
        assert gpt("pretrain", "tiny.yaml", *flags)[0] == 143
    finally:
        handle.remove()
    code, _, err = gpt("pretrain", "tiny.yaml", *flags, "--resume")
    assert code == 0, err
    about = read_run_json(folder / "r")
    held_out = about["data"]["val"]["documents"]
    # The last row of an epoch waits for the next one, and steps do not end with epochs.
    assert abs(about["mixture"][0]["documents"] - 2 * (104 - held_out)) <= 6


def test_d19_control_characters(gpt: Gpt, folder: Path) -> None:
    """D19: NUL, ESC and C1 controls are trained on as they are, and never reach a terminal raw."""
    bad = "\x1b[31mred\x00\x07\x9b2J\x1b]52;c;aGk=\x07"
    (folder / "text.txt").write_text((bad + "\n") * 300)
    code, out, err = gpt("data", "show", "tiny.yaml", "--json", "-n", "400")
    assert code == 0, err
    ids = {token["id"] for row in json.loads(out)["rows"] for token in row["tokens"]}
    assert ids - {256} == set(f"{bad}\n".encode())
    code, out, err = gpt("data", "check", "tiny.yaml")
    assert code == 0, err
    assert not any(control in out + err for control in "\x1b\x00\x07\x9b")
    code, out, err = gpt("data", "show", "tiny.yaml")
    assert code == 0, err
    assert not any(control in out + err for control in "\x1b\x00\x07")
    prompts = f"--set=samples={json.dumps({'prompts': [bad], 'n': 1, 'max_new_tokens': 2})}"
    code, out, err = gpt("pretrain", "tiny.yaml", prompts, "--run-dir=r")
    assert code == 0, err
    assert "\\x1b[31mred" in err
    assert not any(control in out + err for control in "\x1b\x00\x07\x9b")
