"""A config as YAML, and as JSON schema."""

import json
import random
from pathlib import Path

import pytest
import yaml

from gptcli.config.data_schema import DataConfig, SourceConfig, TokenizerConfig
from gptcli.config.load import (
    config_schema,
    dump_config,
    given_beside_init,
    load_config,
    load_resolved,
    unused_keys,
)
from gptcli.config.model_schema import ModelConfig, RopeScaling
from gptcli.config.schema import (
    Config,
    FinetuneConfig,
    GenerateConfig,
    OptimizerConfig,
    TrainingConfig,
)
from gptcli.errors import ConfigError

TRICKY = (
    "no on true null ~ 1e3 3e-4 017 0o17 0x1f 1_000 .inf 12:30:45 2024-01-01 << = --- ... ? - *"
    " & ! %YAML 1. +5 5e NULL Yes @ ` | > {{prompt}} [x] #no"
)


def reload(tmp_path: Path, config: Config) -> Config:
    path = tmp_path / "dump.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return load_config(str(path)).config


def test_a_full_config_comes_back_equal(tmp_path: Path) -> None:
    """runs/X/config.yaml repeats the run: 1e-10 must not come back as text, nor `json` get lost."""
    config = Config(
        name="2024",
        data=DataConfig(train=[SourceConfig(path="*.txt"), SourceConfig(path="b", encoding="x")]),
        model=ModelConfig(preset="gpt2-medium", n_layer=2, norm_eps=1e-10),
        optimizer=OptimizerConfig(eps=5e-324, lr=1e22, betas=[0.0, 0.5]),
        training=TrainingConfig(compile="off", tokens_per_step=2048, max_time="600", max_steps=99),
        generate=GenerateConfig(json=True, seed=-3, prompt_tokens=[1, 2], stop=["\n", " "]),
        finetune=FinetuneConfig(template="{{ prompt }}:\n\n> "),
    )
    assert reload(tmp_path, config) == config
    assert reload(tmp_path, Config()) == Config()


def test_a_config_with_init_leaves_out_what_comes_from_there(tmp_path: Path) -> None:
    """config.yaml of a finetuned run was refused by the command that should repeat it."""
    config = Config(init="runs/x", seed=3, model=ModelConfig(dropout=0.1))
    path = tmp_path / "dump.yaml"
    path.write_text(dump_config(config, loadable=True))
    assert load_config(str(path)).config == config
    assert given_beside_init(load_config(str(path)).config) == {"dropout": 0.1}


def test_what_is_given_beside_init_is_written_out(tmp_path: Path) -> None:
    """config.yaml of a long-context run must repeat it: without its block size, that of the init
    model would be taken; with keys that were not given, these would be forced on another one."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "init: runs/x\ntraining: {tokens_per_step: 8192}\nmodel:\n  block_size: 4096\n"
        "  rope_scaling: {kind: dynamic, factor: 4, original_block_size: 1024}\n"
    )
    config = load_config(str(path), ["model.window=[0, 4e2]"]).config
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config, loadable=True))
    assert yaml.safe_load(again.read_text())["model"] == {
        "block_size": 4096,
        "dropout": 0.0,
        "rope_scaling": {"kind": "dynamic", "factor": 4.0, "original_block_size": 1024},
        "window": [0, 400],
    }
    assert load_config(str(again)).config == config


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="linear", factor=2.0),
        RopeScaling(kind="dynamic", factor=2.0, original_block_size=64),
        RopeScaling(kind="yarn", factor=2.0, original_block_size=64, attention_factor=1.0),
        RopeScaling(kind="llama3", factor=8.0, original_block_size=64, low_freq_factor=2.0),
    ],
)
def test_every_scaling_comes_back_equal(tmp_path: Path, scaling: RopeScaling) -> None:
    """A dump with the keys of all kinds would be refused for those that its kind does not read."""
    config = Config(model=ModelConfig(rope_scaling=scaling, window=[0, 16]))
    assert reload(tmp_path, config) == config


def test_a_checkpoint_keeps_the_shape_beside_init(tmp_path: Path) -> None:
    """A finetuned checkpoint stands alone: its config names init and has the shape all the same."""
    config = Config(
        init="runs/x", model=ModelConfig(n_layer=2), tokenizer=TokenizerConfig(kind="bytes")
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_resolved(path) == config
    path.write_text("seed: x\n")
    with pytest.raises(ConfigError, match=r"config.yaml:1:7: seed: expected a whole number"):
        load_resolved(path)


@pytest.mark.parametrize(
    "text", [*TRICKY, "", " ", "a: b", "x\x85y", "\u2028", "\x00", "é😀", "\r"]
)
def test_text_comes_back_as_text(tmp_path: Path, text: str) -> None:
    """PyYAML leaves 1e3 unquoted, which is a number here, and folds NEL to a space."""
    config = Config(generate=GenerateConfig(prompt=text, stop=[text or "x"]))
    assert reload(tmp_path, config) == config


def test_random_text_comes_back(tmp_path: Path) -> None:
    """Combinations of YAML's special characters that nobody thought of."""
    rng = random.Random(0)
    alphabet = "ab \n\t:#-[]{}'\"\\,&*!|>%@`~?01.e+_\x85\u2028\ufeffé😀\x1b\r\x7f"
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 120))) for _ in range(300)]
    config = Config(generate=GenerateConfig(stop=texts))
    assert reload(tmp_path, config) == config


def test_other_readers_see_the_same_values() -> None:
    """Other tools read a run's config with plain PyYAML."""
    config = Config(generate=GenerateConfig(prompt="on"), training=TrainingConfig(compile="on"))
    expected = config.model_dump(by_alias=True)
    for key in unused_keys(config):
        section, _, name = key.partition(".")
        del expected[section][name]
    assert yaml.safe_load(dump_config(config)) == expected


def test_keys_without_effect_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against an option that is taken and does nothing, without a word."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "tokenizer: {kind: bytes, vocab_size: 5000}\noptimizer: {kind: adamw, momentum: 0.9}\n"
        "schedule: {kind: cosine, decay_ratio: 0.3}\nmodel: {position: learned}\n"
    )
    config = load_config(str(path)).config
    for key in ("tokenizer.vocab_size", "optimizer.momentum", "schedule.decay_ratio"):
        assert f"{key} has no effect" in caplog.text
    caplog.clear()
    path.write_text(dump_config(config))
    load_config(str(path))
    assert not caplog.text  # a run's own config.yaml names none of them


def test_schema_for_editors() -> None:
    """An editor must not mark a source that is one string, nor miss keys, presets and defaults."""
    schema = json.loads(config_schema())
    definitions = schema["$defs"]
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False
    train = definitions["DataConfig"]["properties"]["train"]["anyOf"]
    assert {"type": "string"} in train
    assert "gpt2" in definitions["ModelConfig"]["properties"]["preset"]["enum"]
    assert "json" in definitions["GenerateConfig"]["properties"]
    window = definitions["ModelConfig"]["properties"]["window"]["anyOf"]
    assert {"type": "integer"} in window
    assert {"type": "array", "items": {"type": "integer"}} in window
    assert set(definitions["RopeScaling"]["required"]) == {"kind", "factor"}
    lr = definitions["OptimizerConfig"]["properties"]["lr"]
    assert lr["default"] == "auto"
    assert {"const": "auto", "type": "string"} in lr["anyOf"]
