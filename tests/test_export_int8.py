"""`gpt export --quantize int8`: the checkpoint, what reads it, and what refuses it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcli import stop
from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, ConfigError
from gptcli.evaluate import evaluate
from gptcli.export import export
from gptcli.finetune import finetune
from gptcli.model.gpt import GPT, initialise
from gptcli.model.packed import is_quantized, quantize, weight_bytes
from gptcli.runs import checkpoint
from gptcli.runs.load import load_model
from gptcli.runs.manifest import write_manifest

CPU = torch.device("cpu")
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"preset": "gpt2"},
    "untied": {"preset": "modern", "tie_embeddings": False},
    "sinusoidal": {"preset": "gpt2", "position": "sinusoidal"},
}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """(shape) -> a run directory with one checkpoint of step 30."""

    def make(name: str = "gpt2") -> Path:
        model_config = ModelConfig.model_validate({**SHAPES[name], **SIZES})
        config = Config(name="tiny", model=model_config)
        tokenizer = Tokenizer.of_bytes()
        model = GPT(config.model, tokenizer.vocab_size + 3)
        initialise(model, torch.Generator().manual_seed(0))
        state = {"job": "pretrain", "train": {"step": 30}, "choices": {"precision": "fp32"}}
        contents = checkpoint.Contents(
            model.state_dict(), {}, state, dump_config(config), tokenizer
        )
        checkpoint.publish(tmp_path / "run", 30, contents)
        return tmp_path / "run"

    return make


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the weights of a checkpoint, and its manifest, as somebody who means it would."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").unlink()
    write_manifest(directory, manifest["step"], manifest["tied"], manifest["tokenizer"])


@pytest.mark.parametrize("name", SHAPES)
def test_same_as_quantized_here(run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Bug: the file holds other numbers than --quantize int8 makes, so the two differ in text."""
    source = run(name)
    result = export(str(source), tmp_path / "out", None, None, "int8")
    assert (result.to, result.dtype) == ("gpt", "int8")
    assert result.bytes == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.*"))
    checkpoint.verify(tmp_path / "out")
    here, there = load_model(str(source), CPU, quantize="int8"), load_model(str(result.path), CPU)
    tokens = torch.randint(256, (2, 16))
    with torch.no_grad():
        assert torch.equal(here.model(tokens), there.model(tokens))
    assert is_quantized(there.model)
    assert weight_bytes(there.model) == weight_bytes(here.model)
    assert (there.step, there.name) == (30, "tiny")
    assert there.state == {**(here.state or {}), "quantized": "int8"}
    assert there.tokenizer.identity == here.tokenizer.identity
    weights = result.path / "model.safetensors"
    original = source / "checkpoints" / "step-00000030" / "model.safetensors"
    assert weights.stat().st_size < 0.5 * original.stat().st_size
    again = load_model(str(result.path), CPU, quantize="int8")  # is so already
    with torch.no_grad():
        assert torch.equal(again.model(tokens), there.model(tokens))


def test_what_is_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    """Bug: int8 weights are trained, exported or rounded once more."""
    source = str(run())
    out = str(export(source, tmp_path / "out", "gpt", None, "int8").path)
    with pytest.raises(ConfigError, match="holds int8 weights, which no fp16"):
        load_model(out, CPU, quantize="fp16")
    for to, quantized in (("hf", None), (None, "int8")):
        with pytest.raises(CheckpointError, match="holds int8 weights already"):
            export(out, tmp_path / "more", to, None, quantized)
    (tmp_path / "a.txt").write_text("some text")
    settings = Config.model_validate({"eval": {"quantize": "int8"}})
    with pytest.raises(ConfigError, match="holds int8 weights already"):
        evaluate(settings, model=out, data=[str(tmp_path / "a.txt")])
    evaluate(Config(), model=out, data=[str(tmp_path / "a.txt")])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}", "response": "b"}}\n' for i in range(30)))
    tuning = {
        "data": {"train": str(rows)},
        "schedule": {"warmup_steps": 0},
        "training": {"max_steps": 1, "tokens_per_step": 128},
    }
    with pytest.raises(CheckpointError, match="int8, to generate and to score with, not to train"):
        finetune(Config.model_validate(tuning), model=out, run_dir=tmp_path / "tuned")


@pytest.mark.parametrize(
    ("to", "dtype", "quantized", "message"),
    [
        (None, None, None, "give --to hf, --to gguf, --to peft, --quantize int8 or --merge"),
        ("hf", None, "int8", "writes a checkpoint for gpt"),
        (None, "bf16", "int8", "writes a checkpoint for gpt"),
        (None, None, "fp16", "--quantize fp16: expected int8"),
        ("gpt", None, None, "--to gpt needs --quantize int8"),
    ],
)
def test_usage(
    to: str | None, dtype: str | None, quantized: str | None, message: str, tmp_path: Path
) -> None:
    """Bug: a wish that contradicts another is ignored."""
    with pytest.raises(ConfigError, match=message):
        export("none", tmp_path / "out", to, dtype, quantized)


def test_damaged_and_hostile_files(run: Callable[..., Path], tmp_path: Path) -> None:
    """Bug: a scale that is missing, misshapen or left over ends in a traceback or in noise."""
    good = export(str(run()), tmp_path / "good", None, None, "int8").path
    up = "blocks.1.mlp.up"

    def no_scale(tensors: dict[str, Any]) -> None:
        del tensors[f"{up}.scale"]

    def short_scale(tensors: dict[str, Any]) -> None:
        tensors[f"{up}.scale"] = tensors[f"{up}.scale"][:3].clone()

    def floats(tensors: dict[str, Any]) -> None:
        tensors[f"{up}.weight"] = tensors[f"{up}.weight"].float()

    def stray(tensors: dict[str, Any]) -> None:
        tensors["norm.scale"] = torch.ones(3)

    def int8_norm(tensors: dict[str, Any]) -> None:
        tensors["norm.weight"] = tensors["norm.weight"].to(torch.int8)

    cases = {
        no_scale: f"{up}.weight holds I8, not floats",
        short_scale: rf"wrong shape: {up}.scale \[3\]",
        floats: f"{up}.weight holds F32, not int8, but has scales",
        stray: "norm.weight holds F32, not int8, but has scales",
        int8_norm: "norm.weight holds I8, not floats",
    }
    for number, (change, message) in enumerate(cases.items()):
        bad = tmp_path / str(number)
        shutil.copytree(good, bad)
        edit(bad, change)
        with pytest.raises(CheckpointError, match=message):
            load_model(str(bad), CPU)
    content = bytearray((good / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (good / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(str(good), CPU)


def test_stopped_while_quantizing(run: Callable[..., Path]) -> None:
    """Bug: Ctrl-C waits until gigabytes are packed."""
    model = load_model(str(run()), CPU).model
    stop.request(2)
    with pytest.raises(stop.Stopped):
        quantize(model, "int8")


def test_command(run: Callable[..., Path], tmp_path: Path, gpt: Any) -> None:
    """Bug: the flag does not reach the job, or gpt generate cannot read what comes out."""
    out = str(tmp_path / "small")
    code, printed, err = gpt("export", "--model", str(run()), "--quantize", "int8", out)
    assert (code, printed) == (0, f"{out}\n")
    assert "int8" in err
    code, printed, _ = gpt("generate", "--model", out, "--prompt", "ab", "--max-new-tokens", "3")
    assert code == 0
    assert printed.startswith("ab")
    assert gpt("export", "--model", out, f"{out}2")[0] == 2
