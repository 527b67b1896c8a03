"""Wrong configs, flags and paths: the C rows of the fault matrix, one after the other.

Each test names its row and says what the row owes: exit code, message, hint, and what is kept.
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import Forked
from outcome import errors, hints, warnings
from processes import logged, training, until
from small import TINY, working_in
from update_hook import UpdateHook

from gptcli import stop
from gptcli.cli.main import main
from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, choose_precision
from gptcli.errors import ResourceError
from gptcli.model.gpt import GPT, initialise
from gptcli.runs.checkpoint import Contents, publish
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import new_run_dir, read_run_json

Gpt = Callable[..., tuple[int, str, str]]

SHORT = ("--max-new-tokens=4", "--seed=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has finished; to be copied."""
    with working_in(tmp_path_factory.mktemp("finished")) as place:
        assert main(["pretrain", "tiny.yaml", "--run-dir=r", "--quiet"]) == 0
    return place / "r"


@pytest.fixture
def run(finished: Path, folder: Path) -> Path:
    """A copy of that run, as `r` in the user's folder."""
    shutil.copytree(finished, folder / "r")
    return folder / "r"


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a text ends with exit code 1."""

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a text was read")

    monkeypatch.setattr("gptcli.pretrain.open_corpus", read)


def content(directory: Path) -> dict[str, bytes]:
    """All files below a directory."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def shown(gpt: Gpt, text: str) -> dict[str, Any]:
    """The config that gpt reads in a file with that text."""
    Path("c.yaml").write_text(text)
    code, out, err = gpt("config", "show", "c.yaml")
    assert code == 0, err
    found: dict[str, Any] = yaml.safe_load(out)
    return found


def refused(gpt: Gpt, text: str | bytes) -> list[str]:
    """The problems of a file with that text: exit 2, and nothing is written."""
    Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = gpt("pretrain", "c.yaml")
    assert (code, out) == (2, "")
    assert not Path("runs").exists()
    return errors(err)


@pytest.mark.usefixtures("no_data")
def test_c01_unknown_key(gpt: Gpt) -> None:
    """C1: exit 2 with the line, the key and the key that was meant; the same for --set."""
    text = "name: a\noptimizer:\n  learnin_rate: 0.1\ntrainig: {}\n"
    assert refused(gpt, text) == [
        "c.yaml:3:3: unknown key 'learnin_rate' in optimizer; did you mean 'lr'?",
        "c.yaml:4:1: unknown key 'trainig'; did you mean 'training'?",
    ]
    code, _, err = gpt("pretrain", "tiny.yaml", "--set=optimizer.learnin_rate=1", "--dry-run")
    assert code == 2
    assert errors(err) == [
        "--set optimizer.learnin_rate=1: unknown key 'learnin_rate' in optimizer;"
        " did you mean 'lr'?"
    ]


@pytest.mark.parametrize(
    ("written", "rate"),
    [("3e-4", 3e-4), ("3.0e-4", 3e-4), ("1e3", 1e3), ('"3e-4"', 3e-4), (".5", 0.5), ("1", 1.0)],
)
def test_c02_numbers_with_exponents(written: str, rate: float, gpt: Gpt) -> None:
    """C2: `3e-4` is the number in a file and in --set, though plain YAML takes it for text."""
    found = shown(gpt, f"optimizer: {{lr: {written}}}\n")["optimizer"]["lr"]
    assert (found, type(found)) == (rate, float)
    code, out, err = gpt("config", "show", "tiny.yaml", f"--set=optimizer.lr={written}")
    assert code == 0, err
    assert yaml.safe_load(out)["optimizer"]["lr"] == rate


@pytest.mark.parametrize("written", ["no", "on", "12:30:45", "2024-01-01", "'017'"])
def test_c03_words_stay_words(written: str, gpt: Gpt) -> None:
    """C3: where text belongs, `no`, a time and a date are that text, not false, 45045 or a date;
    also in the config that a run keeps."""
    prompt = f"generate: {{prompt: {written}}}\n"
    assert shown(gpt, f"name: n\n{prompt}")["generate"]["prompt"] == written.strip("'")
    Path("c.yaml").write_text(TINY + prompt)
    code, _, err = gpt("pretrain", "c.yaml", "--run-dir=r", "--set=training.max_steps=1")
    assert code == 0, err
    kept = gpt("config", "show", "r/config.yaml")[1]
    assert yaml.safe_load(kept)["generate"]["prompt"] == written.strip("'")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("seed: 017", "seed: '017' has a leading zero: write 17, or quote it for text"),
        ("name: true", "name: expected text, got true; quote it: 'true'"),
        ("name: 12", "name: expected text, got the number 12; quote it: '12'"),
        ("seed: 2024-01-01", "seed: expected a whole number, got the text '2024-01-01'"),
        ("seed: 12:30:45", "seed: expected a whole number, got the text '12:30:45'"),
        ("seed: yes", "seed: expected a whole number, got the text 'yes'"),
    ],
)
@pytest.mark.usefixtures("no_data")
def test_c03_other_types_are_refused(line: str, problem: str, gpt: Gpt) -> None:
    """C3: what would be read as another type than the key has ends with exit 2, and the quotes
    that are missing; `017` is never 15."""
    assert refused(gpt, f"{line}\n") == [f"c.yaml:1:7: {problem}"]


@pytest.mark.usefixtures("no_data")
def test_c04_a_key_given_twice(gpt: Gpt) -> None:
    """C4: exit 2 with both lines, for keys and whole sections; the last one does not win."""
    text = "seed: 1\nmodel: {n_layer: 1}\nmodel:\n  n_layer: 2\nseed: 2\n"
    assert refused(gpt, text) == [
        "c.yaml:3:1: repeated key 'model'; it was given before on line 2",
        "c.yaml:5:1: repeated key 'seed'; it was given before on line 1",
    ]


@pytest.mark.parametrize(
    ("text", "got"), [("", "an empty file"), ("- a\n", "a list"), ("5\n", "a single value")]
)
@pytest.mark.usefixtures("no_data")
def test_c05_no_mapping(text: str, got: str, gpt: Gpt) -> None:
    """C5: exit 2: a config is a mapping of sections, and what the file holds instead."""
    (problem,) = refused(gpt, text)
    assert problem.startswith("c.yaml:1:1: expected a mapping of sections")
    assert problem.endswith(f", got {got}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\nname: {", "2:8: not valid YAML: expected the node content"),
        ("model:\n\tn_layer: 3\n", "2:1: not valid YAML: found character '\\t'"),
        ("seed: 1\nname: \x1b[31m\n", "2:7: character U+001B is not allowed in YAML"),
        ("name: \0\n", "1:7: character U+0000 is not allowed in YAML"),
    ],
)
@pytest.mark.usefixtures("no_data")
def test_c06_no_yaml(text: str, problem: str, gpt: Gpt) -> None:
    """C6: exit 2 with line and column; control bytes are shown as numbers, never sent on."""
    found = refused(gpt, text)
    assert found[0].startswith(f"c.yaml:{problem}")
    assert "\x1b" not in "".join(found)


@pytest.mark.usefixtures("no_data")
def test_c06_python_objects(gpt: Gpt, folder: Path) -> None:
    """C6: a config that asks for Python objects ends with exit 2, and nothing in it is run."""
    canary = folder / "canary"
    text = f"seed: 1\nname: !!python/object/apply:os.system ['touch {canary}']\n"
    first = refused(gpt, text)[0]
    assert first.startswith("c.yaml:2:7: tag '!!python/object/apply:os.system' is not allowed")
    assert not canary.exists()


def little_memory() -> None:
    """For a child: 200 MB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 200 * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("no_data")
def test_c07_alias_bomb(gpt: Gpt) -> None:
    """C7: more than 10,000 values, aliases written out, end with exit 2 in under a second and
    200 MB."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    start = time.process_time()
    found = refused(gpt, "\n".join(lines))
    assert time.process_time() - start < 1.0
    assert "more than 10000 values, with aliases written out" in found[0]
    Path("bomb.yaml").write_text("\n".join(lines))
    code, err = Forked(["config", "check", "bomb.yaml"], before=little_memory).wait()
    assert code == 2
    assert "more than 10000 values" in errors(err)[0]


@pytest.mark.usefixtures("no_data")
def test_c07_a_file_too_large(gpt: Gpt) -> None:
    """C7: a config above 1 MB ends with exit 2: it is no config."""
    assert refused(gpt, "a" * 1_000_001) == [
        "c.yaml: above 1,000,000 bytes, too large for a config"
    ]


WRONG = """\
name: wrong
data: {train: text.txt, val_fraction: 1.5}
model:
  n_embd: 30
  n_head: 4
  dropout: 1.5
optimizer:
  lr: .nan
  adamw_lr: -1
  embedding_lr: .inf
training:
  max_steps: 10
  tokens_per_step: 1000
  micro_batch_size: 0
  eval_every: 0
schedule: {warmup_steps: 50}
"""


@pytest.mark.usefixtures("no_data")
def test_c08_all_problems_at_once(gpt: Gpt) -> None:
    """C8: exit 2 before a text is read or a model built; every problem of the file is listed, in
    its order: values out of range, and those that cannot go together."""
    assert refused(gpt, WRONG) == [
        "c.yaml:2:39: data.val_fraction: must be below 1, got 1.5",
        "c.yaml:3:1: model: n_embd 30 is not divisible by n_head 4",
        "c.yaml:6:12: model.dropout: must be below 1, got 1.5",
        "c.yaml:8:7: optimizer.lr: must be a finite number, got .nan",
        "c.yaml:9:13: optimizer.adamw_lr: must be above 0, got -1",
        "c.yaml:10:17: optimizer.embedding_lr: must be a finite number, got .inf",
        "c.yaml:14:21: training.micro_batch_size: must be above 0, got 0",
        "c.yaml:15:15: training.eval_every: must be above 0, got 0",
        "c.yaml:16:26: schedule.warmup_steps 50 is above training.max_steps 10",
    ]
    text = "model: {dropout: -1, block_size: 64}\ntraining: {tokens_per_step: 1000}\n"
    assert refused(gpt, text + "schedule: {decay_ratio: 2}\n") == [
        "c.yaml:1:18: model.dropout: must be at least 0, got -1",
        "c.yaml:2:29: training.tokens_per_step 1000 is not a multiple of model.block_size 64",
        "c.yaml:3:25: schedule.decay_ratio: must be at most 1, got 2",
    ]
    assert refused(gpt, "model: {block_size: 0}\n") == [
        "c.yaml:1:21: model.block_size: must be above 0, got 0"
    ]


def test_c08_without_torch() -> None:
    """C8: the problems are there before torch is loaded: at once, not after seconds."""
    Path("c.yaml").write_text(WRONG)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gptcli", "pretrain", "c.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "gptcli.config.check" in imported
    assert "torch" not in imported
    assert done.stderr.count("\nerror: ") == 9


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--temperature", "nan"], "--temperature: "),
        (["--temperature", "inf"], "--temperature: "),
        (["--temperature", "-1"], "--temperature: "),
        (["--top-k", "0"], "--top-k: "),
        (["--top-p", "0"], "--top-p: "),
        (["--top-p", "1.5"], "--top-p: "),
        (["--min-p", "-0.1"], "--min-p: "),
        (["--repetition-penalty", "0"], "--repetition-penalty: "),
        (["--presence-penalty", "nan"], "--presence-penalty: "),
        (["--frequency-penalty", "inf"], "--frequency-penalty: "),
        (["-n", "0"], "-n: "),
        (["-n", "99999999999"], "-n: "),  # filled memory before the first text
        (["--max-new-tokens", "0"], "--max-new-tokens: "),
        (["--logprobs", "-1"], "--logprobs: "),
    ],
)
def test_c09_out_of_range(flags: list[str], named: str, gpt: Gpt) -> None:
    """C9: exit 2 with the flag, inf and nan included, before a model is looked for."""
    code, out, err = gpt("generate", "--prompt", "x", *flags)
    assert (code, out) == (2, "")
    assert errors(err)[0].startswith(named)


def test_c09_all_at_once(gpt: Gpt) -> None:
    """C9: all flags that are wrong are listed, in the `generate:` section too."""
    code, _, err = gpt("generate", "--prompt=x", "-n", "0", "--top-p", "2", "--top-k", "0")
    assert code == 2
    assert [line.split(":")[0] for line in errors(err)] == ["-n", "--top-k", "--top-p"]
    Path("g.yaml").write_text("generate: {temperature: .inf, top_k: 0}\n")
    code, _, err = gpt("generate", "--prompt=x", "--config=g.yaml")
    assert code == 2
    assert errors(err) == [
        "g.yaml:1:25: generate.temperature: must be a finite number, got .inf",
        "g.yaml:1:38: generate.top_k: must be above 0, got 0",
    ]


@pytest.mark.usefixtures("run")
def test_c09_extremes_that_are_fine(gpt: Gpt) -> None:
    """C9: temperature 0 takes the likeliest token each time, whatever the seed; a top-k above the
    vocabulary is all of it."""
    flags = ("generate", "--model=r", "--prompt=On", "--max-new-tokens=9")
    greedy = {gpt(*flags, "--temperature=0", f"--seed={seed}")[:2] for seed in range(3)}
    assert [code for code, _ in greedy] == [0]
    assert gpt(*flags, "--top-k=1", "--seed=1")[:2] in greedy
    every = gpt(*flags, "--seed=1", "--top-k=257")
    assert every[0] == 0
    assert gpt(*flags, "--seed=1", "--top-k=999999") == every


def test_c10_no_such_file(gpt: Gpt, folder: Path) -> None:
    """C10: exit 2 with the path; a config that is nearly named so is suggested, else all are."""
    code, out, err = gpt("pretrain", "smal")
    assert (code, out) == (2, "")
    assert errors(err) == ["smal: no such config file"]
    assert hints(err) == "did you mean the shipped config 'small'?"
    code, _, err = gpt("pretrain", "mine/run-7.yaml")
    assert code == 2
    assert errors(err) == ["mine/run-7.yaml: no such config file"]
    names = [line.split()[0] for line in gpt("config", "list")[1].splitlines() if line[:1].strip()]
    assert {"small", "generate"} <= set(names)
    assert hints(err).startswith("shipped configs: ")
    assert all(
        re.search(rf"\b{re.escape(name)}\b", hints(err)) for name in names if "/" not in name
    )


def test_c10_a_directory(gpt: Gpt, finished: Path, folder: Path) -> None:
    """C10: exit 2 for a directory that is named as a config, or holds a run: its config.yaml is
    what is meant."""
    (folder / "dir.yaml").mkdir()
    code, out, err = gpt("pretrain", "dir.yaml")
    assert (code, out) == (2, "")
    assert errors(err) == ["dir.yaml: is a directory, not a config"]
    code, _, err = gpt("pretrain", str(finished))
    assert code == 2
    assert errors(err) == [f"{finished}: is a directory, not a config"]
    assert hints(err) == f"use {finished}/config.yaml"


def test_c10_unreadable(folder: Path) -> None:
    """C10: exit 2 for a file that may not be read, with the system's reason."""
    (folder / "secret.yaml").write_text(TINY)
    (folder / "secret.yaml").chmod(0)
    folder.chmod(0o755)
    nobody = (lambda: os.setuid(65534)) if os.getuid() == 0 else None
    code, err = Forked(["pretrain", "secret.yaml"], before=nobody).wait()
    assert code == 2
    assert errors(err) == ["secret.yaml: cannot read it: Permission denied"]


def test_c11_another_run_is_there(gpt: Gpt, run: Path, folder: Path) -> None:
    """C11: exit 2 and the two ways to go on; not a byte of the run there changes. --overwrite moves
    it aside, whole."""
    before = content(run)
    flags = ("pretrain", "tiny.yaml", "--run-dir=r", "--set=optimizer.lr=0.5")
    code, out, err = gpt(*flags)
    assert (code, out) == (2, "")
    assert errors(err) == [
        "r holds a run; use --resume to continue or --overwrite to move it aside"
    ]
    assert content(run) == before
    code, _, err = gpt(*flags, "--overwrite")
    assert code == 0, err
    (aside,) = folder.glob("r.old-*")
    assert f"moved the run at r to {aside.name}\n" in err
    assert content(aside) == before
    assert "lr: 0.5" in (run / "config.yaml").read_text()


def test_c11_other_files_are_there(gpt: Gpt, folder: Path) -> None:
    """C11: a directory that holds other files and no run is never written into, nor moved."""
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").write_text("a")
    for flag in ((), ("--overwrite",), ("--auto-resume",)):
        code, _, err = gpt("pretrain", "tiny.yaml", "--run-dir=photos", *flag)
        assert code == 2
        assert errors(err) == [
            "--run-dir photos holds other files and no run; choose a new directory"
        ]
    assert content(folder / "photos") == {"a.jpg": b"a"}


def test_c12_another_model_or_other_data(gpt: Gpt, folder: Path) -> None:
    """C12: exit 4 with every key that a resume cannot change, old and new value; the run stays as
    it is, and is resumed without them."""
    with stopped_after(2):
        assert gpt("pretrain", "tiny.yaml", "--run-dir=r")[0] == 143
    run = folder / "r"
    before = content(run)
    sets = ("model.n_embd=32", "data.val_fraction=0.2", "seed=7", "optimizer.lr=0.5")
    code, out, err = gpt(
        "pretrain", "tiny.yaml", "--run-dir=r", "--resume", *(f"--set={key}" for key in sets)
    )
    assert (code, out) == (4, "")
    (line,) = errors(err)
    for change in ("model.n_embd: 16 -> 32", "data.val_fraction: 0.02 -> 0.2", "seed: 1337 -> 7"):
        assert change in line
    assert "optimizer.lr" not in line
    assert "the run's own config.yaml" in hints(err)
    assert content(run) == before
    assert gpt("pretrain", "tiny.yaml", "--run-dir=r", "--resume")[0] == 0
    assert read_metrics(run)[-1]["step"] == 4


def test_c12_changes_that_are_allowed(gpt: Gpt, run: Path) -> None:
    """C12: another rate, another limit are taken, shown as old -> new, and kept in log.txt."""
    flags = ("--set=optimizer.lr=0.04", "--set=training.max_steps=6")
    code, _, err = gpt("pretrain", "tiny.yaml", "--run-dir=r", "--resume", *flags)
    assert code == 0, err
    for change in ("optimizer.lr: 0.02 -> 0.04", "training.max_steps: 4 -> 6"):
        assert f"changed since the run began: {change}" in warnings(err)
        assert f"changed since the run began: {change}" in (run / "log.txt").read_text()
    assert read_metrics(run)[-1]["step"] == 6


def test_c13_nothing_to_resume(gpt: Gpt, folder: Path) -> None:
    """C13: --resume ends with exit 4 and makes nothing; --auto-resume starts afresh and says so, so
    that one command line serves the start and every restart."""
    for flag, what in (("--run-dir=r", "r has no checkpoint"), ("--quiet", "no unfinished run of")):
        code, out, err = gpt("pretrain", "tiny.yaml", flag, "--resume")
        assert (code, out) == (4, "")
        assert errors(err)[0].startswith(f"nothing to resume: {what}")
        assert "--auto-resume" in hints(err)
    assert not (folder / "r").exists()
    code, out, err = gpt("pretrain", "tiny.yaml", "--auto-resume")
    assert code == 0, err
    assert "nothing to resume: starting afresh" in err
    assert Path(out.splitlines()[0]).parent == folder / "runs"
    again = ("pretrain", "tiny.yaml", "--run-dir=r", "--auto-resume")
    code, _, err = gpt(*again)
    assert code == 0, err
    assert "nothing to resume: starting afresh" in err
    code, _, err = gpt(*again)
    assert code == 0, err
    assert "nothing to do: r is at its limit, step 4" in err


def test_c13_the_newest_unfinished(gpt: Gpt, folder: Path) -> None:
    """C13: without --run-dir the config's newest unfinished run goes on, not the newest run."""
    with stopped_after(2):
        code, out, err = gpt("pretrain", "tiny.yaml")
    assert code == 143, err
    stopped = out.splitlines()[0]
    assert gpt("pretrain", "tiny.yaml")[0] == 0
    code, out, err = gpt("pretrain", "tiny.yaml", "--resume")
    assert code == 0, err
    assert out.splitlines()[0] == stopped
    assert read_run_json(Path(stopped))["status"] == "finished"


@contextmanager
def stopped_after(updates: int) -> Iterator[None]:
    """Ask for a stop in update number `updates`."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == updates:
            stop.request(signal.SIGTERM)

    handle = UpdateHook(count)
    try:
        yield
    finally:
        handle.remove()


def rates(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["lr"] for r in read_metrics(run_dir) if r["event"] == "train"}


def test_c14_another_limit(gpt: Gpt, folder: Path) -> None:
    """C14: the schedule is that of the new limit from the next step on; the rate of that step, old
    and new, is told."""
    linear = ("pretrain", "tiny.yaml", "--set=schedule.kind=linear")
    with stopped_after(2):
        assert gpt(*linear, "--run-dir=r")[0] == 143
    longer = "--set=training.max_steps=10"
    code, _, err = gpt(*linear, longer, "--run-dir=r", "--resume")
    assert code == 0, err
    assert "changed since the run began: training.max_steps: 4 -> 10" in warnings(err)
    assert gpt(*linear, longer, "--run-dir=straight")[0] == 0
    expected = rates(folder / "straight")
    assert {step: rate for step, rate in rates(folder / "r").items() if step > 2} == {
        step: rate for step, rate in expected.items() if step > 2
    }
    told = f"the learning rate at step 2 was 0.01 and is now {expected[3]:.3g}"
    assert told in warnings(err)
    assert told in (folder / "r" / "log.txt").read_text()


def test_c15_two_processes(gpt: Gpt, folder: Path) -> None:
    """C15: the second ends with exit 6 at once and names the process and machine of the first,
    whatever it was to do there; the first goes on, and its run is whole."""
    with training(Path("r")) as child:
        for flag in ("--resume", "--auto-resume", "--overwrite"):
            began = time.monotonic()
            code, out, err = gpt("pretrain", "tiny.yaml", "--run-dir=r", flag)
            assert time.monotonic() - began < 2
            assert (code, out) == (6, "")
            (line,) = errors(err)
            assert line == f"r is in use by process {child.process} on {socket.gethostname()}"
            assert "--run-dir" in hints(err)
        before = logged(folder / "r")
        until(lambda: logged(folder / "r") > before)
        child.send(signal.SIGTERM)
        code, err = child.wait()
    assert code == 143, err
    lines = read_metrics(folder / "r")
    steps = [line["step"] for line in lines if line["event"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert gpt("runs", "verify", "r")[0] == 0


def published(tokenizer: Tokenizer) -> None:
    """A run whose only checkpoint is an untrained model with that tokenizer."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32}
    config = Config.model_validate({"name": "tiny", "model": shape})
    model = GPT(config.model, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    made = new_run_dir("tiny", None, overwrite=False)
    publish(made, 1, Contents(model.state_dict(), {}, {}, dump_config(config), tokenizer))


def test_c16_empty_prompt(gpt: Gpt) -> None:
    """C16: a text from nothing begins as documents do, behind the end-of-text token."""
    published(Tokenizer.of_bytes())
    code, out, err = gpt("generate", "--prompt=", "--json", *SHORT)
    assert code == 0, err
    from_start = gpt("generate", "--prompt-tokens=256", "--json", *SHORT)[1]
    assert json.loads(out)["tokens"] == json.loads(from_start)["tokens"]


def test_c16_nothing_to_start_from(gpt: Gpt) -> None:
    """C16: exit 2 where the tokenizer has no token that begins a document."""
    published(Tokenizer("file", {bytes([b]): b for b in range(256)}, r"[\s\S]", None))
    code, out, err = gpt("generate", "--prompt=", *SHORT)
    assert (code, out) == (2, "")
    assert errors(err) == [
        "the prompt is empty and the tokenizer has no token to start a document with"
    ]
    assert hints(err) == "give a prompt of at least one character"
    assert gpt("generate", "--prompt=a", *SHORT)[0] == 0


@pytest.mark.usefixtures("run")
def test_c17_prompt_too_long(gpt: Gpt) -> None:
    """C17: its last tokens are kept, with a warning that counts the dropped ones, and the whole
    prompt is shown; with --truncate error it is exit 2."""
    long = "0123456789" * 5
    flags = ("generate", "--model=r", "--no-stream", *SHORT)
    code, out, err = gpt(*flags, "--prompt", long)
    assert code == 0
    assert out.startswith(long)
    counts = "the prompt has 51 tokens, the model's block_size is 32"
    assert warnings(err) == f"{counts}: its first 19 tokens are dropped"
    kept = ",".join(str(ord(letter)) for letter in long[-32:])
    assert gpt(*flags, "--prompt-tokens", kept, "--no-prompt")[1] == out.removeprefix(long)
    code, out, err = gpt(*flags, "--prompt", long, "--truncate", "error")
    assert (code, out) == (2, "")
    assert errors(err) == [counts]
    assert "--truncate left" in hints(err)


@pytest.mark.usefixtures("run")
def test_c18_prompt_that_is_no_utf8(gpt: Gpt) -> None:
    """C18: the bad bytes of a prompt become U+FFFD, with a warning; the text goes on from them."""
    prompt = os.fsdecode(b"caf\xe9 \xff!")
    code, out, err = gpt("generate", "--model=r", "--prompt", prompt, *SHORT)
    assert code == 0, err
    assert out.startswith("caf\ufffd \ufffd!")
    assert "is not valid UTF-8; bad bytes replaced" in warnings(err)
    assert gpt("generate", "--model=r", "--prompt", "caf\ufffd \ufffd!", *SHORT)[1] == out


def test_c18_arguments_of_a_real_process() -> None:
    """C18: a file name that is no UTF-8 is shown with U+FFFD in the error, which has its code."""
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"gptcli", b"config", b"check", b"no\xff.yaml"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    err = done.stderr.decode("utf-8")
    assert done.returncode == 2
    assert warnings(err) == "argument 'no\ufffd.yaml' is not valid UTF-8; bad bytes replaced"
    assert errors(err) == ["no\ufffd.yaml: no such config file"]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a CPU alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
@pytest.mark.usefixtures("no_gpu", "run", "no_data")
def test_c19_a_device_that_is_not_there(device: str, gpt: Gpt, folder: Path) -> None:
    """C19: exit 6 with the devices that there are, before a text is read."""
    flag = f"--set=training.device={device}"
    for command in (
        ("pretrain", "tiny.yaml", flag, "--run-dir=new"),
        ("pretrain", "tiny.yaml", flag, "--dry-run"),
        ("generate", "--model=r", "--prompt=x", f"--device={device}"),
    ):
        code, out, err = gpt(*command)
        assert (code, out) == (6, "")
        assert errors(err) == [f"device {device} is not available here (there are: cpu)"]
    assert not (folder / "new").exists()


def test_c19_a_number_too_high(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """C19: of two GPUs, cuda:2 is exit 6, and both are named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    code, _, err = gpt("pretrain", "tiny.yaml", "--set=training.device=cuda:2")
    assert code == 6
    assert errors(err) == ["device cuda:2 is not available here (there are: cpu, cuda:0, cuda:1)"]


@pytest.mark.usefixtures("no_gpu", "run")
def test_c19_auto_never_fails(gpt: Gpt) -> None:
    """C19: auto takes what is there."""
    code, _, err = gpt("pretrain", "tiny.yaml", "--set=training.device=auto", "--run-dir=new")
    assert code == 0, err
    assert read_run_json(Path("new"))["machine"]["device"] == "cpu"
    assert gpt("generate", "--model=r", "--prompt=x", "--device=auto", *SHORT)[0] == 0


@pytest.mark.usefixtures("no_gpu")
def test_c19_a_precision_that_is_not_there(gpt: Gpt) -> None:
    """C19: fp16 on a CPU, and bf16 on a GPU without it, are exit 6 with what can be set."""
    code, _, err = gpt("pretrain", "tiny.yaml", "--set=training.precision=fp16")
    assert code == 6
    assert errors(err) == ["fp16 training needs a GPU; set training.precision to fp32 or bf16"]
    old = Device("cuda", 0, "Tesla T4", 1, bf16=False)
    with pytest.raises(ResourceError, match=r"Tesla T4 has no bf16; set training\.precision to"):
        choose_precision("bf16", old)
    assert choose_precision("auto", old) == "fp32"


def too_long(*_: Any) -> None:
    raise TimeoutError


@pytest.fixture(params=["pipe", "socket", "device"])
def special(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """A pipe, a socket, and a link to a device: a rename could take the link away, no more."""
    if request.param == "pipe":
        os.mkfifo("pipe")
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("socket")
    else:
        Path("device").symlink_to("/dev/null")
    before = os.lstat(request.param)
    with_handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)  # whoever opens the pipe waits for ever
    yield request.param
    signal.alarm(0)
    signal.signal(signal.SIGALRM, with_handler)
    after = os.lstat(request.param)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


OUTPUTS = {
    "pretrain": "pretrain tiny.yaml --run-dir OUT",
    "pretrain over what is there": "pretrain tiny.yaml --run-dir OUT --overwrite",
    "pretrain again": "pretrain tiny.yaml --run-dir OUT --auto-resume",
    "proof": "pretrain tiny.yaml --run-dir OUT --prove-resume",
    "finetune": "finetune tuned.yaml --model r --run-dir OUT",
    "eval": "eval --model r --data text.txt --max-tokens 9 --run-dir OUT",
    "compare": "runs compare r r --data text.txt --max-tokens 9 --run-dir OUT",
    "export to hf": "export --model r --to hf OUT",
    "export to gguf": "export --model r --to gguf OUT",
    "export to int8": "export --model r --to gpt --quantize int8 OUT",
    "import": "import folder OUT",
    "page of explain": "explain --model r --text hello --html OUT",
    "page of data check": "data check tiny.yaml --out OUT",
    "page of data show": "data show tiny.yaml --html OUT",
    "tokenizer": "tokenizer train text.txt --vocab-size 300 --out OUT",
    "config": "config copy small OUT",
}


@pytest.mark.parametrize("command", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.usefixtures("run")
def test_c20_output_to_a_special_file(command: str, special: str, gpt: Gpt, folder: Path) -> None:
    """C20: every command that writes to a path refuses a pipe, a socket and a device with exit 2,
    before the work, and leaves it what it is."""
    (folder / "tuned.yaml").write_text(
        "name: t\ndata: {train: rows.jsonl}\ntraining: {max_steps: 90}\n"
    )
    before = set(folder.rglob("*"))
    code, out, err = gpt(*command.replace("OUT", special).split())
    assert (code, out) == (2, ""), err
    assert special in errors(err)[0]
    assert set(folder.rglob("*")) == before


@pytest.mark.usefixtures("run")
def test_c20_special_files_in_a_directory(gpt: Gpt, folder: Path) -> None:
    """C20: a report is not put in the place of a pipe either that has its file's name."""
    (folder / "e").mkdir()
    os.mkfifo(folder / "e" / "report.json")
    flags = ("--data=text.txt", "--max-tokens=9", "--run-dir=e")
    for command in (("eval", "--model=r"), ("runs", "compare", "r", "r")):
        code, out, err = gpt(*command, *flags)
        assert (code, out) == (2, "")
        assert errors(err) == ["e/report.json is a pipe"]
    assert stat.S_ISFIFO(os.lstat(folder / "e" / "report.json").st_mode)
    assert [path.name for path in (folder / "e").iterdir()] == ["report.json"]
