"""Any YAML as the config of `gpt generate`."""

from pathlib import Path
from typing import Any

import pytest
from any_config import CONFIGS, SCALARS, TREES, as_yaml
from guard import Gpt, came_to, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.schema import GenerateConfig

WHOLE: dict[str, Any] = GenerateConfig().model_dump(by_alias=True)
ODD = st.one_of(SCALARS, TREES)
TEXTS = st.text(max_size=9)
FITTING: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(["n", "top_k", "logprobs"], st.integers(0, 300)),
    **dict.fromkeys(["temperature", "top_p", "min_p"], st.one_of(st.floats(0, 1), st.floats(0))),
    **dict.fromkeys(["repetition_penalty", "presence_penalty", "frequency_penalty"], st.floats()),
    **dict.fromkeys(["stop", "bad_words"], st.lists(st.one_of(TEXTS, st.text("0123")), max_size=3)),
    "choices": st.lists(TEXTS, max_size=3),
    "regex": st.one_of(TEXTS, st.text("ab(|)[]*+?{2,}.^$", max_size=12)),
    "json_schema": st.one_of(
        TREES,
        st.sampled_from(["text.txt", "nope.json", ".", "/dev/null", '{"type": "null"}', "{}"]),
        st.fixed_dictionaries({"type": st.sampled_from(["string", "array", "object", "number"])}),
    ),
    "prompt": TEXTS,
    "prompt_file": st.sampled_from(["text.txt", "nope.txt", ".", "/dev/null", "fuzzed.yaml"]),
    "prompt_tokens": st.lists(st.one_of(st.integers(0, 256), st.integers(0)), max_size=5),
    "seed": st.integers(),
    "quantize": st.sampled_from(["int8", "bf16", "fp16"]),
    "speculate": st.just("lookup"),
    "truncate": st.sampled_from(["left", "error"]),
    "device": st.sampled_from(["cpu", "auto", "cuda", "mps"]),
    "model": st.sampled_from(["r", "r/checkpoints", "none", "..", "text.txt"]),
}
LARGEST = 20  # what takes for ever because it is asked to is no fault


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A model."""
    from gptcli.cli.main import main

    assert main(["pretrain", "tiny.yaml", "--run-dir=r", "--quiet"]) == 0
    return folder / "r"


@st.composite
def sections(draw: st.DrawFn) -> bytes:
    """A config whose section generate has some other values."""
    keys = draw(st.lists(st.sampled_from(sorted(WHOLE)), max_size=4, unique=True))
    section = {}
    for key in keys:
        fits = draw(st.integers(0, 5)) > 0
        section[key] = draw(FITTING.get(key, st.booleans()) if fits else ODD)
    section["max_new_tokens"] = draw(st.sampled_from([1, 2, 3]))
    if isinstance(section.get("n"), int | float) and section["n"] > LARGEST:
        section["n"] = 2
    return as_yaml({"generate": section})


@fuzzed
@given(content=st.one_of(sections(), sections(), sections(), CONFIGS), prompt=st.integers(0, 3))
def test_generate_configs(
    content: bytes, prompt: int, model: Path, gpt: Gpt, folder: Path, monkeypatch: Any
) -> None:
    """A config is generated with, or every problem in it named."""
    path = folder / "fuzzed.yaml"
    path.write_bytes(content)
    flags = [f"--model={model}", "--max-new-tokens=3", *(["--prompt=day"] if prompt else [])]
    with case("generate_configs"), open("/dev/null") as file, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        code, _, _ = well(gpt, ["generate", f"--config={path}", *flags], {0, 2, 3, 4, 6})
        came_to("generate_configs", "refused" if code else "generated")
