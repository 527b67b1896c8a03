"""`gpt config`: list, show, copy, check, schema."""

import json
import os
from pathlib import Path

import pytest
import typer

from gptcli.cli.config_command import config_app
from gptcli.config.load import load_config
from gptcli.config.model_schema import RopeScaling
from gptcli.config.presets import PRESETS
from gptcli.config.schema import Config
from gptcli.config.shipped import shipped_config, shipped_names
from gptcli.errors import ConfigError


def run(*arguments: str) -> None:
    typer.main.get_command(config_app).main(list(arguments), "gpt config", standalone_mode=False)


def first_shipped() -> str:
    names = shipped_names()
    if not names:
        pytest.skip("no shipped configs in this checkout")
    return names[0]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text("model: {n_layer: 2}\n")
    return str(path)


def test_show_prints_what_loads_back(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The resolved config is for use: stdout alone must be a config."""
    run("show", config, "--set", "seed=5", "--set", "generate.json=true")
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    expected = load_config(config, ["seed=5", "generate.json=true"]).config
    assert load_config(str(again)).config == expected


def test_check_says_ok_or_raises_every_problem(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A check that prints problems and exits 0 is of no use to scripts."""
    run("check", config)
    assert capsys.readouterr().out == f"{config}: ok\n"
    with pytest.raises(ConfigError) as error:
        run("check", config, "--set", "seed=x", "--set", "nam=y")
    assert len(error.value.problems) == 2
    assert capsys.readouterr().out == ""


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Editors read it from a file."""
    run("schema")
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Config.model_fields)


def test_list_shows_every_name_with_its_comment(capsys: pytest.CaptureFixture[str]) -> None:
    """Names alone do not say which config to take."""
    first_shipped()
    run("list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_names()
    assert all(len(line.split()) > 2 for line in lines)


def test_copy_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second copy destroyed a user's changes to the first."""
    monkeypatch.chdir(tmp_path)
    name = first_shipped()
    run("copy", name)
    assert capsys.readouterr().out == f"{name}.yaml\n"
    mine = tmp_path / f"{name}.yaml"
    source = shipped_config(name)
    assert source is not None
    assert mine.read_bytes().partition(b"\n")[2] == source.read_bytes()
    mine.write_text("seed: 3\n")
    for destination in ([], ["."], [str(mine)]):
        with pytest.raises(ConfigError, match="exists already") as error:
            run("copy", name, *destination)
        assert error.value.exit_code == 2
    assert mine.read_text() == "seed: 3\n"
    run("copy", name, "other.yaml")
    assert (tmp_path / "other.yaml").exists()
    with pytest.raises(ConfigError, match="no such folder"):
        run("copy", name, "no/such/folder/x.yaml")


@pytest.mark.parametrize("name", ["nope", "../x", "", "a/b"])
def test_copy_of_an_unknown_name(name: str) -> None:
    """A name must not become a path outside the shipped folder."""
    with pytest.raises(ConfigError, match="is not a shipped config"):
        run("copy", name)
    assert not os.path.exists("nope.yaml")


def test_lists_and_mappings_of_the_model(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`show` printed the one form of a window that `check` of its output had to take."""
    sets = ["--set", "model.window=64", "--set", "model.rope_scaling={kind: linear, factor: 2}"]
    run("show", config, *sets)
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    run("check", str(again))
    assert capsys.readouterr().out == f"{again}: ok\n"
    model = load_config(str(again)).config.model
    assert model.window == [64]
    assert model.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    again.write_text("model:\n  n_layer: 2\n  window: [0, x]\n")
    with pytest.raises(ConfigError) as error:
        run("check", str(again))
    assert error.value.problems == [
        f"{again}:3:15: model.window[1]: expected a whole number, got the text 'x'"
    ]


def test_presets_and_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A preset that no command names is not found; taken for a config it got a wrong hint."""
    run("presets")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert lines[-1].split()[2::2] == ["96", "96", "12288", "2048"]
    with pytest.raises(ConfigError) as error:
        run("show", "gpt3-small")
    assert "gpt pretrain small --set model.preset=gpt3-small" in str(error.value.hint)
