import json
import threading
import time
from pathlib import Path

import pytest

CONFIG = """\
name: tiny
tokenizer: {kind: bytes}
data: {train: text.txt, val_fraction: 0.1}
model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 32}
training: {max_steps: 4, tokens_per_step: 64, log_every: 1, eval_every: 100, save_every: 100,
           micro_batch_size: 2, precision: fp32, compile: off, device: cpu}
schedule: {warmup_steps: 1}
samples: {n: 1, max_new_tokens: 4}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with a config and its text. Reports, whose plots take a second, are left out."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("One day a cat sat on a mat, and then it ran.\n" * 200)
    monkeypatch.chdir(tmp_path)
    for job in ("pretrain", "finetune"):
        monkeypatch.setattr(f"gptcli.{job}.write_report", lambda run_dir: None)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch):
    """Runs write their reports after all."""
    from gptcli.reports.report import write_report

    for job in ("pretrain", "finetune"):
        monkeypatch.setattr(f"gptcli.{job}.write_report", write_report)


@pytest.mark.usefixtures("reports")
def test_a_run_from_start_to_text(gpt, tmp_path):
    """Results on stdout, the rest on stderr; what is printed exists; `generate` finds the run."""
    code, out, err = gpt("pretrain", "tiny.yaml")
    assert code == 0, err
    run_dir, report = out.splitlines()
    assert Path(run_dir).parent == tmp_path / "runs"
    assert Path(report).is_file()
    assert err.splitlines()[-1].startswith("finished at step 4: validation ")
    assert "\x1b" not in err
    code, out, _ = gpt("runs", "list")
    name, status, _, _, step, *_ = out.splitlines()[1].split()
    assert (name, status, step) == (Path(run_dir).name, "finished", "4")
    code, out, _ = gpt("generate", "--prompt", "One", "--max-new-tokens", "3")
    assert code == 0
    assert out.startswith("One")
    assert gpt("pretrain", f"{run_dir}/config.yaml", "--dry-run")[0] == 0


def test_quiet_says_nothing_when_all_is_well(gpt):
    code, out, err = gpt("pretrain", "tiny.yaml", "--quiet")
    assert code == 0
    assert len(out.splitlines()) == 2
    assert err == ""


def test_dry_run_writes_nothing(gpt, tmp_path):
    code, out, err = gpt("pretrain", "tiny.yaml", "--dry-run")
    assert (code, err) == (0, "reading text.txt\n")
    assert "parameters" in out
    assert not (tmp_path / "runs").exists()


def test_max_time_wins_over_the_file(gpt, tmp_path):
    """The flag of the command line must not lose to, or clash with, a key that is set."""
    flags = ("--set", "training.max_time=9h", "--max-time", "1h", "--run-dir", "r")
    assert gpt("pretrain", "tiny.yaml", *flags)[0] == 0
    assert "max_time: 1h" in (tmp_path / "r" / "config.yaml").read_text()


def test_bad_max_time(gpt):
    code, _, err = gpt("pretrain", "tiny.yaml", "--max-time", "soon")
    assert code == 2
    assert "max_time" in err


def test_missing_text(gpt):
    code, _, err = gpt("pretrain", "tiny.yaml", "--set", "data.train=nowhere.txt")
    assert code == 3
    assert "nowhere.txt" in err


def test_runs_stop(gpt, forked, tmp_path):
    """Bug: gpt runs stop ends another process, or returns before the run has saved."""
    flags = ["--run-dir", "runs/r", "--set", "training.max_steps=1000000"]
    child = forked(["pretrain", "tiny.yaml", *flags])
    metrics = tmp_path / "runs" / "r" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        time.sleep(0.02)
    waiting = threading.Thread(target=child.wait)  # else the ended child still counts as alive
    waiting.start()
    code, out, err = gpt("runs", "stop", "r")
    waiting.join()
    assert code == 0, err
    assert f"stopped, process {child.process} on " in out
    assert "the newest checkpoint is step-" in out


def test_eval_of_the_newest_run(gpt, tmp_path):
    """The table, the JSON and the file are the same scores, and `runs/` keeps the report."""
    assert gpt("pretrain", "tiny.yaml", "--run-dir", "runs/r")[0] == 0
    code, out, err = gpt("eval", "--data", "text.txt", "--max-tokens", "500")
    assert code == 0, err
    table = dict(line.split(None, 1) for line in out.split("\n\n")[0].splitlines())
    code, out, err = gpt("eval", "--data", "text.txt", "--max-tokens", "500", "--json")
    assert code == 0, err
    scores = json.loads(out)["scores"]
    assert table["bits_per_byte"] == f"{scores['bits_per_byte']:.4f}"
    assert table["tokens"] == str(scores["tokens"])
    (report,) = tmp_path.glob("runs/r/evals/*/report.json")
    assert json.loads(report.read_text())["scores"]["loss"] == scores["loss"]
    assert err.splitlines()[-1] == f"report: {report.parent}"


def test_eval_section_and_flags(gpt, tmp_path):
    """Flags win over the section, and both reach the scorer."""
    assert gpt("pretrain", "tiny.yaml", "--run-dir", "runs/r")[0] == 0
    (tmp_path / "e.yaml").write_text("eval: {data: text.txt, stride: 8, max_tokens: 300}\n")
    code, out, _ = gpt("eval", "e.yaml", "--stride", "16", "--json", "--run-dir", "here")
    assert code == 0
    scores = json.loads(out)["scores"]
    assert (scores["stride"], scores["tokens"]) == (16, 300)
    assert (tmp_path / "here" / "report.json").is_file()


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (("--stride", "0"), 2, "--stride: "),
        (("--max-tokens", "-1"), 2, "--max-tokens: "),
        (("missing.yaml",), 2, "missing.yaml"),
        (("--model", "nowhere"), 4, "nowhere"),
        ((), 4, "no run"),
    ],
)
def test_eval_errors(gpt, flags, code, named):
    found, out, err = gpt("eval", *flags)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert named in err


def test_finetune(gpt, tmp_path):
    """Rows on top of a run: the scores before and after are a result, so they go to stdout."""
    assert gpt("pretrain", "tiny.yaml", "--run-dir", "runs/r")[0] == 0
    rows = [{"prompt": f"q{i % 7}", "response": "abc"[i % 3]} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CONFIG.replace("name: tiny\ntokenizer: {kind: bytes}", "name: tuned")
    config = config.replace("text.txt, val_fraction: 0.1", "rows.jsonl, val_fraction: 0.2")
    lines = [line for line in config.splitlines() if not line.startswith("model:")]
    (tmp_path / "f.yaml").write_text("\n".join(lines) + "\n")
    flags = ("--model", "runs/r", "--run-dir", "runs/f", "--set", "training.tokens_per_step=256")
    code, out, err = gpt("finetune", "f.yaml", *flags)
    assert code == 0, err
    run_dir, report, header, *tasks = out.splitlines()
    assert (run_dir, report) == ("runs/f", "runs/f/report.html")
    assert header.split() == ["TASK", "BEFORE", "AFTER", "ROWS"]
    assert tasks[0].split()[0] == "exact_match"


def test_finetune_needs_a_model(gpt):
    code, out, err = gpt("finetune", "tiny.yaml")
    assert (code, out) == (2, "")
    assert "hint: " in err
    assert "--model" in err
