"""Constraints before there is a model: what is taken, what is refused, and within what bounds."""

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.config.generate_schema import GenerateConfig
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError
from gptcli.generation import constraint
from gptcli.generation.constraint import Constraint, constraint_of, read_constraint

ROOT = Path(__file__).parents[2]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an ImportError, or a hint that installs nothing."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    constraint._problem.cache_clear()
    with pytest.raises(ConfigError, match="need the package llguidance") as caught:
        Constraint.regex("a{7}")
    extra = re.fullmatch(r"pip install 'gptcli\[(\w+)\]'", str(caught.value.hint))
    assert extra is not None
    assert f'\n{extra[1]} = ["llguidance' in (ROOT / "pyproject.toml").read_text()


llguidance = pytest.importorskip("llguidance", reason="needs the extra constrain")


def chain(count: int, link: str = "prefixItems") -> dict[str, Any]:
    """A schema whose references lead through `count` others, one below the other."""
    definitions: dict[str, Any] = {
        f"d{i}": {"type": "array", link: [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(count)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{count}": {}}}


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("choices", [], "no choices"),
        ("choices", ["a", ""], "a choice is empty"),
        ("choices", ["\ud800"], "half of a character"),
        ("choices", ["x" * 300_000], "at most 262,144"),
        ("regex", "", "an empty pattern"),
        ("regex", "[a", "unclosed character class"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", r"a\bb", "lookarounds not supported"),
        ("regex", "(" * 5000 + ")" * 5000, "nested parentheses"),
        ("regex", "\ud800", "half of a character"),
        ("regex", "a" * 300_000, "at most 262,144"),
        ("json_schema", "", "not valid JSON"),
        ("json_schema", '{"type":', "not valid JSON"),
        ("json_schema", '{"type": "string"} | "x"', "not valid JSON"),
        ("json_schema", "[]", "a schema is a JSON object"),
        ("json_schema", '{"a":' + "[" * 100_000, "nested too deeply"),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "recursion limit"),
        ("json_schema", '{"enum": ["\\ud83d"]}', "half of a character"),
        ("json_schema", '{"enum": ["' + "x" * 300_000 + '"]}', "more than 262,144"),
        ("json_schema", {"enum": ["x" * 300_000]}, "at most 262,144"),
        ("json_schema", {"const": float("nan")}, "not JSON"),
        ("json_schema", {"const": {1}}, "not JSON"),
        ("json_schema", {"type": "strin"}, "Invalid type: strin"),
        ("json_schema", {"not": {}}, 'keywords that cannot be kept: ["not"]'),
        ("json_schema", {"uniqueItems": True}, 'cannot be kept: ["uniqueItems"]'),
        ("json_schema", {"minimum": 3, "maximum": 1, "type": "integer"}, "Unsatisfiable"),
        ("json_schema", {"enum": []}, "Unsatisfiable"),
        ("json_schema", {"$ref": "http://127.0.0.1/x"}, "does not fetch"),
        ("json_schema", {"$ref": "file:///etc/passwd"}, "does not fetch"),
        ("json_schema", {"x-guidance": 3}, "invalid type"),
        ("json_schema", {"properties": {f"p{i}": {} for i in range(9000)}}, "at most 5,000"),
        ("json_schema", {"required": [f"p{i}" for i in range(20_000)]}, "at most 5,000"),
        ("json_schema", {"patternProperties": {f"^a{i}x": {} for i in range(600)}}, "at most 50"),
        ("json_schema", {"allOf": [{"pattern": f".*{i}.*a"} for i in range(20)]}, "at most 10"),
        (
            "json_schema",
            {"$ref": "#/$defs/a", "type": "string", "$defs": {"a": {"pattern": "a"}}}
            | {"properties": {f"p{i}": {"pattern": f"{i}.*a"} for i in range(20)}},
            "at most 10",
        ),
        ("json_schema", chain(2000), "at most 5,000|more than 1,000"),
        ("json_schema", chain(400), "401 references in a schema of 5 levels"),
    ],
)
def test_what_cannot_be_kept_is_refused(kind: str, given: Any, told: str) -> None:
    """Guards: a traceback, a crash of the process (references that lead deep end its stack), a
    keyword that is left out without a word, a request to the network."""
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        getattr(Constraint, kind)(given)
    assert re.search(told if "|" in told else re.escape(told), caught.value.message)
    assert caught.value.message.startswith(f"{kind}: ")
    assert "\n" not in caught.value.message
    assert time.monotonic() - began < 2
    with pytest.raises(ConfigError, match=r"^response_format: "):
        getattr(Constraint, kind)(given, "response_format")


def test_patterns_that_hold_alone_may_be_many() -> None:
    """Guards: the bound of patterns that hold together, which few need, on those that do not."""
    names = {f"p{i}": {"pattern": f"^a{i}", "title": "x"} for i in range(40)}
    dates = {f"d{i}": {"allOf": [{"format": "date"}], "title": "x"} for i in range(99)}
    whole = {"properties": {**names, **dates}}
    Constraint.json_schema({"$ref": "#/$defs/a", "title": "x", "$defs": {"a": whole}})
    began = time.monotonic()
    with pytest.raises(ConfigError, match="determine"):
        Constraint.json_schema({"allOf": [{"pattern": f".*a{i}.*b{i}"} for i in range(10)]})
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("link", ["prefixItems", "allOf", "anyOf"])
def test_the_deepest_schemas_that_are_taken(link: str) -> None:
    """Guards: a bound beyond what the stack of a server's thread holds: that ends the process."""
    from gptcli.generation.grammar import check_spelled

    made: list[Constraint] = []

    def make() -> None:
        made.append(Constraint.json_schema(chain(198, link)))
        check_spelled(made[0], Tokenizer.of_bytes(), 257)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert made


@pytest.mark.parametrize(
    "pattern",
    [
        "(a{0,60000}){0,60000}",
        "(a|b)*a(a|b){60}",
        "((a|aa)+)+b",
        r"(\w+\s*)+\w{50}$",
        "(.*a.*b.*c.*d.*e.*f.*g.*h|.*h.*g.*f.*e.*d.*c.*b.*a){3}",
        "(?i)" + "ſk" * 500,
    ],
)
def test_catastrophic_patterns_are_bounded(pattern: str) -> None:
    """Guards: a hang on a regex that takes other engines exponential time, and an exception where
    the library gives up."""
    from gptcli.generation.grammar import vocabulary_of

    began = time.monotonic()
    matcher = vocabulary_of(Tokenizer.of_bytes(), 257).matcher(Constraint.regex(pattern))
    rng = np.random.default_rng(1)
    for _ in range(200):
        open_ = np.flatnonzero(~matcher.banned)
        if not len(open_) or matcher.done:
            break
        matcher.advance(int(rng.choice(open_[open_ < 256])))
    assert matcher.problem is None or matcher.problem.startswith("too complex to go on: ")
    assert time.monotonic() - began < 5


def test_a_text_that_takes_all_states_spoils_no_later_one() -> None:
    """Guards: a lexer that grew too large, which all later texts of the constraint are given."""
    from dataclasses import replace

    from gptcli.generation.grammar import vocabulary_of

    vocabulary = vocabulary_of(Tokenizer.of_bytes(), 257)
    hard = replace(Constraint.regex("((a|b)*a(a|b){100}x?)*"), most_states=300)
    rng = np.random.default_rng(1)
    lengths = []
    for _ in range(2):
        matcher = vocabulary.matcher(hard)
        lengths.append(0)
        while matcher.problem is None:
            matcher.advance(int(rng.choice([97, 98])))
            lengths[-1] += 1
        assert matcher.problem.startswith("too complex to go on: ")
    assert min(lengths) > 20


def test_equal_constraints_are_one() -> None:
    """Guards: a grammar compiled again for each text of a batch, for which it is looked up."""
    one, other = (Constraint.choices(["a", "b", "a"]) for _ in range(2))
    assert (one, hash(one)) == (other, hash(other))
    assert one.texts == ["a", "b"]
    assert one != Constraint.choices(["b", "a"])
    assert Constraint.json_object() == Constraint.json_schema('{"type":  "object"}')
    with pytest.raises(AttributeError):
        one.text = "[]"  # type: ignore[misc]


def test_schemas_come_from_files_and_as_text(tmp_path: Path) -> None:
    """Guards: a path taken for JSON or the reverse; a file that is read again when it is gone, as
    the end of a shell's pipe is."""
    file = tmp_path / "schema.json"
    file.write_bytes(b'\xef\xbb\xbf{"type": "integer"}')
    read = read_constraint(GenerateConfig(json_schema=str(file)))
    file.unlink()
    inline = constraint_of(GenerateConfig(json_schema=' {"type":"integer"}'))
    mapping = constraint_of(GenerateConfig.model_validate({"json_schema": {"type": "integer"}}))
    assert constraint_of(read) == inline == mapping == Constraint.json_schema({"type": "integer"})
    assert read_constraint(GenerateConfig(regex="a")) == GenerateConfig(regex="a")
    with pytest.raises(ConfigError, match=r"cannot read .*schema\.json: No such file") as caught:
        read_constraint(GenerateConfig(json_schema=str(file)))
    example = str(caught.value.hint).partition("as: ")[2]
    assert Constraint.json_schema(json.loads(example)) == Constraint.json_object()
    for content, told in [(b"\xff\xff", "not UTF-8"), (b"{", r"schema\.json: not valid JSON")]:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=told):
            constraint_of(GenerateConfig(json_schema=str(file)))
    for name, told in [("a\0b", "null"), (str(tmp_path), "directory"), ("n" * 300, "long")]:
        with pytest.raises(ConfigError, match=told):
            constraint_of(GenerateConfig(json_schema=name))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_schema_without_end() -> None:
    """Guards: memory filled by a file that never ends."""
    with pytest.raises(ConfigError, match="more than 262,144 characters"):
        constraint_of(GenerateConfig(json_schema="/dev/zero"))


@pytest.mark.parametrize(
    "given",
    [
        {"choices": ["a"], "regex": "a"},
        {"regex": "a", "json_schema": "{}"},
        {"choices": ["a"], "json_schema": "{}"},
        {"choices": []},
        {"choices": [""]},
    ],
)
def test_the_section_takes_one(given: dict[str, Any]) -> None:
    """Guards: two constraints of which one is silently without effect."""
    with pytest.raises(ValueError, match=r"excludes|one or more texts"):
        GenerateConfig.model_validate(given)
