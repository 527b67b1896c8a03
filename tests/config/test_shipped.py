"""Shipped configs: found in a checkout and in an installed package, and each of them valid."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptcli.config.load import dump_config, load_config
from gptcli.config.shipped import shipped_config, shipped_names
from gptcli.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[2] / "gptcli"
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from gptcli.config.load import load_config
from gptcli.config.shipped import shipped_config, shipped_names
print(shipped_names())
print(shipped_config("tiny"))
print(shipped_config("nope"), shipped_config("../tiny"), shipped_config(""))
loaded = load_config("tiny", ["seed=4"])
print(loaded.path, loaded.config.model.n_layer, loaded.config.seed)
print([name for name in ("torch", "datasets", "numpy", "typer") if name in sys.modules])
"""


def installed(root: Path) -> None:
    """The parts of the package that configs need, without any shipped config."""
    (root / "gptcli").mkdir()
    for name in ("__init__.py", "errors.py"):
        shutil.copy(PACKAGE / name, root / "gptcli" / name)
    shutil.copytree(PACKAGE / "config", root / "gptcli" / "config")


def run_in(root: Path) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", SCRIPT, str(root)]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("layout", ["gptcli/shipped", "configs"])
def test_names_work_in_a_wheel_and_in_a_checkout(tmp_path: Path, layout: str) -> None:
    """`gpt pretrain small` worked only in the repository. And a config needs no torch."""
    installed(tmp_path)
    folder = tmp_path / layout
    folder.mkdir()
    (folder / "tiny.yaml").write_text("# Tiny\nmodel: {n_layer: 2}\n")
    (folder / "notes.txt").write_text("no config")
    path = str(folder / "tiny.yaml")
    assert run_in(tmp_path) == ["['tiny']", path, "None None None", f"{path} 2 4", "[]"]


def test_the_package_wins_over_a_folder_beside_it(tmp_path: Path) -> None:
    """A folder `configs` in site-packages belongs to somebody else."""
    installed(tmp_path)
    for folder, layers in (("gptcli/shipped", 2), ("configs", 3)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tiny.yaml").write_text(f"model: {{n_layer: {layers}}}\n")
    assert run_in(tmp_path)[1] == str(tmp_path / "gptcli/shipped/tiny.yaml")


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own file must not be shadowed by a shipped one."""
    monkeypatch.chdir(tmp_path)
    name = next(iter(shipped_names()), "small")
    Path(name).write_text("seed: 77\n")
    assert load_config(name).config.seed == 77


def test_every_shipped_config_is_valid_and_says_what_it_is(tmp_path: Path) -> None:
    """A renamed key would break a shipped config unseen, or `gpt config list` show nothing."""
    for name in shipped_names():
        path = shipped_config(name)
        assert path is not None
        assert path.read_text(encoding="utf-8").startswith("# "), name
        config = load_config(name).config
        copy = tmp_path / f"{name}.yaml"
        copy.write_text(dump_config(config), encoding="utf-8")
        assert load_config(str(copy)).config == config


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    """`no such file` alone does not tell that names exist."""
    with pytest.raises(ConfigError, match="zzzz: no such config file") as error:
        load_config("zzzz")
    assert error.value.hint == f"shipped configs: {', '.join(shipped_names())}"
    for name in shipped_names()[:1]:
        with pytest.raises(ConfigError) as error:
            load_config(f"{name}.yaml")
        assert error.value.hint == f"did you mean the shipped config '{name}'?"
