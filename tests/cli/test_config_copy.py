"""`gpt config copy`: a config to change, with the schema that editors use beside it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli.config_command import SCHEMA_FILE
from gptcli.config.load import config_schema
from gptcli.config.scalars import resolve
from gptcli.config.shipped import shipped_config, shipped_names
from gptcli.config.tree import Node, Origin, parse

HEADER = "# yaml-language-server: $schema="


def values(node: Node) -> Any:
    """A YAML tree as an editor gives it to the schema's validator."""
    content = node.content
    if isinstance(content, dict):
        return {key: values(entry.node) for key, entry in content.items()}
    if isinstance(content, list):
        return [values(item) for item in content]
    return resolve(content.text) if content.plain else content.text


def problems(path: Path) -> list[str]:
    """What a validator of JSON schemas finds in a config, by the schema that its header names."""
    jsonschema = pytest.importorskip("jsonschema")
    text = path.read_text(encoding="utf-8")
    assert text.startswith(HEADER)
    named = text.splitlines()[0].removeprefix(HEADER)
    schema = json.loads((path.parent / named).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    root, repeated = parse(text, Origin(str(path)))
    assert root is not None
    assert not repeated
    return [e.message for e in jsonschema.Draft202012Validator(schema).iter_errors(values(root))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_copy_keeps_everything_below_a_header_for_editors(gpt, folder):
    """Comments say why a number is what it is: a copy by a YAML library would lose them."""
    assert gpt("config", "copy", "small", "my.yaml") == (0, "my.yaml\n", "")
    source = shipped_config("small")
    assert source is not None
    original = source.read_text(encoding="utf-8")
    assert Path("my.yaml").read_text() == f"{HEADER}{SCHEMA_FILE}\n{original}"
    assert gpt("config", "check", "my.yaml") == (0, "my.yaml: ok\n", "")
    assert sorted(os.listdir()) == [SCHEMA_FILE, "my.yaml"]


def test_the_schema_takes_every_shipped_config(gpt, folder):
    """Marks under lines that are right teach users to ignore marks."""
    for name in shipped_names():
        assert gpt("config", "copy", name, "configs-of-mine.yaml", "--overwrite")[0] == 0
        assert problems(Path("configs-of-mine.yaml")) == [], name


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("model: {n_layers: 4}", "'n_layers' was unexpected"),
        ("modle: {}", "'modle' was unexpected"),
        ("model: {preset: gtp2}", "'gtp2' is not one of"),
        ("training: {max_steps: many}", "'many'"),
        ("optimizer: {lr: -1}", "-1"),
    ],
)
def test_the_schema_marks_mistakes(gpt, folder, line, said):
    gpt("config", "copy", "small", "my.yaml")
    Path("my.yaml").write_text(f"{HEADER}{SCHEMA_FILE}\n{line}\n")
    assert any(said in problem for problem in problems(Path("my.yaml")))
    assert gpt("config", "check", "my.yaml")[0] == 2


def test_nothing_is_overwritten_unasked(gpt, folder):
    """An afternoon's changes are one Tab and Enter away from being gone."""
    Path("small.yaml").write_text("name: mine\n")
    code, out, err = gpt("config", "copy", "small")
    assert (code, out) == (2, "")
    assert err == (
        "error: small.yaml: exists already\nhint: name another DEST, or replace it: --overwrite\n"
    )
    assert Path("small.yaml").read_text() == "name: mine\n"
    assert not Path(SCHEMA_FILE).exists()
    assert gpt("config", "copy", "small", "--overwrite")[0] == 0
    assert "name: small" in Path("small.yaml").read_text()


def test_a_schema_of_another_version_is_brought_up_to_date(gpt, folder):
    old = {**json.loads(config_schema()), "properties": {}}
    Path(SCHEMA_FILE).write_text(json.dumps(old))
    assert gpt("config", "copy", "small")[0] == 0
    assert json.loads(Path(SCHEMA_FILE).read_text()) == json.loads(config_schema())


@pytest.mark.parametrize("content", ["mine", "[]", '{"title": "Config"}'])
def test_a_file_of_the_schemas_name_that_is_none_of_ours_is_kept(gpt, folder, content):
    Path(SCHEMA_FILE).write_text(content)
    code, _, err = gpt("config", "copy", "small")
    assert code == 2
    assert "hint: move it away, or leave the schema out: --no-schema" in err
    assert Path(SCHEMA_FILE).read_text() == content
    assert gpt("config", "copy", "small", "--no-schema")[0] == 0
    assert HEADER not in Path("small.yaml").read_text()


def test_into_a_directory_and_into_none(gpt, folder):
    Path("mine").mkdir()
    assert gpt("config", "copy", "tiny", "mine") == (0, "mine/tiny.yaml\n", "")
    assert problems(Path("mine/tiny.yaml")) == []
    code, out, err = gpt("config", "copy", "tiny", "nowhere/tiny.yaml")
    assert (code, out) == (2, "")
    assert err == "error: nowhere/tiny.yaml: no such folder\nhint: mkdir -p nowhere\n"
