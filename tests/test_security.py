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
DYNAMIC = {"getattr", "importlib.import_module"}
# Modules whose files bring code with them, and calls that run or load some.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MODULES |= {"jsonpickle", "torch.hub", "torch.package"}
NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pandas.read_pickle"}
NEVER |= {"yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"}
NEVER |= {"torch.jit.load", "torch.serialization.load", "datasets.load_dataset"}
# Calls that may be, if they say so: argument -> what its text must be.
CAREFUL = {
    "torch.load": ("weights_only", re.compile("True")),
    "yaml.load": ("Loader", re.compile(r"(yaml\.)?C?SafeLoader|_\w*Loader")),
    "yaml.load_all": ("Loader", re.compile(r"(yaml\.)?C?SafeLoader|_\w*Loader")),
}
SWITCHES = {"trust_remote_code", "shell"}  # arguments of any call: left out, or False


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("".join(f"day {i} is {i * i}.\n" for i in range(300)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)  # a second of plots
    return tmp_path


def imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it is, of all imports in a source."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
                names[f"import {alias.name}"] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {name: what.removeprefix("builtins.") for name, what in names.items()}


def called_as(node: ast.AST, names: dict[str, str]) -> str:
    """The whole name of a function or module, however it is called here; "" for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = called_as(node.value, names)
        return f"{owner}.{node.attr}".removeprefix("builtins.") if owner else ""
    if isinstance(node, ast.Call) and called_as(node.func, names) in DYNAMIC:
        parts = [ast.unparse(argument).strip("'\"") for argument in node.args[:2]]
        return ".".join(names.get(part, part) for part in parts)
    return ""


def is_careless(call: ast.Call, called: str) -> bool:
    """Whether a call's arguments let it, or may let it, run code that came with a file."""
    given = {key.arg: ast.unparse(key.value) for key in call.keywords}
    if called in CAREFUL:
        argument, wanted = CAREFUL[called]
        return wanted.fullmatch(given.get(argument, "")) is None
    if called == "numpy.load" and (
        len(call.args) > 2 or None in given or given.get("allow_pickle", "False") != "False"
    ):
        return True
    switched = any(given.get(switch, "False") != "False" for switch in SWITCHES)
    return switched or given.get("weights_only", "True") != "True"


def dangers(source: str) -> list[str]:
    """What of a source can run code that came with a file, whatever it is called there."""
    tree = ast.parse(source)
    names = imported(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [ast.unparse(c) for c in calls if is_careless(c, called_as(c.func, names))]
    functions = {id(call.func) for call in calls}  # judged by their arguments
    mentioned = list(names.values())
    for node in ast.walk(tree):
        stored = isinstance(getattr(node, "ctx", None), ast.Store)  # a field of that name
        what = "" if stored else called_as(node, names)
        if what in CAREFUL and id(node) not in functions:  # handed on: somebody else calls it
            found.append(what)
        mentioned.append(what)
    for what in mentioned:
        if what in NEVER or any(f"{what}.".startswith(f"{module}.") for module in MODULES):
            found.append(what)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_loads_code(path: Path) -> None:
    """Reading a checkpoint, a config or data never runs what is in it: no pickle, no remote code,
    no shell. Datasets' own loader, whose arguments can do more than read, is not called at all."""
    assert dangers(path.read_text(encoding="utf-8")) == []


MUTATIONS = """
import pickle
import pickle as p
from pickle import loads
import _pickle
from joblib import load
import dill
import cloudpickle as cp
import shelve
from marshal import loads as safe
import torch; torch.load(f)
import torch; torch.load(f, weights_only=False)
import torch; torch.load(f, weights_only=flag)
import torch; torch.load(f, **options)
import torch as t; t.load(f)
from torch import load; load(f)
from torch import load as read; read(f)
from torch import serialization; serialization.load(f)
import torch; read = torch.load
import torch; map(torch.load, files)
import torch; getattr(torch, 'load')(f)
import torch; torch.jit.load(f)
import torch; torch.hub.load('a/b', 'c')
from torch import hub
import numpy as np; np.load(f, allow_pickle=True)
import numpy; numpy.load(f, None, True)
from numpy import load; load(f, allow_pickle=flag)
import numpy as np; np.load(f, **options)
import yaml; yaml.load(f)
import yaml; yaml.load(f, Loader=yaml.Loader)
import yaml; yaml.load(f, Loader=yaml.UnsafeLoader)
import yaml as y; y.load_all(f, Loader=y.FullLoader)
from yaml import load as parse; parse(f)
from yaml import unsafe_load
import yaml; yaml.full_load(f)
eval(text)
exec(text)
import builtins; builtins.eval(text)
from builtins import exec as run; run(text)
__import__(name)
compile(text, 'a', 'exec')
from importlib import import_module; import_module('pickle').loads(b)
AutoModel.from_pretrained(x, trust_remote_code=True)
AutoModel.from_pretrained(x, trust_remote_code=flag)
import datasets; datasets.load_dataset(**options)
from datasets import load_dataset
import subprocess; subprocess.run(x, shell=True)
import os; os.system(x)
from os import popen
import pandas as pd; pd.read_pickle(f)
"""
HARMLESS = """
model.eval()
import re; re.compile('a')
import torch; torch.load(f, map_location='cpu', weights_only=True, mmap=True)
import torch; torch.compile(model)
import numpy as np; np.load(f, mmap_mode='r', allow_pickle=False)
import yaml; yaml.safe_load(f)
import yaml; yaml.load(f, Loader=yaml.SafeLoader)
import json; json.load(f)
from safetensors.torch import load_file; load_file(f)
import gptcli.interop.hf_pickle
AutoModel.from_pretrained(x, trust_remote_code=False)
"""


@pytest.mark.parametrize("line", MUTATIONS.strip().splitlines())
def test_the_search_finds(line: str) -> None:
    """The search above sees each form, under other names too, and however it is indented."""
    assert dangers(line)
    body = "\n".join("        " + part.strip() for part in line.split(";"))
    assert dangers(f"class A:\n    def f(self):\n{body}\n")


@pytest.mark.parametrize("line", HARMLESS.strip().splitlines())
def test_the_search_leaves_alone(line: str) -> None:
    """What is as it should be is no finding, so that a finding means something."""
    assert dangers(line) == []


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
