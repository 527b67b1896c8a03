import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def bash(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line after setup.sh, without the choices that the caller's environment makes."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GPT_VENV", "PYTHON")}
    return subprocess.run(
        ["bash", "-c", "set -euo pipefail\n. scripts/setup.sh\n" + line],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=50,
        env={**clean, **environment},
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the setup reads, and an environment in it that looks installed."""
    place = tmp_path / "checkout with spaces"
    (place / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "scripts/setup.sh", "scripts/constraints.txt"):
        shutil.copy(ROOT / name, place / name)
    binaries = place / ".venv" / "bin"
    binaries.mkdir(parents=True)
    # A wrapper instead of a link: the interpreter behind a link would not find its own packages.
    (binaries / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (binaries / "python").chmod(0o755)
    printed = bash("fingerprint .venv/bin/python", place)
    assert printed.returncode == 0, printed.stderr
    (place / ".venv" / "gptcli-setup").write_text(printed.stdout + "test tables\n")
    return place


@pytest.fixture(params=sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]))
def script(request) -> Path:
    return request.param


def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("extras", ["", "test", "tables test"])
def test_second_setup_installs_nothing(checkout, extras):
    """One environment serves all scripts; asking the index each time fails offline."""
    done = bash(f"setup {extras}; command -v python", checkout, PIP_INDEX_URL="file:///nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("/.venv is up to date\n")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == f"{checkout}/.venv/bin/python\n"


def calls_pip(checkout: Path, extras: str) -> str:
    """The packages that `setup` would install, with pip replaced by an echo."""
    done = bash(f'run_pip() {{ echo "pip $*"; }}\nsetup {extras}', checkout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_extra_keeps_those_there_are(checkout):
    installed = calls_pip(checkout, "dev")
    assert installed.endswith("pip -e .[test,tables,dev]\n")
    assert installed.startswith("pip torch==")
    assert calls_pip(checkout, "dev test") == ""


def test_changed_dependencies_are_installed(checkout):
    with open(checkout / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    assert calls_pip(checkout, "test").endswith("pip -e .[test]\n")


def test_failed_install_is_tried_again(checkout):
    """A stamp written before pip has finished would take a half environment for a whole one."""
    python = checkout / ".venv" / "bin" / "python"
    refuse = 'case "$*" in *"pip install"*) echo "no such package"; exit 1 ;; esac'
    python.write_text(f'#!/bin/sh\n{refuse}\nexec "{sys.executable}" "$@"\n')
    done = bash("setup dev", checkout)
    assert done.returncode == 1
    assert "no such package\nerror: pip could not install: torch==" in done.stderr
    assert (checkout / ".venv" / "gptcli-setup").read_text().splitlines()[1] == "test tables"


def test_a_folder_that_is_no_environment_is_left_alone(checkout):
    """GPT_VENV=$HOME must not become an environment, or be cleared."""
    (checkout / "mine").mkdir()
    (checkout / "mine" / "file").write_text("x")
    done = bash("setup", checkout, GPT_VENV="mine")
    assert done.returncode == 1
    assert "is no Python environment" in done.stderr
    assert [p.name for p in (checkout / "mine").iterdir()] == ["file"]


def test_old_python_is_named(checkout, tmp_path):
    (tmp_path / "old").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "old").chmod(0o755)
    done = bash("setup", checkout, GPT_VENV="new", PYTHON=str(tmp_path / "old"))
    assert done.returncode == 1
    assert "no Python 3.10 or newer" in done.stderr
    assert not (checkout / "new").exists()


def test_constraints_cover_the_direct_dependencies():
    """An unpinned dependency makes the same commit install other programs on another day."""
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0]
    wanted = set(re.findall(r'"([A-Za-z0-9_-]+)(?:[>=]=[\d.]+)"', project)) - {"setuptools"}
    optional = {
        "llama-cpp-python",
        "lm-eval",
        "tensorboard",
    }  # large; whoever asks for them chooses the version
    assert {"torch", "typer", "pytest"} <= wanted
    assert {name.lower() for name in wanted} - optional <= pinned
