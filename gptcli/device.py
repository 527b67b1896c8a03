"""Where the work runs: the device, its precision and the process's memory settings.

Choices are pure functions of `Device`, so those for GPUs are tested without one.
"""

import ctypes
import os
import platform
import time
from dataclasses import dataclass

import torch

from gptcli.errors import ResourceError

_MUST_WIN_BY = 1.2  # an alternative must be this much faster, so that two fresh runs choose alike
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """A place to compute: kind is cpu, cuda or mps."""

    kind: str
    index: int | None
    name: str
    threads: int
    bf16: bool  # whether bf16 arithmetic is supported at all

    @property
    def torch(self) -> torch.device:
        """The torch device."""
        return torch.device(self.kind if self.index is None else f"{self.kind}:{self.index}")


def resolve_device(name: str) -> Device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` never fails.

    Every job begins with this, so it also settles the process's memory (`keep_freed_memory`).
    ResourceError when a named one is not here.
    """
    keep_freed_memory()
    kind, _, index = name.partition(":")
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if kind == "auto":
        kind = "cuda" if cuda else "mps" if mps else "cpu"
    here = ["cpu"] + [f"cuda:{i}" for i in range(cuda)] + (["mps"] if mps else [])
    number = int(index or 0)
    if f"{kind}:{number}" not in here and kind not in here:
        raise ResourceError(f"device {name} is not available here (there are: {', '.join(here)})")
    if kind == "cuda":
        props = torch.cuda.get_device_properties(number)
        return Device("cuda", number, props.name, torch.get_num_threads(), props.major >= 8)
    return Device(kind, None, platform.processor() or platform.machine(), _threads(), True)


def choose_precision(wanted: str, device: Device) -> str:
    """fp32, bf16 or fp16. auto: bf16 on GPUs that have it; on a CPU the winner of a short race
    between fp32 and bf16 matrix products, fp32 unless bf16 is faster by 20 %."""
    if wanted != "auto":
        if wanted == "bf16" and not device.bf16:
            raise ResourceError(
                f"{device.name} has no bf16; set training.precision to fp16 or fp32"
            )
        if wanted == "fp16" and device.kind == "cpu":
            raise ResourceError("fp16 training needs a GPU; set training.precision to fp32 or bf16")
        return wanted
    if device.kind == "cuda":
        return "bf16" if device.bf16 else "fp32"
    if device.kind == "cpu":
        fp32 = _product_seconds(torch.float32, float("inf"))
        # bf16 is emulated on some processors and hundreds of times slower: stop as soon as it lost
        if _product_seconds(torch.bfloat16, fp32) * _MUST_WIN_BY < fp32:
            return "bf16"
    return "fp32"


def _product_seconds(dtype: torch.dtype, give_up: float) -> float:
    """Fastest of up to six runs of one matrix product; small first when it may be very slow."""
    best = float("inf")
    for size in (128, 512):
        a = torch.ones(size, 512, dtype=dtype)
        for _ in range(2 if size == 128 else 6):
            start = time.perf_counter()
            a @ a.new_ones(512, 512)
            seconds = time.perf_counter() - start
            if size == 128 and seconds > give_up:
                return seconds
            best = min(best, seconds) if size == 512 else best
    return best


def autocast(device: Device, precision: str) -> torch.autocast:
    """Mixed precision for forward passes: matrix products in `precision`, weights in fp32."""
    dtype = _DTYPES[precision]
    enabled = dtype != torch.float32
    return torch.autocast(device.kind, dtype if enabled else torch.bfloat16, enabled=enabled)


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of giving them back to the kernel.

    Otherwise every large tensor costs fresh page faults. Must run before the first tensors; does
    nothing on other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_mmap_max, m_trim_threshold, m_top_pad = -4, -1, -2  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 * 1024 * 1024)


def memory_bytes() -> int | None:
    """Physical memory of this machine, None where it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _threads() -> int:
    return torch.get_num_threads()
