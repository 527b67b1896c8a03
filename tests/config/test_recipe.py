"""`auto`: rates and batch that follow the model's size, and give way to what is written."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gptcli.config import recipe
from gptcli.config.load import dump_config, load_config, load_resolved
from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.config.schema import Config
from gptcli.errors import ConfigError

RATES = ("lr", "adamw_lr", "embedding_lr")


def loaded(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(str(path), overrides).config


def test_the_anchor() -> None:
    """The rates that were measured at 256 wide got lost when the rules came."""
    config = Config()
    assert config.model.n_embd == recipe.ANCHOR_N_EMBD
    assert [getattr(config.optimizer, key) for key in RATES] == [
        recipe.MUON_LR,
        recipe.MUON_ADAMW_LR,
        recipe.MUON_EMBEDDING_LR,
    ]
    assert config.training.tokens_per_step == 4096


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_wider_models_get_no_larger_rates(kind: Any) -> None:
    """A model that was made wider diverged at the rates of a narrow one."""
    models = [ModelConfig(n_embd=n, n_head=n // 32) for n in (32, 64, 128, 256, 768, 4096)]
    found = [recipe.rates(kind, model, from_init=False) for model in models]
    for key in RATES:
        values = [rates[key] for rates in found]
        assert values == sorted(values, reverse=True)
        assert values[-1] > 0
    wide, narrow = found[-1], found[0]
    assert wide["lr"] < narrow["lr"] if kind == "adamw" else wide["lr"] == narrow["lr"]


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("gpt3-small", 6e-4),
        ("gpt3-medium", 3e-4),
        ("gpt3-large", 2.5e-4),
        ("gpt3-xl", 2e-4),
        ("gpt3-2.7b", 1.6e-4),
        ("gpt3-6.7b", 1.2e-4),
        ("gpt3-13b", 1e-4),
        ("gpt3-175b", 0.6e-4),
    ],
)
def test_adamw_follows_gpt3(preset: str, published: float) -> None:
    """Brown et al. 2020, table 2.1: off by a power of ten if the width enters upside down."""
    values = {"model": {"preset": preset}, "optimizer": {"kind": "adamw"}}
    config = Config.model_validate(values)
    assert published <= config.optimizer.lr <= 1.61 * published
    assert config.optimizer.weight_decay == 0.1


def test_batches_fit_every_model() -> None:
    """An automatic batch that is no whole number of rows is refused, and blames the user."""
    for preset in PRESETS:
        config = Config.model_validate({"model": {"preset": preset}})
        assert config.training.tokens_per_step % config.model.block_size == 0
    sizes = [Config.model_validate({"model": {"n_layer": n}}) for n in (1, 4, 16, 64)]
    batches = [config.training.tokens_per_step for config in sizes]
    assert batches == sorted(batches)
    assert batches[0] < batches[-1]
    odd = {"model": {"block_size": 100}, "training": {"micro_batch_size": 3}}
    assert Config.model_validate(odd).training.tokens_per_step % 300 == 0


def test_longer_runs_get_larger_batches() -> None:
    """A batch that grows with the tokens themselves leaves a short run no steps."""
    batches = [recipe.tokens_per_step(10.0**n, 64) for n in range(1, 12)]
    assert batches == sorted(batches)
    assert batches[0] == recipe.LEAST_STEP_TOKENS
    assert all(10.0**n / batch > 100 for n, batch in enumerate(batches, 1) if n >= 6)


def test_dropout_comes_with_repetition() -> None:
    found = [recipe.dropout(epochs) for epochs in (0.1, 1, 4, 5, 12, 13, 1000)]
    assert found == sorted(found)
    assert (found[0], found[2]) == (0.0, 0.0)
    assert 0.0 < found[-1] < 0.5


def test_what_is_written_wins(tmp_path: Path) -> None:
    """A rule that also moves written numbers makes them impossible to set."""
    text = "optimizer: {lr: 0.5, weight_decay: 0}\ntraining: {tokens_per_step: 256}\n"
    config = loaded(tmp_path, text + "model: {n_embd: 64, n_head: 2}\n")
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.5, 0.0)
    quarter = recipe.rates("muon", config.model, from_init=False)
    assert config.optimizer.adamw_lr == quarter["adamw_lr"] > recipe.MUON_ADAMW_LR
    assert config.training.tokens_per_step == 256
    again = loaded(tmp_path, text, "optimizer.lr=auto", "training.tokens_per_step=auto")
    assert (again.optimizer.lr, again.training.tokens_per_step) == (recipe.MUON_LR, 4096)


def test_the_resolved_config_has_numbers(tmp_path: Path) -> None:
    """runs/X/config.yaml with `auto` in it means another run once the rules change."""
    text = "optimizer: {lr: auto, kind: adamw}\nmodel: {n_embd: 768, n_head: 12}\n"
    config = loaded(tmp_path, text)
    dumped = yaml.safe_load(dump_config(config, loadable=True))
    assert dumped["optimizer"]["lr"] == 6e-4
    assert "auto" not in [dumped["optimizer"]["weight_decay"], dumped["training"]["max_time"]]
    assert loaded(tmp_path, dump_config(config)) == config


def test_with_init_numbers_wait_for_the_shape(tmp_path: Path) -> None:
    """Rates for the default width were written down for a model of another width."""
    config = loaded(tmp_path, "init: runs/x\noptimizer: {embedding_lr: 0.5}\n")
    text = dump_config(config, loadable=True)
    dumped = yaml.safe_load(text)
    assert dumped["optimizer"]["lr"] == dumped["training"]["tokens_per_step"] == "auto"
    assert dumped["optimizer"]["embedding_lr"] == 0.5
    shape = ModelConfig(n_embd=1024, n_head=16, block_size=8192)
    settled = config.settled_for(shape)
    assert settled.optimizer.lr == pytest.approx(recipe.MUON_LR * recipe.INIT_LR_RATIO)
    new = recipe.rates("muon", shape, from_init=False)
    ratio = settled.optimizer.adamw_lr / new["adamw_lr"]
    assert ratio == pytest.approx(recipe.INIT_LR_RATIO, rel=0.05)  # rounded to two digits
    assert settled.optimizer.embedding_lr == 0.5
    assert settled.training.tokens_per_step == 8192
    assert (
        yaml.safe_load(dump_config(settled, loadable=True))["optimizer"]["lr"]
        == settled.optimizer.lr
    )
    assert loaded(tmp_path, dump_config(settled, loadable=True)).optimizer == settled.optimizer


def test_a_model_given_later_settles_again(tmp_path: Path) -> None:
    """`gpt finetune --model` names the model only after the config is checked."""
    config = loaded(tmp_path, "training: {max_steps: 300}\n")
    named = config.model_copy(update={"init": "runs/x"})
    assert named.settled_for(ModelConfig()).optimizer.lr == pytest.approx(
        recipe.MUON_LR * recipe.INIT_LR_RATIO
    )
    assert config.optimizer.lr == recipe.MUON_LR


def test_a_checkpoint_keeps_its_numbers(tmp_path: Path) -> None:
    """A checkpoint's config with init has the whole shape beside it, and rates of its time."""
    config = Config(init="runs/x").settled_for(ModelConfig(n_embd=64, n_head=2))
    whole = Config.model_validate({**dict(config), "model": ModelConfig(n_embd=64, n_head=2)})
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(whole))
    assert load_resolved(path).optimizer == config.optimizer


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("lr=automatic", "expected a number or auto; got 'automatic'; did you mean 'auto'?"),
        ("lr=Auto", "expected a number or auto; got 'Auto'; did you mean 'auto'?"),
        ("lr=0", "must be above 0, got 0"),
        ("lr=null", "expected a number or auto; got nothing"),
        ("weight_decay=-1", "must be at least 0, got -1"),
    ],
)
def test_wrong_words(written: str, problem: str) -> None:
    """`automatic` must not be taken for a number, nor reported as a branch of a union."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"optimizer.{written}"])
    assert caught.value.problems == [f"--set optimizer.{written}: {problem}"]


def test_unknown_batch() -> None:
    with pytest.raises(ConfigError, match=r"expected a whole number or auto; got the number 1\.5"):
        load_config(None, ["training.tokens_per_step=1.5"])
