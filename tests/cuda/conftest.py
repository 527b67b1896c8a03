"""The checks of GPU boxes. Those that mean something on a CPU run there too, in the normal suite;
`scripts/gpu_check.sh` runs the others and prints what they measured as a table."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from gptcli.device import Device, resolve_device

# cuBLAS reads it once, when the first product is made; without it no product is deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ON_CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ],
)


@pytest.fixture(params=["cpu", ON_CUDA])
def device(request: pytest.FixtureRequest) -> Device:
    """The CPU, and the GPU where `-m cuda` asks for it."""
    return resolve_device(request.param)


@pytest.fixture(params=[ON_CUDA])
def cuda(request: pytest.FixtureRequest) -> Device:
    """The GPU, for what a CPU has no like of. What earlier tests left on it is gone."""
    gc.collect()
    torch.cuda.empty_cache()
    return resolve_device(request.param)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), ON_CUDA])
def compiling(request: pytest.FixtureRequest) -> Device:
    """A device to compile for, which takes a CPU a minute."""
    return resolve_device(request.param)


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fp32 products in fp32, in training too: in TF32 they keep 10 bits of 23, and a CPU agrees to
    1e-3 only."""
    wanted, choose = torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision
    choose("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    yield
    choose(wanted)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The checks that ran on a GPU, how each ended, and the figures that it recorded."""
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            name = report.nodeid.split("::")[-1]
            if "[cuda" in name and report.when != "teardown":
                figures = ", ".join(f"{key} {value}" for key, value in report.user_properties)
                terminalreporter.write_line(f"{outcome:<8} {name:<60} {figures}")
