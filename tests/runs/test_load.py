"""MODEL to model: what is found, what is refused, and that it computes what was trained."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sealing import reseal

from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.errors import CheckpointError
from gptcli.interop.hf_export import write_hf
from gptcli.model.empty import empty_model, parameter_shapes
from gptcli.model.gpt import GPT, Block
from gptcli.runs import manifest
from gptcli.runs.checkpoint import Contents, checkpoint_dir, publish, write_best
from gptcli.runs.load import load_model, load_weights
from gptcli.runs.run_dir import new_run_dir

Make = Callable[..., Contents]
CPU = torch.device("cpu")
TOKENS = torch.arange(12).view(1, 12) * 7

SHAPES: dict[str, dict[str, Any]] = {
    "modern": {},
    "gpt2": {
        "position": "learned",
        "norm": "layernorm",
        "bias": True,
        "gated": False,
        "qk_norm": False,
        "tie_embeddings": True,
    },
    "textbook": {"position": "sinusoidal", "norm_position": "post", "activation": "relu"},
}


def run_with(root: Path, *saved: tuple[int, Contents]) -> Path:
    run_dir = new_run_dir("tiny", root, overwrite=False)
    for step, contents in saved:
        publish(run_dir, step, contents)
    return run_dir


def trained(contents: Contents) -> GPT:
    config = Config.model_validate(yaml.safe_load(contents.config_yaml))
    model = GPT(config.model, contents.tokenizer.vocab_size).eval()
    model.load_state_dict(contents.model)
    return model


def refused(reference: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(str(reference), CPU)
    assert caught.value.exit_code == 4
    return f"{caught.value.message} | {caught.value.hint}"


@pytest.mark.parametrize("shape", SHAPES)
def test_computes_what_was_trained(tmp_path: Path, make_contents: Make, shape: str) -> None:
    """Guards against position tables left on the meta device and tied weights come apart."""
    contents = make_contents(**SHAPES[shape])
    original = trained(contents)
    loaded = load_model(str(publish(tmp_path, 3, contents)), CPU)
    assert torch.equal(loaded.model(TOKENS), original(TOKENS))
    assert loaded.model.parameter_count() == original.parameter_count()
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.step, loaded.name, loaded.tokenizer.vocab_size) == (3, "tiny", 257)
    assert loaded.manifest["step"] == 3
    low = load_model(str(loaded.path), CPU, dtype=torch.bfloat16).model
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert (low(TOKENS).float() - original(TOKENS)).abs().max() < 0.2
    if shape == "modern":
        assert torch.equal(low.positions, original.positions)  # rotary angles need their fp32


def test_what_model_means(
    tmp_path: Path, make_contents: Make, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """Guards the order best, newest valid, and the default of the newest run."""
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "runs"))
    with pytest.raises(CheckpointError, match="no run with a checkpoint under") as caught:
        load_model(None, CPU)
    assert caught.value.hint == "make one: gpt pretrain configs/small.yaml"
    run_dir = run_with(tmp_path / "runs/one", (1, make_contents(1)), (2, make_contents(2)))
    assert load_model(str(run_dir), CPU).path == checkpoint_dir(run_dir, 2)
    write_best(run_dir, 1, 0.5)
    assert load_model(None, CPU).path == checkpoint_dir(run_dir, 1)
    assert load_model(str(checkpoint_dir(run_dir, 2)), CPU).path == checkpoint_dir(run_dir, 2)
    loaded = load_model(None, CPU)
    assert (loaded.run_dir, loaded.step) == (run_dir, 1)
    assert loaded.state == {"seed": 1, "tokens": 2**60 + 1, "loss": 0.1}
    assert warnings == []
    flip_last_bit(checkpoint_dir(run_dir, 1) / "model.safetensors")
    assert load_model(None, CPU).path == checkpoint_dir(run_dir, 2)
    assert "best checkpoint cannot be used" in warnings.pop()
    os.truncate(checkpoint_dir(run_dir, 1) / "model.safetensors", 50)
    assert load_model(None, CPU).path == checkpoint_dir(run_dir, 2)
    assert "best checkpoint cannot be used" in warnings[0]
    os.truncate(checkpoint_dir(run_dir, 2) / "model.safetensors", 50)
    assert "has no valid checkpoint" in refused(run_dir)
    assert "model.safetensors has 50 bytes" in refused(checkpoint_dir(run_dir, 2))


def test_weights_are_hashed_once(
    tmp_path: Path, make_contents: Make, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """Guards against reading gigabytes twice: a run without a best checkpoint, and one whose newest
    is damaged, which is found out only while its weights are read."""
    run_dir = run_with(tmp_path / "run", *((step, make_contents(step)) for step in (1, 2, 3)))
    hashed, real = [], manifest.sha256_of

    def watched(path: Path, **keys: Any) -> str:
        hashed.append(path.relative_to(run_dir / "checkpoints").as_posix())
        return real(path, **keys)

    monkeypatch.setattr(manifest, "sha256_of", watched)
    assert load_model(str(run_dir), CPU).step == 3
    assert [name for name in hashed if "model." in name] == ["step-00000003/model.safetensors"]
    assert not any("optimizer" in name for name in hashed)
    flip_last_bit(checkpoint_dir(run_dir, 3) / "model.safetensors")
    (checkpoint_dir(run_dir, 2) / "state.json").write_text("{}")
    hashed.clear()
    assert load_model(str(run_dir), CPU).step == 1
    names = [f"step-0000000{step}/model.safetensors" for step in (3, 1)]
    assert [name for name in hashed if "model." in name] == names
    assert "model.safetensors is damaged" in warnings[0]
    assert "state.json has 2 bytes" in warnings[1]
    assert "using step 1 instead" in warnings[1]


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", ["weights", "header"])
def test_damaged_weights(tmp_path: Path, make_contents: Make, place: str) -> None:
    """Guards against a model of weights that are not those that were saved: they are hashed while
    they are read, and damage is named as such, whatever it breaks."""
    path = publish(tmp_path, 1, make_contents())
    weights = path / "model.safetensors"
    if place == "weights":
        flip_last_bit(weights)
    else:
        weights.write_bytes(weights.read_bytes().replace(b"norm1.weight", b"norm9.weight", 1))
    assert "model.safetensors is damaged (its sha256 differs)" in refused(path)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_fp32(tmp_path: Path, make_contents: Make, stored: torch.dtype) -> None:
    """Guards against a model that computes in the dtype in which somebody stored it."""
    contents = make_contents(tie_embeddings=True)
    path = publish(tmp_path, 1, contents)
    tensors = {k: v.to(stored) for k, v in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors")
    reseal(path)
    model = load_model(str(path), CPU).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.head.weight is model.wte.weight
    assert torch.equal(model.norm.weight, tensors["norm.weight"].float())
    as_stored = load_model(str(path), CPU, dtype=stored).model
    assert {p.dtype for p in as_stored.parameters()} == {stored}


def test_moved_run_and_lone_checkpoint(
    tmp_path: Path, make_contents: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against paths inside a run: it moves between machines, and checkpoints are sent."""
    run_dir = run_with(tmp_path / "here", (1, make_contents()))
    moved = run_dir.rename(tmp_path / "there")
    assert load_model(str(moved), CPU).run_dir == moved
    lone = Path(shutil.copytree(checkpoint_dir(moved, 1), tmp_path / "model"))
    loaded = load_model(str(lone), CPU)
    assert (loaded.path, loaded.run_dir, loaded.step) == (lone, None, 1)
    monkeypatch.chdir(checkpoint_dir(moved, 1))
    assert load_model(".", CPU).run_dir == moved


def test_optimizer_is_not_needed_to_generate(tmp_path: Path, make_contents: Make) -> None:
    """Guards against hashing (or refusing for) gigabytes that generation never reads."""
    path = publish(tmp_path, 1, make_contents())
    flip_last_bit(path / "optimizer.safetensors")
    assert load_model(str(path), CPU).step == 1


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_references_that_are_no_model(
    tmp_path: Path, make_contents: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against running code from a pickle, and against errors that leave users at a loss."""
    monkeypatch.setenv("GPT_RUNS", str(tmp_path))
    for name in ("evil.pt", "evil.bin", "evil.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
        assert "pickle" in refused(tmp_path / name)
    assert not (tmp_path / "canary").exists()
    folder = tmp_path / "published"
    folder.mkdir()
    assert "nor a Hugging Face folder (no config.json)" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    assert "then gpt import FOLDER OUT --allow-pickle" in refused(folder)
    (folder / "config.json").write_text("{}")
    assert f"gpt import {folder} OUT --allow-pickle" in refused(folder / "pytorch_model.bin")
    assert "no run, checkpoint or folder at nothing" in refused("nothing")
    assert not (tmp_path / "canary").exists()
    run_dir = run_with(tmp_path / "mine", (1, make_contents()))
    assert f"did you mean {run_dir}? (the hub's model of that name: mine@main)" in refused("mine")
    weights = checkpoint_dir(run_dir, 1) / "model.safetensors"
    assert f"did you mean {weights.parent}?" in refused(weights)
    (weights.parent / "manifest.json").unlink()
    assert "no manifest.json" in refused(weights.parent)


def test_tensors_that_do_not_fit(tmp_path: Path, make_contents: Make) -> None:
    """Guards against half loaded models: every key is listed, nothing is loaded loosely."""
    path = publish(tmp_path, 1, make_contents())
    good = load_file(path / "model.safetensors")

    def with_tensors(**changes: Any) -> str:
        tensors = {**good, **changes}
        save_file({n: t for n, t in tensors.items() if t is not None}, path / "model.safetensors")
        reseal(path)
        return refused(path)

    short = torch.ones(9, 16)
    message = with_tensors(**{"norm.weight": None, "extra": torch.ones(1), "head.weight": short})
    assert "missing: norm.weight" in message
    assert "unexpected: extra" in message
    assert "wrong shape: head.weight [9, 16] instead of [257, 16]" in message
    assert "I64, not floats" in with_tensors(**{"norm.weight": torch.ones(16, dtype=torch.int64)})
    few = {"wte.weight": torch.ones(100, 16), "head.weight": torch.ones(100, 16)}
    assert "tokenizer has 257 tokens" in with_tensors(**few)
    (path / "model.safetensors").write_bytes(b"\xff" * 100)
    reseal(path)
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_layer: 2", "n_layer: 1000000000", "n_layer 1000000000"),
        ("n_embd: 16", "n_embd: 1600000000", "n_embd 1600000000"),
        ("n_inner: null", f"n_inner: {10**18}", "no model has these sizes"),
        ("block_size: 16", "block_size: 1000000000000", "is not a multiple of"),
        ("rope_theta: 10000.0", "rope_theta: .inf", "model.rope_theta"),
        ("n_layer: 2", "n_layer: two", "model.n_layer"),
        ("n_layer: 2", "n_layers: 2", "unknown key 'n_layers'"),
        ("n_layer: 2", "n_layer: !!python/object/apply:os.abort []", "config.yaml"),
    ],
)
def test_hostile_config(
    tmp_path: Path,
    make_contents: Make,
    old: str,
    new: str,
    message: str,
) -> None:
    """Guards memory and code against a config that does not describe the weights beside it."""
    path = publish(tmp_path, 1, make_contents())
    text = (path / "config.yaml").read_text()
    assert old in text
    (path / "config.yaml").write_text(text.replace(old, new, 1))
    reseal(path)
    assert message in refused(path)


def test_position_table_is_bounded(tmp_path: Path, make_contents: Make) -> None:
    """Guards memory: block_size is the one size of a rotary model that no weight confirms."""
    path = publish(tmp_path, 1, make_contents())
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["model"]["block_size"] = config["training"]["tokens_per_step"] = 10**12
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    reseal(path)
    assert "block_size 1000000000000 is too large" in refused(path)


def test_a_model_is_built_only_when_it_fits(
    tmp_path: Path, make_contents: Make, monkeypatch: Any
) -> None:
    """Guards time and memory: a header of a few bytes a layer asks for any number of them."""
    path = publish(tmp_path, 1, make_contents())
    layers = {f"blocks.{layer}.x": torch.empty(0) for layer in range(3000)}
    save_file({"wte.weight": torch.ones(257, 16), **layers}, path / "model.safetensors")
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("n_layer: 2", "n_layer: 3000", 1))
    reseal(path)
    built, real = [], Block.__init__

    def watched(self: Block, config: ModelConfig) -> None:
        built.append(config)
        real(self, config)

    monkeypatch.setattr(Block, "__init__", watched)
    message = refused(path)
    assert "does not fit the model; missing: norm.weight" in message
    assert "unexpected: blocks.0.x" in message
    assert len(built) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_shapes_are_those_of_the_model(shape: str) -> None:
    """Guards the check of a file against a list of tensors that no model has."""
    keys = {"n_layer": 3, "n_head": 2, "n_embd": 8, "block_size": 8, "window": [0, 4]}
    config = ModelConfig.model_validate({**keys, **SHAPES[shape]})
    state = GPT(config, 10).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert parameter_shapes(config, 10) == expected


ONE_COPY = """
import sys
import torch
from gptcli.runs import load
from gptcli.data import tokenizer
import tokenizers

def used():
    text = open("/proc/self/smaps_rollup").read()
    kinds = ("Anonymous", "Swap")
    return 1024 * sum(int(l.split()[1]) for l in text.splitlines() if l.split(":")[0] in kinds)

real, most = load.load_weights, []
def watched(*arguments):
    most.append(used() - before)
    real(*arguments)
    most.append(used() - before)  # the arguments are still there
load.load_weights = watched
before = used()
loaded = load.load_model(sys.argv[1], torch.device("cpu"))
print(max(most), loaded.model.parameter_count() * 4)
"""


@pytest.mark.parametrize("kind", ["own", "own in bf16", "folder"])
def test_memory_holds_the_weights_once(tmp_path: Path, make_contents: Make, kind: str) -> None:
    """Guards against a second copy: of the file, of the weights drawn, or of those stored in less.

    A model that fills the memory would not load."""
    if not os.path.exists("/proc/self/smaps_rollup"):
        pytest.skip("Linux only")
    contents = make_contents(n_layer=16, n_embd=192, qk_norm=False)  # 30 MB
    path = publish(tmp_path, 1, replace(contents, optimizer={}))
    if kind == "own in bf16":
        tensors = {k: v.bfloat16() for k, v in load_file(path / "model.safetensors").items()}
        save_file(tensors, path / "model.safetensors")
        reseal(path)
    elif kind == "folder":
        model, folder = trained(contents), tmp_path / "folder"
        folder.mkdir()
        write_hf(model, contents.tokenizer, folder, torch.float32)
        path = folder
    command = [sys.executable, "-c", ONE_COPY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    most, size = map(int, done.stdout.split())
    assert size > 25e6
    assert most < 1.4 * size


def test_load_weights_into_a_live_model(make_contents: Make) -> None:
    """Guards a resume: the parameters the optimizer holds must stay the same objects."""
    contents = make_contents(3, tie_embeddings=True)
    model = trained(make_contents(4, tie_embeddings=True))
    before = list(model.parameters())
    load_weights(model, contents.model, "here")
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(model(TOKENS), trained(contents)(TOKENS))
    apart = {**contents.model, "head.weight": contents.model["head.weight"] + 1}
    with pytest.raises(CheckpointError, match="tied"):
        load_weights(model, apart, "here")


def test_an_empty_model_has_no_position_table() -> None:
    """Guards against a table (here of 1 TB) that is computed only to be thrown away."""
    for position in ("rope", "sinusoidal"):
        keys = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 2**36, "position": position}
        assert empty_model(ModelConfig.model_validate(keys), 10).positions.numel() == 0


def test_reset_positions_matches_the_constructor() -> None:
    """Guards the one table that no checkpoint stores."""
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8)
    model = GPT(config, 10)
    table = model.positions.clone()
    model.positions.zero_()
    model.reset_positions()
    assert torch.equal(model.positions, table)
    assert "positions" not in model.state_dict()
