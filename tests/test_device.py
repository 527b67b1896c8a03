"""Device, memory and processors: what this process may use."""

import os
import time
from pathlib import Path

import pytest
import torch

from gptcli.device import (
    Device,
    allowed_cpus,
    computed_aside,
    faster_precision,
    free_memory_bytes,
    is_out_of_memory,
    resolve_device,
    usable_memory_bytes,
)

CPU = Device("cpu", None, "a processor", 1, True)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"},
        {"proc/self/cgroup": "0::/pod/box\n", "sys/fs/cgroup/pod/cpu.max": "50000 100000\n"},
        {
            "proc/self/cgroup": "5:cpuset:/\n4:cpu,cpuacct:/docker/abc\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_quota_of_one_processor(tmp_path: Path, files: dict[str, str]) -> None:
    """Bug: a container that is given one processor of a large machine starts 64 threads."""
    write(tmp_path, files)
    assert allowed_cpus(tmp_path) == 1


@pytest.mark.parametrize("quota", ["max 100000", "", "900000000 100000", "100000", "x y"])
def test_no_quota(tmp_path: Path, quota: str) -> None:
    """Bug: a machine without a quota, or with a strange file, gets too few threads or an error."""
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota})
    assert allowed_cpus(tmp_path) == allowed_cpus(tmp_path / "nothing")
    if hasattr(os, "sched_getaffinity"):
        assert allowed_cpus(tmp_path) == len(os.sched_getaffinity(0))


def test_threads_of_the_user_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: OMP_NUM_THREADS is overruled; or more threads run than processors may be used."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    most = allowed_cpus()
    torch.set_num_threads(most + 3)
    assert resolve_device("cpu").threads == most == torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    torch.set_num_threads(most + 3)
    assert resolve_device("cpu").threads == most + 3


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: another unit than bytes."""
    free = free_memory_bytes(CPU)
    assert free is not None
    assert 2**26 < free < 2**46


def test_usable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a run takes all that is free, or what it holds counts as taken by another."""
    monkeypatch.setattr("gptcli.device.free_memory_bytes", lambda device: 1000)
    assert usable_memory_bytes(CPU, 50) == 950
    monkeypatch.setattr("gptcli.device.free_memory_bytes", lambda device: None)
    assert usable_memory_bytes(CPU, 50) is None


def test_out_of_memory_is_known_from_other_errors() -> None:
    """Bug: the CPU's allocator, whose error has no type, ends the run; or a bug is taken for it."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(MemoryError())
    for library in ("CUBLAS", "CUDNN"):
        assert is_out_of_memory(RuntimeError(f"CUDA error: {library}_STATUS_ALLOC_FAILED when"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_bf16_must_win_clearly() -> None:
    """Bug: two fresh runs choose differently because two figures are nearly the same."""
    assert faster_precision({"fp32": 1.0, "bf16": 0.9}) == "fp32"
    assert faster_precision({"fp32": 1.0, "bf16": 0.5}) == "bf16"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_threads_of_work_done_aside_end_with_it() -> None:
    """Guards: a server whose OpenMP threads, more than processors, sleep after each operation."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def work() -> int:
        torch.set_num_threads(3)
        torch.ones(2**22).exp_()
        return threads()

    before, chosen = threads(), torch.get_num_threads()
    try:
        assert computed_aside(work) == before + 3
    finally:
        torch.set_num_threads(chosen)
    end = time.monotonic() + 5.0  # they end behind the thread that they belong to
    while threads() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() == before
    with pytest.raises(ZeroDivisionError):
        computed_aside(lambda: 1 // 0)
