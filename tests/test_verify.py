"""`gpt runs verify`: what is whole, what a resume mends, what is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.runs import checkpoint
from gptcli.runs.manifest import sealed
from gptcli.runs.run_dir import RunLock
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
    with RunLock(run):
        assert "in use by process" in notes(run)["."]


def test_a_run_without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert bad(run) == {"checkpoints": "there is no checkpoint"}
