"""What a YAML file's values become."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.load import dump_config, load_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.config.schema import Config, GenerateConfig
from gptcli.errors import ConfigError

Load = Callable[[str], Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_text(text: str) -> Config:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(str(path)).config

    return load_text


def get(config: Config, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: {lr: 3e-4}", "optimizer.lr", 3e-4),
        ("optimizer: {lr: 3.0e-4}", "optimizer.lr", 3e-4),
        ("optimizer: {lr: '3e-4'}", "optimizer.lr", 3e-4),
        ('optimizer: {lr: "3e-4"}', "optimizer.lr", 3e-4),
        ("optimizer: {lr: 1e3}", "optimizer.lr", 1000.0),
        ("optimizer: {lr: .5}", "optimizer.lr", 0.5),
        ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
        ("optimizer: {lr: +2.5E-1}", "optimizer.lr", 0.25),
        ("optimizer: {betas: [0, '5e-1']}", "optimizer.betas", [0.0, 0.5]),
        ("training: {max_steps: 4e3}", "training.max_steps", 4000),
        ("training: {max_steps: 1_000}", "training.max_steps", 1000),
        ("training: {max_tokens: 0x10}", "training.max_tokens", 16),
        ("training: {max_tokens: 0o17}", "training.max_tokens", 15),
        ("training: {max_steps: null}", "training.max_steps", None),
        ("training: {max_steps: ~}", "training.max_steps", None),
        ("training:\n  max_steps:\n", "training.max_steps", None),
        ("training: {micro_batch_size: 8}", "training.micro_batch_size", 8),
        ("training: {micro_batch_size: auto}", "training.micro_batch_size", "auto"),
        ("training: {compile: on}", "training.compile", "on"),
        ("training: {compile: off}", "training.compile", "off"),
        ("training: {compile: 'on'}", "training.compile", "on"),
        ("training: {device: cuda:1}", "training.device", "cuda:1"),
        ("model: {position: none}", "model.position", "none"),
        ("model: {gated: no, bias: True}", "model.gated", False),
        ("model: {qkv_bias: On}", "model.qkv_bias", True),
        ("name: no", "name", "no"),
        ("name: 2024-01-01", "name", "2024-01-01"),
        ("name: '017'", "name", "017"),
        ("init: 12:30:45", "init", "12:30:45"),
        ("init: yes", "init", "yes"),
        ("generate: {prompt: '1e3', json: true}", "generate.prompt", "1e3"),
        ("generate: {json: true}", "generate.json_lines", True),
    ],
)
def test_scalars_by_the_field_that_takes_them(load: Load, text: str, key: str, value: Any) -> None:
    """PyYAML alone reads 3e-4 as text, `no` and `on` as booleans, 12:30:45 as 45045."""
    found = get(load(text), key)
    assert found == value
    assert type(found) is type(value)


def test_multi_line_text_keeps_its_lines(load: Load) -> None:
    """Block scalars lost their style, so a prompt of digits on one line became a number."""
    config = load("generate:\n  prompt: |\n    12\n  stop: ['a\n    b']\n")
    assert config.generate.prompt == "12\n"
    assert config.generate.stop == ["a b"]


def test_json_is_yaml(load: Load) -> None:
    """Configs made by other programs are JSON, where an emoji may be two escapes."""
    config = Config(generate=GenerateConfig(prompt="😀 é\n"))
    assert load(json.dumps(config.model_dump(by_alias=True), indent=2)) == config


def test_a_source_may_be_text_a_mapping_or_a_list(load: Load) -> None:
    """A single source outside a list was refused, or a mapping in a list lost its keys."""
    one = load("data: {train: a.txt}").data.train
    mapping = load("data: {train: {path: a.txt, text_field: body}}").data.train
    both = load("data: {train: [a.txt, {path: b, document: line}], val: c}").data
    assert [source.path for source in one] == ["a.txt"]
    assert mapping[0].text_field == "body"
    assert [source.document for source in both.train] == ["file", "line"]
    assert both.val is not None
    assert both.val[0].path == "c"


def test_empty_sections_take_their_defaults(load: Load) -> None:
    """A section whose keys are all commented out is null in YAML and was called a wrong type."""
    assert load("eval:\ngenerate: {}\ntraining: # later\n") == Config()


def test_aliases_are_values(load: Load) -> None:
    """An alias shared one node, so a change to one use changed the other."""
    config = load("samples: {n: &n 3}\ngenerate: {n: *n}\n")
    assert (config.samples.n, config.generate.n) == (3, 3)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    """Files saved by Windows editors gave an unknown key '\\ufeffname'."""
    path = tmp_path / "w.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: bom\r\nseed: 3\r\n")
    config = load_config(str(path)).config
    assert (config.name, config.seed) == ("bom", 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_keys_that_are_not_given(load: Load, preset: str) -> None:
    """A preset overwrote keys that the user gave, or was only a label."""
    text = f"model: {{preset: {preset}, n_layer: 2, dropout: 0.1, block_size: 64}}"
    model = load(text).model
    given = {"preset": preset, "n_layer": 2, "dropout": 0.1, "block_size": 64}
    expected = {**ModelConfig().model_dump(), **PRESETS[preset], **given}
    assert model.model_dump() == expected
    assert ModelConfig(**given) == model  # type: ignore[arg-type]


def test_presets_hold_only_keys_of_the_model() -> None:
    """A misspelt key in a preset would only fail for those who use that preset."""
    for name, values in PRESETS.items():
        assert set(values) <= set(ModelConfig.model_fields), name
        ModelConfig(preset=name)


def test_given_names_what_the_user_wrote(tmp_path: Path) -> None:
    """Finetuning refuses a given tokenizer section; defaults and presets are not given."""
    path = tmp_path / "c.yaml"
    path.write_text("name: x\nmodel: {preset: gpt2}\ntokenizer:\ndata: {train: {path: a}}\n")
    sets = ["training.tokens_per_step=2048", "optimizer.betas[1]=0.99"]
    loaded = load_config(str(path), sets)
    assert loaded.given == {
        "name",
        "model",
        "model.preset",
        "tokenizer",
        "data",
        "data.train",
        "training",
        "training.tokens_per_step",
        "optimizer",
        "optimizer.betas",
    }
    assert loaded.path == str(path)


def test_no_reference_means_defaults() -> None:
    """Commands without a config need one all the same."""
    loaded = load_config(None)
    assert loaded.config == Config()
    assert loaded.given == frozenset()
    assert load_config(None, base="book.txt").path == "book.txt"


@pytest.mark.parametrize("make", ["missing", "directory", "unreadable", "latin-1", "nul", "empty"])
def test_what_is_no_file_is_a_config_error(tmp_path: Path, make: str) -> None:
    """Each of these was a traceback of open() or decode()."""
    path = tmp_path / "x.yaml"
    reference = str(path)
    expected = {
        "missing": "no such config file",
        "directory": "is a directory",
        "unreadable": "cannot read it|no such config file",
        "latin-1": "x.yaml:2: byte 0xe9 is not UTF-8",
        "nul": r"'a.x00b': no such config file",
        "empty": "no such config file",
    }[make]
    if make == "directory":
        path.mkdir()
    elif make == "unreadable":
        # Root reads files of any mode, so a name that is too long stands for them.
        reference = "x" * 300 + ".yaml"
    elif make == "latin-1":
        path.write_bytes(b"seed: 1\nname: caf\xe9\n")
    elif make == "nul":
        reference = "a\0b"
    elif make == "empty":
        reference = ""
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(reference)
    assert error.value.exit_code == 2
    assert len(error.value.problems) == 1


def test_loading_takes_no_time(tmp_path: Path) -> None:
    """Every command starts with it, `--help` of a mistake included."""
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(Config()))
    start = time.process_time()
    load_config(str(path), ["model.n_layer=6"])
    assert time.process_time() - start < 0.2


def test_a_run_directory_hints_at_its_config(tmp_path: Path) -> None:
    """`gpt pretrain runs/X` is the obvious slip for runs/X/config.yaml."""
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path))
    assert error.value.hint == f"use {tmp_path / 'config.yaml'}"
