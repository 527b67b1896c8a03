"""Where the work runs: the device, its precision and the process's memory settings.

Choices are pure functions of `Device`, so those for GPUs are tested without one.
"""

import ctypes
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from gptcli import portable
from gptcli.errors import ResourceError
from gptcli.world import from_environment

T = TypeVar("T")
MUST_WIN_BY = 1.2  # an alternative must be this much faster, so that two fresh runs choose alike
_OUT_OF_MEMORY = re.compile(
    "not enough memory|can't allocate memory|out of memory|bad_alloc|could not create a memory"
    "|STATUS_ALLOC_FAILED"  # of cuBLAS and cuDNN
)
_USABLE = 0.9  # of the free memory: others on the machine need some too
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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

    Every job begins with this, so it also settles the process's memory (`keep_freed_memory`) and
    its number of threads. ResourceError when a named one is not here.
    """
    keep_freed_memory()
    kind, _, index = name.partition(":")
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if kind == "auto":
        kind = "cuda" if cuda else "mps" if mps else "cpu"
    here = ["cpu"] + [f"cuda:{i}" for i in range(cuda)] + (["mps"] if mps else [])
    number = int(index or (from_environment().local_rank if kind == "cuda" else 0))
    if f"{kind}:{number}" not in here and kind not in here:
        raise ResourceError(
            f"device {name} is not available here (there are: {', '.join(here)})",
            hint="leave the choice to gpt (device auto); gpt doctor says what it finds",
        )
    if kind == "cuda":
        props = torch.cuda.get_device_properties(number)
        return Device("cuda", number, props.name, _threads(), props.major >= 8)
    return Device(kind, None, _processor(), _threads(), True)


def hardware(device: Device) -> str:
    """What computes: the model of the processor, with the instructions that torch uses of it, or of
    the GPU. Where it is the same, so are the bits."""
    if device.kind != "cpu":
        return device.name
    return f"{device.name} with {torch.backends.cpu.get_cpu_capability()}"


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
    return faster_precision(race_precision()) if device.kind == "cpu" else "fp32"


def race_precision() -> dict[str, float]:
    """Seconds of one matrix product on the CPU in fp32 and in bf16."""
    fp32 = _product_seconds(torch.float32, float("inf"))
    # bf16 is emulated on some processors and hundreds of times slower: stop as soon as it lost
    found = {"fp32": fp32, "bf16": _product_seconds(torch.bfloat16, fp32)}
    return {name: float(f"{seconds:.4g}") for name, seconds in found.items()}


def faster_precision(seconds: dict[str, float]) -> str:
    """fp32, unless bf16 won the race by 20 %."""
    return "bf16" if seconds["bf16"] * MUST_WIN_BY < seconds["fp32"] else "fp32"


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
    dtype = DTYPES[precision]
    enabled = dtype != torch.float32
    if enabled:
        _expect_fp32_norms()
    return torch.autocast(device.kind, dtype if enabled else torch.bfloat16, enabled=enabled)


@cache
def _expect_fp32_norms() -> None:
    """RMSNorm's weights in fp32 are meant: torch then computes it in fp32, and warns of that."""
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")


def allow_tf32(device: Device) -> None:
    """On a GPU, let training compute in TF32 what it computes in fp32."""
    if device.kind == "cuda":
        torch.set_float32_matmul_precision("high")


def computed_aside(work: Callable[[], T]) -> T:
    """What `work` returns, done in a thread that ends with it, and with that thread the others that
    torch computes on for it. For processes that decode in another thread afterwards.

    Where a process has more such threads than processors, GNU's OpenMP lets them sleep at the end
    of each operation instead of spinning: decoding a small model on two cores then takes 1.3 x.
    """
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(work).result()


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


def give_back_freed_memory() -> None:
    """The opposite of `keep_freed_memory`, for models whose size is what matters: large blocks that
    are freed are the kernel's again."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_mmap_max, m_mmap_threshold, m_trim_threshold, m_top_pad = -4, -3, -1, -2  # malloc.h
    libc.mallopt(m_mmap_max, 2**16)
    libc.mallopt(m_mmap_threshold, 2**20)
    libc.mallopt(m_trim_threshold, 2**24)
    libc.mallopt(m_top_pad, 2**20)
    libc.malloc_trim(0)


def memory_bytes() -> int | None:
    """Physical memory of this machine, None where it cannot be told."""
    return portable.physical_bytes()


def free_memory_bytes(device: Device) -> int | None:
    """Memory that this process can still get on `device`, None where it cannot be told.

    On a GPU, what nobody holds or torch holds unused. Else the least of what the system has, what
    the process's control groups leave (a container's limit) and what its address space may still
    grow by (`ulimit -v`).
    """
    if device.kind == "cuda":
        if not torch.cuda.is_available():
            return None
        free, _ = torch.cuda.mem_get_info(device.torch)
        held, used = torch.cuda.memory_reserved, torch.cuda.memory_allocated
        return int(free + held(device.torch) - used(device.torch))
    found = [_available_bytes(), *_cgroup_free_bytes(Path("/")), _address_space_bytes()]
    return min((n for n in found if n is not None), default=memory_bytes())


def peak_memory_bytes(device: Device) -> int:
    """The most memory that this process has held so far: of a GPU what its tensors took, else all
    that was resident."""
    if device.kind == "cuda":
        return int(torch.cuda.max_memory_allocated(device.torch))
    return portable.peak_bytes()


def usable_memory_bytes(device: Device, held_bytes: int = 0) -> int | None:
    """Memory that training on `device` may come to: `held_bytes`, which this process has already,
    and most of what is free. None where that cannot be told."""
    free = free_memory_bytes(device)
    sharing = 1 if device.kind == "cuda" else from_environment().local_size
    return None if free is None else int(_USABLE * free / sharing) + held_bytes


def allowed_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: its affinity, less where a control group (a container) gives
    it the time of fewer. `root` is where proc and sys are."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    for folder in _cgroups(root, "cpu"):
        texts = _words(folder / "cpu.max")  # version 2: "200000 100000" or "max 100000"
        if not texts:
            texts = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(texts) == 2 and all(text.isdigit() for text in texts) and int(texts[1]):
            count = min(count, max(1, math.ceil(int(texts[0]) / int(texts[1]))))
    return count


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's or the CPU's memory did not suffice; the CPU's allocators name no type."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def release_memory(device: Device) -> None:
    """Give what torch holds of a GPU's memory without using it back to the GPU."""
    if device.kind == "cuda":
        torch.cuda.empty_cache()


def _processor() -> str:
    """Its model where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.partition(":")[2] for line in file if line.startswith("model name"))
            name = " ".join(next(names, "").split())
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()


def _threads() -> int:
    """torch's own number, at most the CPUs that are allowed; OMP_NUM_THREADS is the user's word."""
    if threads_are_given():
        return torch.get_num_threads()
    threads = min(torch.get_num_threads(), allowed_cpus())
    torch.set_num_threads(threads)
    return threads


def threads_are_given() -> bool:
    """Whether the user chose the number of threads."""
    return "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, each inside the next, of both
    versions. In a container only the outermost may be seen, as if it were the root."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controllers and controller)
        folder = base / own.lstrip("/")
        yield folder
        while folder != base and base in folder.parents:
            folder = folder.parent
            yield folder


def _cgroup_free_bytes(root: Path) -> Iterator[int]:
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in _cgroups(root, "memory"):
        for limit, used, cached in names:
            words = _words(folder / limit) + _words(folder / used)
            if len(words) == 2 and all(word.isdigit() for word in words):
                # Pages of files that nobody uses are given back when memory is short.
                stat = dict(line.split() for line in _lines(folder / "memory.stat"))
                yield max(0, int(words[0]) - int(words[1]) + int(stat.get(cached, 0)))


def _available_bytes() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _address_space_bytes() -> int | None:
    limit = portable.address_space_limit()
    pages = _words(Path("/proc/self/statm"))
    if limit is None or not pages:
        return None
    return max(0, limit - int(pages[0]) * portable.page_bytes())


def _lines(path: Path) -> list[str]:
    """Lines of a file of the system; none where it does not exist or may not be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
