"""Configs of all kinds: YAML trees, whole configs with other values in them, any text."""

import copy
from typing import Any

import yaml
from hypothesis import strategies as st

from gptcli.config.load import dump_config
from gptcli.config.schema import Config

WHOLE: dict[str, Any] = yaml.safe_load(dump_config(Config()))
KEYS = sorted({key for section in WHOLE.values() if isinstance(section, dict) for key in section})
SECTIONS = sorted(name for name, value in WHOLE.items() if isinstance(value, dict))
NAMES = st.one_of(
    st.sampled_from(["cosine", "adamw", "gpt2", "llama", "rope", "learned", "none", "layernorm"]),
    st.sampled_from(["post", "gelu", "relu", "bf16", "fp16", "on", "off", "best_fit", "text"]),
    st.sampled_from(["bytes", "8h", "10MB", "linear"]),
)
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


@st.composite
def changed_values(draw: st.DrawFn, text: str) -> bytes:
    """The config of that text, with a value or two that may well be allowed there."""
    tree = yaml.safe_load(text)
    tree["training"]["compile"] = "off"  # which YAML reads as false
    for _ in range(draw(st.integers(1, 2))):
        section = draw(st.sampled_from(SECTIONS))
        key = draw(st.sampled_from(sorted(WHOLE[section])))
        default = WHOLE[section][key]
        values = [SCALARS, st.integers(0, 64), st.floats(0, 1), st.booleans(), NAMES]
        if isinstance(default, bool):
            values = [st.booleans()]
        elif isinstance(default, int | float):
            near = [default, default * 2, default // 2, default * 10**6, default + 1, 0, 1]
            values = [st.sampled_from(near), st.sampled_from(near), SCALARS]
        tree.setdefault(section, {})[key] = draw(st.one_of(*values))
    return as_yaml(tree)
