"""What nobody gets in by, beside the faults (tests/faults) and the house rules (test_layers.py)."""

import ast
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

Gpt = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "gptcli").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
CONFIG = """\
tokenizer: {kind: bytes}
data: {train: text.txt}
model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 32}
training: {max_steps: 2, tokens_per_step: 64, log_every: 1, eval_every: 100, save_every: 100,
           micro_batch_size: 2, precision: fp32, compile: off, device: cpu}
schedule: {warmup_steps: 1}
samples: {n: 1, max_new_tokens: 4}
"""
# Ways for a file to bring code with it.
UNSAFE = [
    r"\bpickle\b(?!able)",
    r"Unpickler",
    r"\bdill\b",
    r"\bcloudpickle\b",
    r"\bjoblib\b",
    r"\bmarshal\b",
    r"\bshelve\b",
    r"allow_pickle\s*=\s*True",
    r"weights_only\s*=\s*False",
    r"trust_remote_code",
    r"\bload_dataset\(",
    r"yaml\.(full_|unsafe_)?load\(",
    r"shell\s*=\s*True",
    r"os\.(system|popen)\(",
    r"\b__import__\(",
    r"torch\.hub",
]
ALLOWED = {
    "gptcli/interop/hf_pickle.py": {r"\bpickle\b(?!able)"},  # the one reader, of tensors alone
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("".join(f"day {i} is {i * i}.\n" for i in range(300)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)  # a second of plots
    return tmp_path


def code_of(path: Path) -> str:
    """A source without its comments, docstrings and other text for people."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_loads_code(path: Path) -> None:
    """Reading a checkpoint, a config or data never runs what is in it: no pickle, no remote code,
    no shell. Datasets' own loader, whose arguments can do more than read, is not called at all."""
    code, allowed = code_of(path), ALLOWED.get(str(path.relative_to(ROOT)), set())
    found = [pattern for pattern in UNSAFE if re.search(pattern, code) and pattern not in allowed]
    assert not found


def test_the_search_finds() -> None:
    """The search above would see each of them."""
    for line in (
        "import pickle",
        "from joblib import load",
        "np.load(f, allow_pickle=True)",
        "torch.load(f, weights_only=False)",
        "datasets.load_dataset(**options)",
        "yaml.load(f)",
        "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ):
        assert any(re.search(pattern, line) for pattern in UNSAFE), line


@pytest.mark.parametrize(
    "name", ["../out", "/tmp/out", "a/b", "..", ".hidden", "-rf", "a\nb", "x" * 101, "", "a\x1b[2J"]
)
def test_a_name_stays_in_the_runs_root(name: str, gpt: Gpt, folder: Path) -> None:
    """The name in a config from elsewhere cannot choose where files are made."""
    before = sorted(folder.parent.rglob("*"))
    code, _, err = gpt("pretrain", "tiny.yaml", f"--set=name={json.dumps(name)}")
    assert code == 2
    assert "name" in err
    assert "\x1b" not in err
    assert sorted(folder.parent.rglob("*")) == before


def test_options_of_a_source_are_listed_ones(gpt: Gpt, folder: Path) -> None:
    """What a config says of a source is never handed on to a library as it stands."""
    for option in ("trust_remote_code", "data_files", "storage_options", "token", "builder_script"):
        source = json.dumps([{"path": "text.txt", option: True}])
        code, _, err = gpt("pretrain", "tiny.yaml", f"--set=data.train={source}", "--dry-run")
        assert code == 2
        assert option in err


def test_secrets_of_the_environment_are_nowhere_in_a_run(
    gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and the environment are written to no file, whatever becomes of the run."""
    secrets = {
        "HF_TOKEN": "hf_QWxhZGRpbjpvcGVuIHNlc2FtZQ",
        "OPENAI_API_KEY": "sk-3f9d2b7e1c",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
        "SOMETHING_PRIVATE": "the-value-of-it",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert gpt("pretrain", "tiny.yaml", "--run-dir", "r")[0] == 0
    (folder / "text.txt").unlink()
    more = ("--resume", "--set=training.max_steps=4")
    assert gpt("pretrain", "tiny.yaml", "--run-dir", "r", *more)[0] == 3
    files = [path for path in (folder / "r").rglob("*") if path.is_file()]
    assert {"run.json", "log.txt", "config.yaml"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for name, value in secrets.items():
            assert value.encode() not in content, f"{name} is in {path}"


def test_files_get_the_permissions_that_the_user_asked_for(gpt: Gpt, folder: Path) -> None:
    """With umask 077 nobody else reads a run, a checkpoint or a log."""
    before = os.umask(0o077)
    try:
        assert gpt("pretrain", "tiny.yaml", "--run-dir", "r")[0] == 0
    finally:
        os.umask(before)
    for path in (folder / "r", *(folder / "r").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_run_directory_full_of_links(gpt: Gpt, folder: Path) -> None:
    """Links in a run that somebody else made are neither followed to write nor deleted through."""
    assert gpt("pretrain", "tiny.yaml", "--run-dir", "r")[0] == 0
    outside = folder / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    checkpoints = folder / "r" / "checkpoints"
    (checkpoints / "step-00000000").symlink_to(outside)
    (checkpoints / ".tmp-step-00000009-1").symlink_to(outside)
    (checkpoints / ".del-step-00000009-1").symlink_to(outside)
    (folder / "r" / ".tmp-run.json-1").symlink_to(outside / "precious")
    flags = ("--run-dir", "r", "--resume", "--set=training.max_steps=4")
    assert gpt("pretrain", "tiny.yaml", *flags)[0] == 0
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "kept"
    (outside / "precious").write_text('{"kept": true}\n')  # a whole line, which is not cut off
    for name in (".lock", "metrics.jsonl", "samples.jsonl", "log.txt"):
        more = ("--run-dir", "r", "--resume", "--set=training.max_steps=6")
        (folder / "r" / name).rename(folder / "aside")
        (folder / "r" / name).symlink_to(outside / "precious")
        code, _, err = gpt("pretrain", "tiny.yaml", *more)
        assert (code, "link" in err) == (6, True), (name, err)
        assert (outside / "precious").read_text() == '{"kept": true}\n'
        (folder / "aside").rename(folder / "r" / name)
