"""docs/cli.md and docs/config.md agree with the code, and say something of everything in it."""

import re

import pytest
import reference

from gptcli.cli.main import _COMMANDS, _GROUPS
from gptcli.config.fields import keys_of
from gptcli.config.schema import Config


@pytest.mark.parametrize("path", sorted(reference.pages()), ids=lambda path: path.name)
def test_the_page_is_up_to_date(path: object) -> None:
    """Guards against a reference that says what once was."""
    written = path.read_text(encoding="utf-8")
    assert written == reference.pages()[path], "run: python scripts/reference.py"


def test_every_key_has_a_description() -> None:
    """Guards editors and docs/config.md against a key of which its name says all there is."""
    bare = [
        f"{name}.{key}"
        for name, section in reference._sections("", Config)
        for key, field in keys_of(section).items()
        if not field.description and reference._inner(field) is None
    ]
    assert bare == []
    assert all(section.__doc__ for _, section in reference._sections("", Config))


def test_every_flag_has_a_help(gpt) -> None:
    """Guards that the page has what --help has: each command, and each of its flags with a text."""
    found = reference.commands()
    assert {command.name.partition(" ")[0] for command in found} == {*_COMMANDS, *_GROUPS}
    for command in found:
        given = {p.name: p for p in reference.parameters(command)}
        assert all(len(p.text) > 3 for p in given.values()), command.name
        _, said, _ = gpt(*command.name.split(), "--help")
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", said.partition("\nOptions:")[2]))
        documented = set(
            re.findall(r"--[a-z][a-z-]*", " ".join([*given, "--debug --quiet --help"]))
        )
        assert {f for f in documented if f not in flags} == set(), command.name


def test_no_help_is_cut(gpt) -> None:
    """Guards the lists of commands: each has a first sentence that fits its line."""
    for words in ([], *([group] for group in _GROUPS)):
        _, said, _ = gpt(*words, "--help")
        assert "..." not in said.replace("[ARGS]...", ""), words


def test_links_lead_somewhere() -> None:
    """Guards the links within and between the pages."""
    for page in reference.pages().values():
        headings = {reference._anchor(h) for h in re.findall(r"^#+ (.*)$", page, re.M)}
        assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= headings


def test_a_change_makes_a_page_old(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Guards --check, by which a commit that changes a flag is found."""
    for name, code in (("docs", 0), ("old", 1)):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setattr(reference, "DOCS", folder)
        monkeypatch.setattr("sys.argv", ["reference.py"])
        assert reference.main() == 0
        if code:
            (folder / "cli.md").write_text("# Commands\n")
        monkeypatch.setattr("sys.argv", ["reference.py", "--check"])
        assert reference.main() == code
    assert "docs/cli.md is old: python scripts/reference.py" in capsys.readouterr().out
