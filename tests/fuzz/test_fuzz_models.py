"""Any mutation of an adapter, of its base, and of an int8 export, as models to generate with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from guard import Gpt, came_to, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st
from mutations import mutations

from gptcli.runs import checkpoint

TUNED = """\
name: tuned
init: base
data: {train: rows.jsonl, val_fraction: 0.2}
finetune: {fields: {prompt: q, response: a}, template: "{{ prompt }}:", method: lora,
           lora: {rank: 2}, max_new_tokens: 2, score_rows: 2}
training: {max_steps: 2, tokens_per_step: 64, log_every: 1, eval_every: 100, save_every: 100,
           micro_batch_size: 2, precision: fp32, compile: off, device: cpu}
schedule: {warmup_steps: 0}
samples: {n: 1, max_new_tokens: 2}
"""
FILES = ["model.safetensors"] * 3 + ["manifest.json", "config.yaml", "state.json", "tokenizer/*"]


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Path]:
    """An adapter on `base`, and int8 weights."""
    from gptcli.cli.main import main

    rows = ({"q": f"day {i}", "a": str(i * i)} for i in range(40))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tuned.yaml").write_text(TUNED)
    assert main(["pretrain", "tiny.yaml", "--run-dir=r", "--quiet"]) == 0
    shutil.copytree(checkpoint.list_checkpoints(folder / "r")[-1], folder / "base")
    assert main(["finetune", "tuned.yaml", "--run-dir=t", "--quiet"]) == 0
    shutil.copytree(checkpoint.list_checkpoints(folder / "t")[-1], folder / "adapter")
    assert main(["export", "int8", "--model=base", "--quantize=int8", "--quiet"]) == 0
    assert (folder / "adapter" / "adapter.json").is_file()
    return {name: folder / name for name in ("adapter", "int8")}


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, Callable[[Path], None]]:
    """Which of the models, and what to do to it."""
    name = draw(st.sampled_from(["adapter", "int8"]))
    own = ["adapter.json"] * 2 if name == "adapter" else []
    return name, draw(mutations([*FILES, *own]))


@fuzzed
@given(change=changes())
def test_models(
    change: tuple[str, Callable[[Path], None]], models: dict[str, Path], gpt: Gpt, folder: Path
) -> None:
    """A model is loaded, or what is wrong with it is named."""
    name, mutate = change
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(models[name], copy)
    mutate(copy)
    with case("models"):
        given = ["generate", "--model=copy", "--prompt=day", "--max-new-tokens=2"]
        code, _, _ = well(gpt, given, {0, 4, 5, 6})
        came_to("models", "refused" if code else "loaded")
