"""Every shell line of README.md and docs/*.md runs here, at a small size, or is listed with the
reason in doc_lines.py; then its command, flags and keys must be there all the same."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import doc_lines
import pytest
import torch
from doc_lines import MEANT, NOT_RUN, ROOT, SLOW_LINES, Line
from forked import Forked
from serving import Server, make_model, serving

from gptcli.cli.display import Display
from gptcli.cli.invocation import Invocation
from gptcli.cli.main import _command
from gptcli.config.fields import wanted_at
from gptcli.config.load import load_config
from gptcli.config.shipped import shipped_config
from gptcli.data.unicode_scripts import language_of

LINES = doc_lines.lines()
GPT = [line for line in LINES if line.gpt]
SERVE = [line for line in GPT if line.text.startswith("gpt serve") and not line.reason]
RUN = [line for line in GPT if not line.reason and line not in SERVE]
CURL = [line for line in LINES if line.text.startswith("curl ")]
SLOW = [line for line in RUN if line.slow]
LISTED = [line for line in LINES if line.reason]
# What a fork of this process then need not load again; some come with extras.
LOADED = [
    *(f"gptcli.{job}" for job in ("pretrain", "finetune", "generate", "evaluate", "chat")),
    *("gptcli.evaluate_task", "gptcli.export", "matplotlib.pyplot", "datasets"),
]
TINY = """\
name: my
data: {train: book.txt}
training: {max_steps: 2, tokens_per_step: 256, micro_batch_size: 1, precision: fp32, compile: off,
           device: cpu}
schedule: {warmup_steps: 1}
samples: {n: 1, max_new_tokens: 4}
"""
OWN = "tokenizer: {kind: bytes}\nmodel: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 256}\n"
ROWS = "data: {train: reviews.jsonl}\nfinetune: {task: classification}\n"
FILES = {
    "book.txt a.txt": "".join(f"On day {i} a cat sat on mat {i}.\n" for i in range(90)),
    "questions.txt": "What is a cat?\nWhere is the mat?\n",
    "b.jsonl": '{"text": "A cat sat on the mat."}\n' * 4,
    "prompts.jsonl": '{"prompt": "To be", "max_new_tokens": 8}\n{"prompt": "A cat"}\n',
    "pairs.jsonl": '{"a": "A cat sat.", "b": "A dog sat.", "group": "animals"}\n' * 4,
    "reviews.jsonl new.jsonl": "".join(
        f'{{"text": "Film {i} was {word}.", "label": "{word}"}}\n'
        for i in range(20)
        for word in ("good", "bad")
    ),
    "rows.jsonl": "".join(
        f'{{"instruction": "Count to {i}.", "input": "", "output": "{i}"}}\n' for i in range(40)
    ),
    "hellaswag.jsonl endings.jsonl": "".join(
        f'{{"prompt": "Cat {i} sat", "choices": [" down.", " blue."], "label": 0}}\n'
        for i in range(40)
    ),
    "said.md": "Hello\n/help\n",
    "my.yaml": TINY,
    "tiny.yaml": TINY + OWN,
    "rows.yaml": ROWS,
}


def name_of(line: Line) -> str:
    return f"{line.page}: {line.text}"


def run(*words: str, before=None) -> str:
    """What `gpt` says; it must succeed."""
    code, said = Forked(list(words), stdout=Path("said.txt"), before=before).wait()
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the pages speak of: texts, rows, two runs, finetuned ones, a published
    model. Reports, whose plots take a second, are left out."""
    folder = tmp_path_factory.mktemp("reader")
    torch.set_num_threads(1)
    for module in LOADED:
        importlib.import_module(module)
    language_of("A cat sat on the mat.")  # reads its tables
    for names, text in FILES.items():
        for name in names.split():
            (folder / name).write_text(text)
    (folder / "said.txt").touch()
    for part in ("configs", "scripts"):
        shutil.copytree(ROOT / part, folder / part, ignore=lambda *_: ["__pycache__"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GPT_RUNS", str(folder / "runs"))
        for job in ("pretrain", "finetune"):
            patch.setattr(f"gptcli.{job}.write_report", lambda run_dir: None)
        run("pretrain", "tiny.yaml", "--run-dir", "runs/A", "--set", "seed=1")
        run("export", "--model", "runs/A", "--to", "hf", "gpt2")
        for name, config, rows in (
            ("task", "sentiment-en", "reviews"),
            ("lora", "instructions", "rows"),
        ):
            words = ["finetune", config, "--model", "runs/A", "--run-dir", f"tuned/{name}"]
            run(*doc_lines.small([*words, "--set", f"data.train={rows}.jsonl"]))
        run("pretrain", "tiny.yaml", "--run-dir", "runs/B")
        yield folder


def reads(path: str, runs: str):
    def before() -> None:
        os.environ["GPT_RUNS"] = runs
        os.dup2(os.open(path, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0, closefd=False)

    return before


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=[pytest.mark.slow] * line.slow) for line in RUN],
    ids=name_of,
)
def test_a_line_of_gpt(line: Line, place: Path) -> None:
    """Guards that what a page tells the reader to type works, and ends well."""
    number = RUN.index(line)
    here = line.here(f"new-{number}")
    source = line.stdin or os.devnull
    commands = doc_lines.words_of(here)
    assert commands, "no command of gpt in it"
    for words in commands:
        trains = words[:1] in (["pretrain"], ["finetune"]) and "--dry-run" not in words
        runs = f"trained-{number}" if trains else "runs"
        run(*doc_lines.small(words), before=reads(source, runs))
        assert not trains or len(list(Path(runs).glob("*/checkpoints/step-*"))) > 0


@pytest.mark.parametrize("line", SERVE, ids=name_of)
def test_a_line_that_serves(line: Line, place: Path) -> None:
    """Guards the lines that start a server: it answers, for the run that is there."""
    pytest.importorskip("uvicorn")
    (words,) = doc_lines.words_of(re.sub(r" --port \d+", "", line.here("new")))
    server = Server(words[1:])
    try:
        assert server.health()["status"] == "ok"
    finally:
        code, said = server.end()
    assert code in (0, 143), said


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("uvicorn")
    with serving("--model", str(make_model(tmp_path_factory.mktemp("serve") / "model"))) as found:
        yield found


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("line", CURL, ids=name_of)
def test_a_line_of_curl(line: Line, server: Server) -> None:
    """Guards the requests that a page shows: the server takes them."""
    text = line.text.replace(":8000", f":{server.port}").replace("curl ", "curl -sS --fail ", 1)
    given = {"text": True, "capture_output": True, "timeout": 60}
    done = subprocess.run(["bash", "-c", text], env=doc_lines.environment(), **given)
    assert done.returncode == 0, done.stderr
    assert re.search(r'"(text|delta|data|status)"', done.stdout), done.stdout


@pytest.mark.parametrize("line", [*LISTED, *SLOW], ids=name_of)
def test_a_listed_line_is_well_formed(line: Line) -> None:
    """Guards what this suite does not run against flags, configs, keys, scripts that are gone."""
    for path in re.findall(r"\bscripts/[\w./-]+|\bconfigs/[\w./-]+", line.text):
        assert (ROOT / path).is_file(), path
    for extra in re.findall(r"gptcli\[([\w,]+)\]", line.text):
        project = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{name} = \[", project, re.M) for name in extra.split(","))
    command = doc_lines.stands_for(line.text)
    for words in doc_lines.words_of(command) if command else []:
        parses(words)


def parses(words: list[str]) -> None:
    """The command takes these words; its config is there, and the keys of --set are in the schema.

    Typer's usage errors pass through."""
    command, rest = _command(words), list(words)
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, words
        command, name = command.commands[rest[0]], rest.pop(0)
    context = command.make_context(name, rest, obj=Invocation(words, Display()))
    for setting in context.params.get("overrides") or ():
        key, equals, _ = setting.partition("=")
        assert equals, setting
        assert wanted_at(key.split(".")) is not None, setting
    config = context.params.get("config") or ""
    if re.fullmatch(r"[a-z0-9-]+", config):
        assert shipped_config(config) is not None, config


@pytest.mark.parametrize(
    "wrong",
    [
        "pretrain small --no-such-flag",
        "pretrain small --set training.steps=3",
        "pretrain no-such-config",
        "train small",
    ],
)
def test_a_wrong_line_is_found(wrong: str) -> None:
    """Guards the check itself: a flag, key, config or command that is not there fails it."""
    with pytest.raises(Exception, match=r"(?i)no such option|assert|steps|config|train"):
        parses(wrong.split())


@pytest.mark.parametrize(("page", "text"), doc_lines.yamls())
def test_a_yaml_is_a_config(page: str, text: str, tmp_path: Path) -> None:
    """Guards the YAMLs of the pages: each is one that `gpt config check` takes."""
    path = tmp_path / "shown.yaml"
    path.write_text(text)
    load_config(str(path), [])


def test_every_line_is_run_or_listed() -> None:
    """Guards against a line that no test knows; and a list that speaks of lines that are gone."""
    known = {*RUN, *SERVE, *CURL, *LISTED}
    unknown = [name_of(line) for line in LINES if line not in known]
    assert unknown == [], "neither run nor in NOT_RUN of tests/doc_lines.py"
    texts = [line.text for line in LINES]
    for pattern in (*NOT_RUN, *SLOW_LINES, *MEANT):
        assert any(re.search(pattern, text) for text in texts), f"no line has {pattern!r}"
