"""`gpt runs verify`: what is whole, what a resume mends, what is lost."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from gptcli.runs import checkpoint
from gptcli.runs.manifest import sealed
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import RunLock, read_run_json, update_run_json
from gptcli.verify import verify_run

Gpt = Callable[..., tuple[int, str, str]]

CONFIG = """\
name: tiny
tokenizer: {kind: bytes}
data: {train: text.txt}
model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 32}
training: {max_steps: 9, tokens_per_step: 64, log_every: 3, eval_every: 4, save_every: 4,
           micro_batch_size: 2, precision: fp32, compile: off, device: cpu}
schedule: {warmup_steps: 1}
samples: {n: 1, max_new_tokens: 4}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    from gptcli.cli.main import main

    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(CONFIG.replace("text.txt", str(folder / "text.txt")))
    (folder / "text.txt").write_text("".join(f"day {i} was as day {i * i}.\n" for i in range(300)))
    assert main(["pretrain", str(folder / "tiny.yaml"), "--run-dir", str(folder / "r")]) == 0
    return folder / "r"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "r"))


def bad(run: Path) -> dict[str, str]:
    return {one.what: one.text for one in verify_run(run) if one.verdict == "bad"}


def notes(run: Path) -> dict[str, str]:
    return {one.what: one.text for one in verify_run(run) if one.verdict == "note"}


def newest(run: Path) -> Path:
    return checkpoint.list_checkpoints(run)[-1]


def test_a_whole_run(run: Path, gpt: Gpt) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, _ = gpt("runs", "verify", str(run))
    assert code == 0
    lines = out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    names = [line.split()[1].removeprefix(f"{run}/").rstrip(":") for line in lines]
    saved = [f"checkpoints/{path.name}" for path in checkpoint.list_checkpoints(run)]
    logs = ["checkpoints/best.json", "metrics.jsonl", "samples.jsonl"]
    assert names == ["run.json", "config.yaml", *saved, *logs]
    assert "9 lines" not in lines[-2]
    assert "steps up to 9 without a gap" in lines[-2]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit(name: str, run: Path, gpt: Gpt) -> None:
    path = newest(run) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert name in bad(run)[f"checkpoints/{newest(run).name}"]
    code, out, err = gpt("runs", "verify", str(run), "--json")
    assert code == 4
    line, best = [json.loads(text) for text in out.splitlines() if '"bad"' in text]
    assert line["run"] == str(run)
    assert line["text"].startswith(name) or "sha256" in line["text"]
    assert best["text"] == "it names step 9, whose checkpoint is bad"
    assert "error: 2 of" in err


def test_hashes_that_agree_are_not_enough(run: Path) -> None:
    """A manifest that was made anew over other weights agrees with them; they do not fit."""
    victim, manifest = newest(run), json.loads((newest(run) / "manifest.json").read_text())
    other = checkpoint.list_checkpoints(run)[0]
    (victim / "model.safetensors").write_bytes((victim / "optimizer.safetensors").read_bytes())
    entry = json.loads((other / "manifest.json").read_text())["files"]["optimizer.safetensors"]
    assert entry["sha256"] != manifest["files"]["optimizer.safetensors"]["sha256"]
    manifest["files"]["model.safetensors"] = manifest["files"]["optimizer.safetensors"]
    (victim / "manifest.json").write_text(json.dumps(sealed(manifest)))
    assert "wte.weight" in bad(run)[f"checkpoints/{victim.name}"]


def test_the_log(run: Path) -> None:
    """Lines that are missing, doubled or cut are told apart."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    steps = [i for i, line in enumerate(lines) if '"train"' in line]
    path.write_text("".join(lines[: steps[1]] + lines[steps[1] + 1 :]))
    assert bad(run) == {"metrics.jsonl": "lines are missing: steps 4 to 8"}
    path.write_text("".join([*lines, lines[steps[1]]]))
    assert bad(run) == {"metrics.jsonl": "steps come twice or fall: 6 behind 9"}
    path.write_text("".join(lines[: steps[1]]))
    assert bad(run) == {"metrics.jsonl": "ends at step 3, before checkpoint 9"}
    path.write_text("".join(lines) + '{"event": "tr')
    assert bad(run) == {}
    assert notes(run)["metrics.jsonl"].endswith("1 cut lines")


def test_the_rest(run: Path) -> None:
    """A best checkpoint that is gone, a config and a run.json that are none, leftovers."""
    (run / "checkpoints" / "best.json").write_text('{"step": 77, "loss": 1.0}')
    (run / "config.yaml").write_text("model: {n_lyer: 3}")
    (run / "run.json").write_text("{")
    (run / "checkpoints" / ".tmp-step-00000012-1").mkdir()
    found = bad(run)
    assert set(found) == {"checkpoints/best.json", "config.yaml", "run.json"}
    assert "step 77" in found["checkpoints/best.json"]
    assert "n_lyer" in found["config.yaml"]
    assert set(notes(run)) == {"checkpoints/.tmp-step-00000012-1"}


def test_a_run_that_is_going_on(run: Path) -> None:
    """What it deletes while its checkpoints are looked at is not lost; what is gone of a run that
    nobody works in is."""
    first, second = checkpoint.list_checkpoints(run)[:2]
    for lock, verdict in ((RunLock(run), "note"), (nullcontext(), "bad")):
        with lock:
            found = {}
            for one in verify_run(run):
                found[one.what] = one
                if one.what == f"checkpoints/{first.name}":
                    second.rename(second.with_name("aside"))
        assert found[f"checkpoints/{second.name}"].verdict == verdict
        assert ("." in found) == (verdict == "note")
        second.with_name("aside").rename(second)


def edited_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if keep(json.loads(line))))


def test_lost_evaluations(run: Path) -> None:
    """Of the first step, of one that was due, of the last; a line for each is expected whatever
    the checkpoints know."""
    whole = (run / "metrics.jsonl").read_text()
    for step in (0, 4, 8, 9):
        edited_lines(
            run / "metrics.jsonl", lambda r, step=step: (r["event"], r["step"]) != ("eval", step)
        )
        assert bad(run)["metrics.jsonl"] == f"evaluations are missing: steps {step}"
        (run / "metrics.jsonl").write_text(whole)
    assert bad(run) == {}
    history = read_run_json(run)["history"]  # as of a run with max_time, which leaves some out
    update_run_json(run, history=[{**history[0], "eval_every": None}, *history[1:]])
    edited_lines(run / "metrics.jsonl", lambda r: (r["event"], r["step"]) != ("eval", 0))
    assert bad(run)["metrics.jsonl"] == "evaluations are missing: steps 0"


def test_lost_texts(run: Path) -> None:
    for step in (0, 8, 9):
        whole = (run / "samples.jsonl").read_text()
        edited_lines(run / "samples.jsonl", lambda r, step=step: r["step"] != step)
        assert bad(run) == {"samples.jsonl": f"texts are missing: step {step} has 0 of 1"}
        (run / "samples.jsonl").write_text(whole)


def test_a_best_that_is_not_the_best(run: Path) -> None:
    """A loss that was never measured, a step whose loss is higher, a checkpoint that is damaged, no
    best.json at all."""
    path = run / "checkpoints" / "best.json"
    best = json.loads(path.read_text())
    path.write_text(json.dumps({**best, "loss": 0.5}))
    assert bad(run) == {
        "checkpoints/best.json": (
            f"it says loss 0.5 at step {best['step']}, metrics.jsonl says {best['loss']:.6g}"
        )
    }
    evals = [r for r in read_metrics(run) if r["event"] == "eval"]
    worse = max(evals, key=lambda r: r["loss"])
    path.write_text(json.dumps({"step": worse["step"], "loss": worse["loss"]}))
    told = f"it names step {worse['step']}, but step {best['step']} is better"
    if checkpoint.checkpoint_dir(run, worse["step"]).is_dir():
        assert bad(run) == {"checkpoints/best.json": told}
        update_run_json(run, status="running")
        assert notes(run)["checkpoints/best.json"] == told  # a kill came between the two
        update_run_json(run, status="finished")
    path.unlink()
    assert bad(run)["checkpoints/best.json"].startswith("missing")
    path.write_text(json.dumps(best))
    (checkpoint.checkpoint_dir(run, best["step"]) / "state.json").write_text("{}")
    told = bad(run)["checkpoints/best.json"]
    assert told == f"it names step {best['step']}, whose checkpoint is bad"


def test_a_checkpoint_that_was_set_aside(run: Path) -> None:
    newest(run).rename(newest(run).with_name("replaced-step-00000012"))
    told = notes(run)["checkpoints/replaced-step-00000012"]
    assert told == "set aside when the run went back; gpt runs prune removes it"


def test_each_path_is_told_once(run: Path, gpt: Gpt) -> None:
    """A line begins with the path; what follows it does not say it again."""
    (newest(run) / "optimizer.safetensors").unlink()
    told = "hint: to go on from the newest checkpoint that is whole:"
    code, out, err = gpt("runs", "verify", str(run))
    assert f"{told} gpt pretrain {run}/config.yaml --run-dir {run} --resume\n" in err
    (run / "config.yaml").write_text("model: {n_lyer: 3}")
    (run / "run.json").write_text("{")
    code, out, err = gpt("runs", "verify", str(run))
    assert code == 4
    lines = [line for line in out.splitlines() if line.startswith("bad")]
    assert len(lines) == 4
    assert all(line.count(str(run)) == 1 for line in lines)
    assert f"{newest(run)}: optimizer.safetensors is missing" in out
    older = checkpoint.list_checkpoints(run)[-2]
    assert f": cp {older}/config.yaml {run}/config.yaml\n" in err
    shutil.copy(older / "config.yaml", run / "config.yaml")
    assert "config.yaml" not in bad(run)


def test_a_resume_that_logs_at_other_steps(made: Path, run: Path, gpt: Gpt) -> None:
    """Lines, evaluations and texts are expected as often as the config of their own time says,
    though no checkpoint of that time is left."""
    more = ("log_every=2", "eval_every=5", "save_every=1", "max_steps=16")
    flags = [*(f"--set=training.{key}" for key in more), "--set=samples.n=2"]
    command = ("pretrain", str(made.parent / "tiny.yaml"), "--run-dir", str(run), "--resume")
    code, _, err = gpt(*command, *flags)
    assert code == 0, err
    assert bad(run) == {}
    assert made.joinpath("checkpoints", "step-00000004").is_dir()
    assert not (run / "checkpoints" / "step-00000004").exists()
    history = read_run_json(run)["history"]
    assert [entry.get("log_every") for entry in history] == [3, None, 2, None]
    whole = (run / "metrics.jsonl").read_text()
    for event, lost, told in (
        ("train", 12, "lines are missing: steps 11 to 13"),
        ("train", 3, "lines are missing: steps 1 to 3"),
        ("eval", 10, "evaluations are missing: steps 10"),
    ):
        edited_lines(
            run / "metrics.jsonl", lambda r, at=(event, lost): (r["event"], r["step"]) != at
        )
        assert bad(run)["metrics.jsonl"] == told
        (run / "metrics.jsonl").write_text(whole)
    lines = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    (run / "samples.jsonl").write_text("".join(lines[:-1]))
    assert bad(run) == {"samples.jsonl": "texts are missing: step 16 has 1 of 2"}


def test_a_run_of_an_early_version(run: Path) -> None:
    """Whose history does not say how often it logged: the configs of its checkpoints do."""
    history = read_run_json(run)["history"]
    plain = [{k: v for k, v in entry.items() if k != "log_every"} for entry in history]
    update_run_json(run, history=plain)
    assert bad(run) == {}
    edited_lines(run / "metrics.jsonl", lambda r: (r["event"], r["step"]) != ("train", 6))
    assert bad(run) == {"metrics.jsonl": "lines are missing: steps 4 to 8"}


def test_a_run_without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert bad(run) == {"checkpoints": "there is no checkpoint"}


def test_steps_that_are_no_numbers(run: Path) -> None:
    """Bug: a line of a log whose step is an object ended the command with a traceback."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run / name, "a", encoding="utf-8") as file:
            file.write('{"event": "eval", "step": {}, "loss": 0.1}\n')
    assert all(finding.text for finding in verify_run(run))
