"""`gpt` alone: the next commands that fit what is there, each of which is one."""

import json
import shlex
import sys
from pathlib import Path

import pytest

LINES = 11


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty runs root, named as a user names it, below the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_RUNS", "runs")
    return Path("runs")


def make_run(root: Path, name: str, hour: int, status: str, *, saved: bool = True, **about: str):
    path = root / name
    (path / "checkpoints").mkdir(parents=True)
    if saved:
        (path / "checkpoints" / "step-00000010").mkdir()
    created = f"2026-01-01T{hour:02}:00:00+00:00"
    about = {"name": "small", "status": status, "created": created, "job": "pretrain", **about}
    (path / "run.json").write_text(json.dumps(about))
    (path / "config.yaml").write_text("name: small\n")
    return path


def commands(out: str) -> list[list[str]]:
    """The command lines on the page, split as a shell splits them."""
    assert len(out.splitlines()) <= LINES, out
    found = [shlex.split(line[line.index("gpt ") :]) for line in out.splitlines()[2:]]
    assert [line[1] for line in found[-2:]] == ["--help", "doctor"]
    return found[:-2]


def test_without_runs_it_says_how_to_train_a_first_model(gpt, runs):
    """A list of sixteen commands leaves a newcomer where they were."""
    code, out, err = gpt()
    assert (code, err) == (0, "")
    assert commands(out)[0] == ["gpt", "pretrain", "small"]


def test_a_text_in_the_folder_is_what_to_train_on(gpt, runs):
    """The largest text, quoted as the shell needs it, and no list of packages."""
    Path("a tale.txt").write_text("Once upon a time. " * 200)
    Path("small.txt").write_text("Once upon a time. " * 150)
    Path("requirements.txt").write_text("torch\n" * 2000)
    assert commands(gpt()[1])[0] == ["gpt", "pretrain", "a tale.txt"]


def test_notes_are_no_text_to_train_on(gpt, runs):
    """Fifty bytes train no model: the line would end in an error."""
    Path("todo.txt").write_text("buy milk\n")
    assert commands(gpt()[1])[0] == ["gpt", "pretrain", "small"]


def test_a_finished_run_is_there_to_use(gpt, runs):
    """Generate, chat, eval and report, each with the run's own name and prompt."""
    make_run(runs, "old", 1, "finished")
    run = make_run(runs, "new run", 2, "finished")
    (run / "samples.jsonl").write_text(json.dumps({"prompt": "It's me", "text": "x"}) + "\n")
    assert commands(gpt()[1]) == [
        ["gpt", "generate", "--model", "runs/new run", "--prompt", "It's me"],
        ["gpt", "chat", "--model", "runs/new run"],
        ["gpt", "eval", "--model", "runs/new run"],
        ["gpt", "runs", "report", "runs/new run"],
    ]


@pytest.mark.parametrize("status", ["stopped", "running", "failed"])
def test_an_unfinished_run_is_continued(gpt, runs, status):
    """A run that says it is running but that no process works in was killed."""
    make_run(runs, "half", 1, status, job="finetune")
    code, out, err = gpt()
    assert (code, err) == (0, "")
    resume = "gpt finetune runs/half/config.yaml --run-dir runs/half --resume"
    assert commands(out)[0] == resume.split()
    assert (status == "running") == ("was killed" in out)
    assert commands(out)[1][:4] == ["gpt", "generate", "--model", "runs/half"]


def test_a_run_that_saved_nothing_is_tried_again_and_an_older_one_used(gpt, runs):
    """--resume of a run without a checkpoint ends with an error."""
    make_run(runs, "good", 1, "finished")
    make_run(runs, "bad", 2, "failed", saved=False, error="no such file: x\nmore")
    out = gpt()[1]
    assert "no such file: x." in out
    assert "more" not in out
    found = commands(out)
    assert found[0] == ["gpt", "pretrain", "runs/bad/config.yaml"]
    assert found[1][:4] == ["gpt", "generate", "--model", "runs/good"]


def test_a_run_at_work_is_followed(gpt, runs):
    """Resuming a run that another process trains would be refused."""
    from gptcli.runs.run_dir import RunLock

    with RunLock(make_run(runs, "live", 1, "running", saved=False)):
        found = commands(gpt()[1])
    assert found[:2] == [["gpt", "runs", "tail", "runs/live"], ["gpt", "runs", "stop", "runs/live"]]


@pytest.mark.parametrize("damage", ["{", "[]", '{"status": 3, "created": 4, "job": []}'])
def test_damaged_runs_are_no_reason_to_fail(gpt, runs, damage):
    """The first thing typed after a crash."""
    run = make_run(runs, "odd", 1, "finished")
    (run / "run.json").write_text(damage)
    (run / "samples.jsonl").write_bytes(b"\xff\n[]\n")
    code, out, _ = gpt()
    assert code == 0
    assert commands(out)


def test_a_runs_root_that_is_a_file(gpt, runs):
    runs.write_text("")
    assert commands(gpt()[1])[0] == ["gpt", "pretrain", "small"]


def test_it_loads_neither_torch_nor_the_schema(shell):
    """The first command that anybody types takes a tenth of a second, not two."""
    script = (
        "import sys; from gptcli.cli.main import main; code = main([]);"
        "heavy = ('torch', 'gptcli.config.schema', 'yaml', 'rich');"
        "print(code, [name for name in heavy if name in sys.modules])"
    )
    done = shell(f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}")
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
