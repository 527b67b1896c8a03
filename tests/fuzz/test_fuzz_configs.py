"""Any YAML tree as a config, and any text."""

import copy
from pathlib import Path
from typing import Any

import yaml
from guard import Gpt, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.load import dump_config
from gptcli.config.schema import Config

WHOLE: dict[str, Any] = yaml.safe_load(dump_config(Config()))
KEYS = sorted({key for section in WHOLE.values() if isinstance(section, dict) for key in section})
WORDS = st.sampled_from([*WHOLE, *KEYS, "auto", "none", "<<", "a.b"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 70_000),
    st.floats(),
    st.dates(),
    st.text(max_size=20),
    st.sampled_from(["3e-4", "1e999", "-1", "0x7f", "1_000", "10m", "∞", "../..", "\x1b[31m", "y"]),
    WORDS,
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(WORDS, st.text(max_size=8), SCALARS), inner, max_size=5),
    ),
    max_leaves=20,
)


@st.composite
def changed_configs(draw: st.DrawFn) -> Any:
    """A whole config in which some values are others."""
    tree = copy.deepcopy(WHOLE)
    for _ in range(draw(st.integers(1, 4))):
        section = draw(st.sampled_from(sorted(tree)))
        if isinstance(tree[section], dict) and tree[section] and draw(st.booleans()):
            tree[section][draw(st.sampled_from(sorted(tree[section], key=str)))] = draw(TREES)
        else:
            tree[section] = draw(TREES)
    return tree


@st.composite
def spoilt_texts(draw: st.DrawFn) -> bytes:
    """A config as text, with pieces of it cut out, doubled or replaced."""
    text = yaml.safe_dump(WHOLE).encode()
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 40)))
        text = text[:start] + draw(st.binary(max_size=12)) * draw(st.integers(1, 3)) + text[end:]
    return text


def as_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


CONFIGS = st.one_of(
    changed_configs().map(as_yaml),
    TREES.map(as_yaml),
    spoilt_texts(),
    st.binary(max_size=300),
    st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")),
)


@fuzzed
@given(content=CONFIGS)
def test_configs(content: bytes, gpt: Gpt, folder: Path) -> None:
    """A config is read, or every problem in it named; what is read can be planned with."""
    path = folder / "fuzzed.yaml"
    path.write_bytes(content)
    with case("configs"):
        code, _, _ = well(gpt, ["config", "check", str(path)], {0, 2})
        if code == 0:
            again = ["pretrain", str(path), "--dry-run", "--set=data.train=text.txt"]
            well(gpt, again, {0, 2, 3, 4, 6})
