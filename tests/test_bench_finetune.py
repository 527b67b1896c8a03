"""scripts/bench_finetune.py: its verdicts, and one run of tiny contenders."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gptcli.config.model_schema import ModelConfig
from gptcli.data.tokenizer import Tokenizer
from gptcli.interop.hf_export import write_hf
from gptcli.model.gpt import GPT, initialise

GIB = 2**30


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("bench_finetune")


def test_verdicts(bench: ModuleType) -> None:
    """Guards: a target that holds or not by the wrong way round, or by other rounds' figures."""
    rates = {bench.LORA: [13.0, 26.0], bench.FULL: [9.0, 20.0], bench.PEFT: [10.0, 20.0]}
    peaks = {bench.LORA: GIB, bench.FULL: 2 * GIB, bench.PEFT: 3 * GIB}
    speed, memory, share = bench.verdicts(rates, peaks)
    assert speed.endswith("peft: holds (1.30).")
    assert memory.endswith("holds.")
    assert share.endswith("finetuning: does not hold (0.50).")
    assert "| 1.00 GiB |" in bench.results(rates, peaks)
    del rates[bench.PEFT], peaks[bench.PEFT]
    assert len(bench.verdicts(rates, peaks)) == 1


@pytest.mark.slow  # processes of their own; the benchmarks are run by hand
def test_tiny(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards: a worker that no longer fits the library it measures."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    model = GPT(ModelConfig.model_validate(shape), 257)
    initialise(model, torch.Generator().manual_seed(0))
    write_hf(model, Tokenizer.of_ids(257), tmp_path, torch.float32)
    monkeypatch.setattr(bench, "NAMES", {n: bench.NAMES[n] for n in (bench.LORA, bench.FULL)})
    flags = ["--model", str(tmp_path), "--length", "8", "--prompt", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_finetune.py", *flags])
    bench.main()
    shown = capsys.readouterr().out
    assert shown.startswith("4 rows of 8 tokens, 2 tokens of each without loss.")
    assert "gptcli, LoRA" in shown
    assert "the memory of full finetuning" in shown
