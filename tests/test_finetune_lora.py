"""Runs that train adapters: what they save, how they go on, what they become."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopping import stopping_at

from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, ConfigError
from gptcli.export import export
from gptcli.finetune import finetune
from gptcli.model.gpt import GPT, initialise
from gptcli.model.lora import adapter_tensors, has_lora
from gptcli.runs import checkpoint
from gptcli.runs.checkpoint import Contents
from gptcli.runs.load import load_model
from gptcli.training.state import TrainState

CPU = torch.device("cpu")
TOKENS = torch.arange(20)[None] + 97
Changes = dict[str, Any]


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their plots take a second, and nobody looks at them."""
    monkeypatch.setattr("gptcli.finetune.write_report", lambda run_dir: None)


def published(folder: Path, **shape: Any) -> Path:
    """A base model as a checkpoint."""
    keys = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, **shape}
    config = Config(model=ModelConfig.model_validate(keys))
    model = GPT(config.model, 257)
    initialise(model, torch.Generator().manual_seed(1))
    with torch.no_grad():  # zero output projections would hide errors
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            parameter.add_(noise * 0.05)
    state: dict[str, Any] = {"train": TrainState().to_json(), "job": "import"}
    contents = Contents(model.state_dict(), {}, state, dump_config(config), Tokenizer.of_bytes())
    return checkpoint.publish(folder / "base", 0, contents)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Config]:
    """A config of a run with adapters on `base`, a few of its keys changed."""
    path = tmp_path / "rows.jsonl"
    animals = ["cat meow", "dog woof", "cow moo", "duck quack"]
    rows = [{"id": i, "q": animals[i % 4][:3], "a": animals[i % 4]} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(base: Path, *, lora: Changes | None = None, **changes: Changes) -> Config:
        values: dict[str, Any] = {
            "name": "tuned",
            "init": str(base),
            "data": {"train": str(path), "val_fraction": 0.2, "shuffle_window": 7},
            "model": {"dropout": 0.1},
            "finetune": {
                "fields": {"prompt": "q", "response": "a"},
                "template": "{{ prompt }} {{ id }}:",
                "method": "lora",
                "lora": {"rank": 2, **(lora or {})},
                "max_new_tokens": 4,
                "score_rows": 4,
            },
            "optimizer": {"kind": "adamw", "lr": 0.01},
            "schedule": {"kind": "linear", "warmup_steps": 1},
            "training": {
                "max_steps": 8,
                "tokens_per_step": 64,
                "precision": "fp32",
                "log_every": 1,
                "eval_every": 4,
                "save_every": 3,
            },
            "samples": {"prompts": []},
        }
        for section, keys in changes.items():
            values[section] = {**values.get(section, {}), **keys}
        return Config.model_validate(values)

    return make


def last_file(run_dir: Path, name: str = "model.safetensors") -> Path:
    return checkpoint.list_checkpoints(run_dir)[-1] / name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_stopped_and_resumed(
    tmp_path: Path, settings: Callable[..., Config], kind: str, quantize: str | None
) -> None:
    """Guards: a resumed run whose adapters, moments or dropout are not those of a run that was
    never stopped, bit for bit."""
    base = published(tmp_path)
    config = settings(base, lora={"dropout": 0.1, "quantize": quantize}, optimizer={"kind": kind})
    finetune(config, run_dir=tmp_path / "whole")
    with stopping_at("step 5"):
        assert finetune(config, run_dir=tmp_path / "parts").status == "stopped"
    assert finetune(config, run_dir=tmp_path / "parts", resume="resume").status == "finished"
    for name in ("model.safetensors", "optimizer.safetensors", "adapter.json"):
        whole, parts = (last_file(tmp_path / run, name).read_bytes() for run in ("whole", "parts"))
        assert whole == parts


def test_what_is_saved(tmp_path: Path, settings: Callable[..., Config]) -> None:
    """Guards: checkpoints with the base in them, adapters that do not learn, a loaded model that is
    not the one that was trained, a base that changes."""
    base = published(tmp_path)
    before = (base / "model.safetensors").read_bytes()
    finetune(settings(base), run_dir=tmp_path / "run")
    saved = load_file(last_file(tmp_path / "run"))
    apart = load_model(str(tmp_path / "run"), CPU, merge=False)
    assert set(saved) == set(adapter_tensors(apart.model))
    assert all(tensor.any() for tensor in saved.values())
    merged = load_model(str(tmp_path / "run"), CPU)
    assert has_lora(apart.model)
    assert not has_lora(merged.model)
    with torch.no_grad():
        torch.testing.assert_close(merged.model(TOKENS), apart.model(TOKENS), rtol=0, atol=1e-5)
        assert not torch.equal(merged.model(TOKENS), load_model(str(base), CPU).model(TOKENS))
    about = json.loads(last_file(tmp_path / "run", "adapter.json").read_text())
    assert about["base"] == str(base)
    assert (base / "model.safetensors").read_bytes() == before


def test_exported(tmp_path: Path, settings: Callable[..., Config]) -> None:
    """Guards: a merged model that still needs its base, or has other weights than the run's."""
    base = published(tmp_path)
    finetune(settings(base), run_dir=tmp_path / "run")
    run = load_model(str(tmp_path / "run"), CPU)
    export(str(tmp_path / "run"), tmp_path / "merged", None, None, merge=True)
    export(str(tmp_path / "run"), tmp_path / "hf", "hf", None)
    export(str(tmp_path / "run"), tmp_path / "int8", None, None, "int8")
    shutil.rmtree(base)
    wanted = run.model(TOKENS)
    for name in ("merged", "hf"):
        assert torch.equal(load_model(str(tmp_path / name), CPU).model(TOKENS), wanted)
    small = load_model(str(tmp_path / "int8"), CPU).model(TOKENS)
    assert (small - wanted).abs().max() < 0.1 * wanted.abs().max()
    with pytest.raises(ConfigError, match="has no adapter"):
        export(str(tmp_path / "merged"), tmp_path / "again", None, None, merge=True)


def test_base_changed_or_gone(tmp_path: Path, settings: Callable[..., Config]) -> None:
    """Guards: an adapter that is put on other weights than its own, without a word."""
    base = published(tmp_path)
    config = settings(base, training={"max_steps": 2})
    finetune(config, run_dir=tmp_path / "run")
    base.rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match="its base is gone") as gone:
        load_model(str(tmp_path / "run"), CPU)
    assert str(base) in str(gone.value.hint)
    published(tmp_path, n_layer=3)
    with pytest.raises(CheckpointError, match="its base has changed"):
        load_model(str(tmp_path / "run"), CPU)
    shutil.rmtree(base)
    (tmp_path / "aside").rename(base)
    assert load_model(str(tmp_path / "run"), CPU).adapter is not None


def test_adapter_on_an_adapter(tmp_path: Path, settings: Callable[..., Config]) -> None:
    """Guards: a second finetuning that starts from the base, not from the first."""
    base = published(tmp_path)
    finetune(settings(base, training={"max_steps": 3}), run_dir=tmp_path / "one")
    second = settings(tmp_path / "one", training={"max_steps": 3}, optimizer={"lr": 1e-9})
    finetune(second, run_dir=tmp_path / "two")
    with torch.no_grad():
        one, two = (load_model(str(tmp_path / n), CPU).model(TOKENS) for n in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_other_adapters_at_resume(tmp_path: Path, settings: Callable[..., Config]) -> None:
    """Guards: a resume that quietly goes on with another method or other adapters than it has."""
    base = published(tmp_path)
    finetune(settings(base, training={"max_steps": 2}), run_dir=tmp_path / "run")
    longer = settings(base, lora={"rank": 3}, training={"max_steps": 4})
    with pytest.raises(CheckpointError, match=r"finetune\.lora"):
        finetune(longer, run_dir=tmp_path / "run", resume="resume")


@pytest.mark.parametrize("damage", ["base", "lora", "tensors"])
def test_bad_adapter(tmp_path: Path, settings: Callable[..., Config], damage: str) -> None:
    """Guards: a traceback, or a model with half an adapter, for files that somebody edited."""
    base = published(tmp_path)
    finetune(settings(base, training={"max_steps": 2}), run_dir=tmp_path / "run")
    contents = checkpoint.read(
        checkpoint.list_checkpoints(tmp_path / "run")[-1], with_optimizer=False
    )
    assert contents.adapter is not None
    if damage == "base":
        contents.adapter["base"] = 3
    elif damage == "lora":
        contents.adapter["lora"]["rank"] = "many"
    else:
        contents.model.popitem()
    path = checkpoint.publish(tmp_path / "bad", 1, contents)
    with pytest.raises(CheckpointError, match=r"names no base|no valid lora|does not fit"):
        load_model(str(path), CPU)
