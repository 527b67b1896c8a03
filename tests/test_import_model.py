"""Imports: published models in, checkpoints of our own out, that compute the same."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptcli import import_model as module
from gptcli import stop
from gptcli.config.schema import Config, GenerateConfig
from gptcli.errors import CheckpointError, ConfigError
from gptcli.evaluate import evaluate
from gptcli.generate import generate
from gptcli.import_model import import_model
from gptcli.interop.safetensors_file import write_tensors
from gptcli.runs import checkpoint
from gptcli.runs.load import load_model
from gptcli.runs.run_dir import has_checkpoint

sys.path.insert(0, str(Path(__file__).parent / "interop"))  # tests are no package

from published import TEXT, publish_folder, random_model

Run = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
TOKENS = torch.arange(24).view(2, 12) * 11

KINDS = {
    "llama": {"n_kv_head": 1},
    "modern": {"head_dim": 12},
    "gpt2": {},
    "gpt1": {},
    "gpt3-small": {"n_layer": 2, "window": [0, 8]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", KINDS)
def test_computes_as_its_source(tmp_path: Path, preset: str, dtype: torch.dtype) -> None:
    """Bug: an import that is rounded, mixed up or untied; logits are equal bit for bit."""
    model = random_model(preset, **KINDS[preset])
    source = publish_folder(tmp_path / "source", model, dtype, shards=2)
    result = import_model(str(source), tmp_path / "out")
    ours, theirs = load_model(str(tmp_path / "out"), CPU), load_model(str(source), CPU)
    with torch.no_grad():
        assert torch.equal(ours.model(TOKENS), theirs.model(TOKENS))
        if dtype == torch.float32:
            assert torch.allclose(ours.model(TOKENS), model(TOKENS), atol=1e-6)
    assert result.parameters == ours.model.parameter_count() == model.parameter_count()
    # The scores of a GPT-Neo are scaled through its weights, which half precision would round.
    kept = torch.float32 if preset == "gpt3-small" else dtype
    assert result.dtype == str(kept).removeprefix("torch.")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {kept}
    assert ("head.weight" in stored) != model.config.tie_embeddings
    assert result.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_the_checkpoint_stands_alone(tmp_path: Path) -> None:
    """Bug: an import that needs its source, or is not what every other command reads."""
    source = publish_folder(tmp_path / "My Model!", random_model())
    import_model(str(source), tmp_path / "deep" / "out")
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    scored = evaluate(Config(), model=str(source), data=[str(text)]).scores.loss
    shutil.rmtree(source)
    out = (tmp_path / "deep" / "out").rename(tmp_path / "moved")
    loaded = load_model(str(out), CPU)
    assert (loaded.name, loaded.step, loaded.run_dir) == ("My-Model-", 0, None)
    expected = {"job": "import", "step": 0, "source": str(source), "commit": None}
    assert loaded.state == {**expected, "family": "llama"}
    checkpoint.verify(out)
    assert checkpoint.read(out, with_optimizer=True).optimizer == {}
    assert evaluate(Config(), model=str(out), data=[str(text)]).scores.loss == scored
    [[made]] = generate(loaded, GenerateConfig(prompt="low", max_new_tokens=4, seed=1))
    assert len(made.tokens) == 4
    assert {p.name for p in out.iterdir()} == {
        *("config.yaml", "manifest.json", "model.safetensors"),
        *("optimizer.safetensors", "state.json", "tokenizer"),
    }
    mode = (out / "state.json").stat().st_mode
    assert (out / "model.safetensors").stat().st_mode == mode


def test_what_is_refused(tmp_path: Path) -> None:
    """Bug: an import that overwrites, or copies what is a checkpoint already."""
    source = str(publish_folder(tmp_path / "source", random_model()))
    out = tmp_path / "out"
    out.mkdir()
    import_model(source, out)  # an empty directory is as good as none
    with pytest.raises(ConfigError, match="exists already"):
        import_model(source, out)
    with pytest.raises(ConfigError, match="is a checkpoint of gpt's own") as caught:
        import_model(str(out), tmp_path / "again")
    assert caught.value.hint == f"use it as it is: gpt generate --model {out}"
    with pytest.raises(CheckpointError, match="no run, checkpoint or folder at"):
        import_model(str(tmp_path / "nothing"), tmp_path / "again")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="so there can be no"):
        import_model(source, tmp_path / "file" / "out")
    weights = load_file(Path(source) / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, Path(source) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight holds numbers that are not finite"):
        import_model(source, tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out", "source"]


def test_pickles_only_when_asked(tmp_path: Path) -> None:
    """Bug: a pickle that is read without being asked for, or a flag that reads none."""
    model = random_model()
    source = publish_folder(tmp_path / "source", model)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        import_model(str(source), tmp_path / "out")
    assert "--allow-pickle" in f"{caught.value.message} {caught.value.hint}"
    import_model(str(source), tmp_path / "out", allow_pickle=True)
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path / "out"), CPU).model(TOKENS), model(TOKENS))


def test_a_stop_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: Ctrl-C in the middle leaves half a checkpoint, or goes unheard."""
    source = publish_folder(tmp_path / "source", random_model())
    written = []

    def stopping(path: Path, shapes: object, dtype: torch.dtype, tensors: object) -> int:
        def some():  # the signal comes after the third tensor
            for number, item in enumerate(tensors):
                if number == 3:
                    stop.request(2)
                written.append(item[0])
                yield item

        return write_tensors(path, shapes, dtype, some())

    monkeypatch.setattr(module, "write_tensors", stopping)
    with pytest.raises(stop.Stopped):
        import_model(str(source), tmp_path / "out")
    assert len(written) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_command(tmp_path: Path, gpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: scripts cannot take the path from stdout, or people do not learn what came in."""
    monkeypatch.chdir(tmp_path)
    publish_folder(tmp_path / "source", random_model(), torch.bfloat16)
    code, out, err = gpt("import", "source", "out")
    assert (code, out) == (0, "out\n")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size / 1e6
    count = load_model("out", CPU).model.parameter_count()
    facts = f"llama, {count:,} parameters in bfloat16, tokenizer file of 300 tokens, {size:,.1f} MB"
    assert f"imported source: {facts}" in err
    text = ("--prompt", "low", "--temperature", "0", "--max-new-tokens", "5")
    made = [gpt("generate", "--model", model, *text)[:2] for model in ("source", "out")]
    assert made[0] == made[1]
    assert made[0][1].startswith("low")
    for model in ("source", "out"):
        code, _, err = gpt("eval", "--model", model)
        assert code == 4
        assert "has no validation part of its own" in err
        assert f"hint: name a text: gpt eval --model {model} --data FILE" in err
    assert gpt("import", "source", "out")[0] == 2
    (tmp_path / "empty").mkdir()
    for here in (tmp_path, tmp_path / "empty"):
        monkeypatch.chdir(here)
        code, _, err = gpt("import", str(tmp_path / "source"), ".")
        assert code == 2
        assert "error: . exists already" in err
    monkeypatch.chdir(tmp_path)
    assert gpt("runs", "list")[0] == 0
    assert not has_checkpoint(tmp_path)


def test_hostile_folders(tmp_path: Path, gpt: Run) -> None:
    """Bug: a folder that lies about its sizes takes the memory, or ends in a traceback."""
    source = publish_folder(tmp_path / "source", random_model())
    config = json.loads((source / "config.json").read_text())
    good = load_file(source / "model.safetensors")

    def said(*arguments: str, **keys: object) -> str:
        (source / "config.json").write_text(json.dumps({**config, **keys}))
        begun = time.monotonic()
        code, out, err = gpt(*(arguments or ("generate", "--model", str(source), "--prompt", "a")))
        assert (code, out) == (4, "")
        assert time.monotonic() - begun < 5.0
        return err

    assert "1000000000" in said(num_hidden_layers=10**9)
    assert "1000000000" in said("import", str(source), str(tmp_path / "o"), num_hidden_layers=10**9)
    assert "are too many" in said(max_position_embeddings=2**31 - 1)
    assert "max_position_embeddings" in said(max_position_embeddings=10**12)
    said(vocab_size=10**15)
    said(hidden_size=10**15, head_dim=10**15)
    changed = {k: v for k, v in good.items() if k != "model.norm.weight"}
    save_file({**changed, "surplus": torch.ones(1)}, source / "model.safetensors")
    err = said()
    assert "missing: model.norm.weight" in err
    assert "unexpected: surplus" in err
    (source / "model.safetensors").unlink()
    torch.save(good, source / "pytorch_model.bin")
    assert "--allow-pickle" in said()
    assert "pickle" in said(
        "generate", "--model", str(source / "pytorch_model.bin"), "--prompt", "a"
    )


def test_streamed_files_are_as_the_library_writes_them(tmp_path: Path) -> None:
    """Bug: a header that other programs read otherwise."""
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7), "none": torch.empty(0, 4)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        size = write_tensors(tmp_path / "x", shapes, dtype, reversed(tensors.items()))
        assert size == (tmp_path / "x").stat().st_size
        back = load_file(tmp_path / "x")
        assert all(torch.equal(back[name], tensors[name].to(dtype)) for name in tensors)
        with safe_open(tmp_path / "x", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    for wrong in ({"a": torch.ones(7)}, {**tensors, "c": torch.ones(1)}, {"a": torch.ones(8)}):
        with pytest.raises(ValueError, match=r"has not come|not in the header"):
            write_tensors(tmp_path / "x", shapes, torch.float32, wrong.items())


def test_memory_of_an_import(tmp_path: Path) -> None:
    """Bug: an import that holds the whole model: memory grows by one tensor, not by all."""
    model = random_model(n_layer=16, n_embd=192)  # 28 MB
    source = publish_folder(tmp_path / "source", model)
    size = (source / "model.safetensors").stat().st_size
    del model
    code = """
import sys
from pathlib import Path
from gptcli.import_model import import_model
def used():
    text = Path("/proc/self/smaps_rollup").read_text()
    kinds = ("Anonymous", "Swap")
    return 1024 * sum(int(l.split()[1]) for l in text.splitlines() if l.split(":")[0] in kinds)
import gptcli.import_model as module
real, most = module.write_tensors, []
def watched(path, shapes, dtype, tensors):
    before = used()
    def seen():
        for item in tensors:
            most.append(used() - before)
            yield item
    return real(path, shapes, dtype, seen())
module.write_tensors = watched
import_model(sys.argv[1], Path(sys.argv[2]))
print(max(most))
"""
    if not os.path.exists("/proc/self/smaps_rollup"):
        pytest.skip("Linux only")
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < size / 4


@pytest.mark.parametrize("source", ["", "model.gguf"])
def test_what_cannot_be_imported(source: str, tmp_path: Path) -> None:
    """An empty SOURCE was read as the folder at hand, and GGUF got a hint about checkpoints."""
    with pytest.raises(ConfigError, match="no Hugging Face folder and no name on the hub"):
        import_model(source, tmp_path / "out")
