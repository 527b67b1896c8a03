"""Training on a GPU: no waiting inside a step, the CPU's losses, exact resumes, memory."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupting import outcome, prose, tiny, with_cuts
from safetensors.torch import load_file

from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.data.rows import Prefetch
from gptcli.device import Device
from gptcli.pretrain import pretrain
from gptcli.runs import checkpoint
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json
from gptcli.training.footprint import footprint
from gptcli.training.session import Session
from gptcli.training.step import forward_backward


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A corpus of a few thousand bytes."""
    path = tmp_path / "book.txt"
    path.write_text(prose(4000))
    return path


def small(text: Path, device: Device, **changes: Any) -> Config:
    """A run of a tiny model without dropout, whose masks differ between devices."""
    usual = {"model__dropout": 0.0, "training__log_every": 1, "training__device": device.kind}
    return tiny(text, **{**usual, "training__compile": "off", **changes})


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir) if line["event"] == "train"]


def inside_training(
    config: Config,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Session, Prefetch], None],
) -> None:
    """Call `work` with the run in memory, in the place of the training loop."""
    monkeypatch.setattr("gptcli.training.build.train", work)
    assert pretrain(config, run_dir=run_dir).status == "stopped"


@contextmanager
def waiting_is_an_error(device: Device) -> Iterator[None]:
    """Inside, whatever makes the program wait for the GPU raises."""
    if device.kind != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_waits_for_nothing(
    kind: str, text: Path, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One float() of a tensor on the GPU in the step, and the GPU idles while Python catches up."""

    def step(session: Session, batches: Prefetch) -> None:
        batch = batches.next()
        loss, norm = forward_backward(session, batch)
        session.optimizer.step(0.1, torch.isfinite(loss) & torch.isfinite(norm))
        session.optimizer.zero_grad()
        first = float(loss)
        with waiting_is_an_error(device):
            loss, norm = forward_backward(session, batch)
            session.optimizer.step(0.1, torch.isfinite(loss) & torch.isfinite(norm))
            session.optimizer.zero_grad()
        assert loss.device == norm.device == session.device.torch
        assert (loss.shape, loss.dtype) == (torch.Size(()), torch.float32)
        assert float(loss) < first  # the update was applied

    config = small(text, device, optimizer__kind=kind, training__micro_batch_size=2)
    inside_training(config, tmp_path / "run", monkeypatch, step)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_batches_are_pinned_for_a_gpu(
    packing: str, text: Path, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From ordinary memory a copy to the GPU waits, non_blocking or not; and a CPU has no use for
    pinned memory."""

    def look(session: Session, batches: Prefetch) -> None:
        batch = batches.next()
        assert batch.segments is not None
        for tensor in (batch.tokens, batch.targets, batch.segments):
            assert tensor.is_pinned() == (device.kind == "cuda")

    config = small(text, device, data__packing=packing, data__document_mask=True)
    inside_training(config, tmp_path / "run", monkeypatch, look)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_losses_are_those_of_the_cpu(
    kind: str, text: Path, tmp_path: Path, device: Device, record_property: Any
) -> None:
    """Clipping, accumulation or the schedule differ where the loop runs ahead of the GPU."""
    wanted = small(text, Device("cpu", None, "", 1, True), optimizer__kind=kind)
    own = small(text, device, optimizer__kind=kind, training__micro_batch_size=2)
    pretrain(wanted, run_dir=tmp_path / "cpu")
    pretrain(own, run_dir=tmp_path / "own")
    far = max(
        abs(a - b) for a, b in zip(losses(tmp_path / "own"), losses(tmp_path / "cpu"), strict=True)
    )
    record_property("loss", f"{far:.1e} nats")
    assert far < (0.02 if kind == "muon" and device.kind == "cuda" else 1e-3)


def test_bf16_trains_as_fp32_does(
    text: Path, tmp_path: Path, device: Device, record_property: Any
) -> None:
    """Weights or moments kept in bf16 instead of fp32 stop moving when updates are small."""
    for precision in ("fp32", "bf16"):
        config = small(text, device, training__precision=precision)
        pretrain(config, run_dir=tmp_path / precision)
    last = checkpoint.list_checkpoints(tmp_path / "bf16")[-1]
    assert {t.dtype for t in load_file(last / "model.safetensors").values()} == {torch.float32}
    final = [losses(tmp_path / precision)[-1] for precision in ("fp32", "bf16")]
    record_property("last loss", f"{final[1] / final[0] - 1:+.1e}")
    assert final[1] == pytest.approx(final[0], rel=0.02)


@pytest.mark.usefixtures("exact_products")
def test_compiled_trains_as_eager_does(text: Path, tmp_path: Path, compiling: Device) -> None:
    """A compiled graph that fuses across a cast or drops an in-place update trains otherwise."""
    for choice in ("off", "on"):
        pretrain(small(text, compiling, training__compile=choice), run_dir=tmp_path / choice)
    assert read_run_json(tmp_path / "on")["choices"]["compile"] is True
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-3)


def test_without_a_compiler_it_trains_all_the_same(
    text: Path, tmp_path: Path, compiling: Device
) -> None:
    """Triton needs a C compiler, which many boxes lack: the run must go on without."""
    path = tmp_path / "config.yaml"
    config = small(text, compiling, training__compile="on", training__max_steps=3)
    path.write_text(dump_config(config, loadable=True))
    missing = dict.fromkeys(("CC", "CXX"), "/no/compiler")
    caches = {
        name: str(tmp_path / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    }
    done = subprocess.run(
        [sys.executable, "-m", "gptcli", "pretrain", str(path), "--run-dir", str(tmp_path / "run")],
        env={**os.environ, **missing, **caches},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "torch.compile failed, going on without it" in done.stderr
    assert len(losses(tmp_path / "run")) == 3
    assert read_run_json(tmp_path / "run")["choices"]["compile"] is False


def test_a_resume_is_exact(text: Path, tmp_path: Path, device: Device) -> None:
    """What is read one step later on a GPU (loss, scale, metrics) is lost or counted twice where a
    stop falls between. Attention's backward pass adds in any order unless told not to."""
    config = small(text, device, training__max_steps=9, model__dropout=0.1)
    torch.use_deterministic_algorithms(True)
    try:
        pretrain(config, run_dir=tmp_path / "straight")
        assert with_cuts(config, tmp_path / "cut", ["2", "3"]).status == "finished"
    finally:
        torch.use_deterministic_algorithms(False)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "straight")


def words(folder: Path) -> Path:
    """A corpus long enough for a few steps of full size, and all of a kind."""
    path, rng = folder / "words.txt", random.Random(7)
    path.write_text("".join(rng.choices("abcdefgh \n", k=300_000)))
    return path


def gpt2_shape(folder: Path, **training: Any) -> Config:
    """GPT-2 124M but for its vocabulary, which the bytes tokenizer makes small."""
    return Config.model_validate(
        {
            "tokenizer": {"kind": "bytes"},
            "data": {"train": str(words(folder)), "val_fraction": 0.02},
            "model": {"preset": "gpt2"},
            "optimizer": {"kind": "adamw", "lr": 6e-4},
            "schedule": {"warmup_steps": 1},
            "training": {
                "device": "cuda",
                "compile": "off",
                "max_steps": 3,
                "tokens_per_step": 16384,
                "eval_every": 100,
                "save_every": 100,
                **training,
            },
            "eval": {"max_tokens": 2048},
            "samples": {"prompts": []},
        }
    )


@pytest.mark.parametrize("recompute", ["off", "on"])
def test_memory_is_what_the_plan_says(
    recompute: str,
    tmp_path: Path,
    cuda: Device,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    """`gpt plan` says that a run fits, and it ends out of memory; or sends people to rent more."""
    config = gpt2_shape(tmp_path, micro_batch_size=4, activation_checkpointing=recompute)
    peak, planned = [], []

    def measure(session: Session, batches: Prefetch) -> None:
        for _ in range(2):  # the second has the optimizer's state from the beginning
            torch.cuda.reset_peak_memory_stats()
            forward_backward(session, batches.next())
            session.optimizer.step(0.1)
            session.optimizer.zero_grad()
        peak.append(torch.cuda.max_memory_allocated())
        expected = footprint(
            config,
            session.model.vocab_size,
            session.choices.micro_batch_size,
            session.choices.precision,
            recompute=recompute == "on",
            device_kind="cuda",
        )
        planned.append(expected.total_bytes - expected.other_bytes)  # that is not torch's

    inside_training(config, tmp_path / "run", monkeypatch, measure)
    record_property("measured", f"{peak[0] / 2**30:.2f} GiB")
    record_property("planned", f"{planned[0] / 2**30:.2f} GiB")
    assert planned[0] == pytest.approx(peak[0], rel=0.15)


def test_too_little_memory_halves_the_micro_batch(
    tmp_path: Path, cuda: Device, record_property: Any
) -> None:
    """A run ends where the GPU is smaller or fuller than the probe believed."""
    pretrain(gpt2_shape(tmp_path), run_dir=tmp_path / "roomy")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda.torch).total_memory
    # Weights, gradients and moments take 1.4 GB; the step's 16 rows take several more.
    torch.cuda.set_per_process_memory_fraction(min(1.0, 3.2e9 / total))
    try:
        pretrain(gpt2_shape(tmp_path), run_dir=tmp_path / "narrow")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    rows = [
        read_run_json(tmp_path / name)["choices"]["micro_batch_size"]
        for name in ("roomy", "narrow")
    ]
    record_property("rows", f"{rows[0]} and {rows[1]}")
    assert rows[1] < rows[0]
    assert losses(tmp_path / "narrow") == pytest.approx(losses(tmp_path / "roomy"), rel=0.01)
