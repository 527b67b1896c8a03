"""What is looked at when something does not work: this installation, this machine, this place.

Nothing here may fail because of what it finds: what cannot be told becomes a problem of its own.
"""

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from gptcli import __version__

LEAST_PYTHON = (3, 10)
_LITTLE = 1 << 30  # bytes of memory or disk with which nothing but a toy can be trained
_REQUIREMENT = re.compile(r"([\w.-]+)(?:>=([\d.]+))?[^;]*(?:;.*extra == [\"']([\w-]+)[\"'])?")
_SETTINGS = ("GPT_", "OMP_", "MKL_", "CUDA_VISIBLE_DEVICES", "TIKTOKEN_CACHE_DIR", "HF_HUB_OFFLINE")
# The extras for users, and what each adds.
EXTRAS = {
    "tables": "tokenizers of GPT-2, GPT-3.5, GPT-4 and GPT-4o without a download",
    "clean": "data filters: near duplicates, language, phone and identity numbers",
    "tasks": "scores of tasks: F1, BLEU, chrF, ROUGE",
    "eval": "gpt eval --lm-eval: the tasks of lm-evaluation-harness",
    "constrain": "--regex, --json-schema, --choices",
    "serve": "gpt serve",
    "hf": "transformers, to run what gpt export --to hf wrote",
    "gguf": "gpt export --to gguf",
    "llama": "llama.cpp, to run what gpt export --to gguf wrote",
    "tensorboard": "report: {tensorboard: true}",
}
# Should the package's own list be lost, what nothing goes without.
_CORE = ("torch", "typer", "rich", "datasets", "tiktoken", "pyyaml", "pydantic", "safetensors")


@dataclass(frozen=True)
class Problem:
    """What is wrong and what to do; with an essential one, no model can be trained here."""

    what: str
    do: str
    essential: bool = False


@dataclass(frozen=True)
class Extra:
    """An optional part: what it adds, and those of its packages that are missing."""

    name: str
    adds: str
    missing: tuple[str, ...]

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'gptcli[{self.name}]'"


@dataclass
class Examination:
    """All that was found, in the order in which it is shown."""

    facts: dict[str, str] = field(default_factory=dict)
    extras: list[Extra] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether nothing essential is broken."""
        return not any(problem.essential for problem in self.problems)


def examine() -> Examination:
    """Look at everything. Importing torch takes most of the time."""
    found = Examination()
    try:
        os.getcwd()
    except OSError:  # MKL ends a process that stands nowhere, and no run could be made
        what = "the current folder was removed, or may not be entered"
        found.problems.append(Problem(what, "cd to another folder", essential=True))
        return found
    for name, look in _LOOKS.items():
        try:
            look(found)
        except Exception as error:  # the point of it all: say so, and look on
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            found.facts.setdefault(name, "cannot be told")
            found.problems.append(Problem(f"{name}: {reason}", _ADVICE.get(name, "see above")))
    return found


def _python(found: Examination) -> None:
    found.facts["gptcli"] = f"{__version__} in {Path(__file__).parent}"
    found.facts["python"] = f"{platform.python_version()} at {sys.executable or 'unknown'}"
    found.facts["system"] = f"{platform.platform()}"
    if sys.version_info < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        what = f"python {platform.python_version()} is older than {least}"
        found.problems.append(Problem(what, f"install python {least} or newer", essential=True))


def _packages(found: Examination) -> None:
    core, extras = _requirements()
    for package, least in core.items():
        version = installed(package)
        found.facts[package] = version or "not installed"
        wanted = f"{package}>={least}" if least else package
        install = f"{_pip()} install '{wanted}'"
        if version is None:
            problem = Problem(f"the package {package} is not installed", install, essential=True)
            found.problems.append(problem)
        elif _numbers(version) < _numbers(least):
            what = f"{package} {version} is older than {least}"
            found.problems.append(Problem(what, install, essential=True))
    for name, adds in EXTRAS.items():
        if name in extras:
            missing = tuple(package for package in extras[name] if installed(package) is None)
            found.extras.append(Extra(name, adds, missing))


def _torch(found: Examination) -> None:
    try:
        import torch
    except Exception as error:
        found.facts["torch"] = "broken" if installed("torch") else "not installed"
        if installed("torch"):
            reason = " ".join(str(error).split())[:200]
            install = f"{_pip()} install --force-reinstall torch"
            what = f"torch cannot be loaded: {reason}"
            found.problems.append(Problem(what, install, essential=True))
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    capability = torch.backends.cpu.get_cpu_capability()
    found.facts["torch"] = f"{torch.__version__} ({build}, {capability})"


def _devices(found: Examination) -> None:
    if "torch" not in sys.modules:
        found.facts["cpu"] = f"{os.cpu_count()} cores"
        return
    import torch

    from gptcli.device import allowed_cpus, choose_precision, resolve_device

    device = resolve_device("auto")
    cpu = resolve_device("cpu")
    allowed, cores = allowed_cpus(), os.cpu_count() or 1
    share = f", {allowed} of them allowed here" if allowed < cores else ""
    found.facts["cpu"] = f"{cpu.name}, {cores} cores{share}, {cpu.threads} threads"
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.facts[f"cuda:{index}"] = f"{about.name}, {_size(about.total_memory)}"
    if torch.backends.mps.is_available():
        found.facts["mps"] = "available"
    found.facts["auto uses"] = f"{device.torch} in {choose_precision('auto', device)}"
    _gpu_unused(found, torch.version.cuda is not None or torch.version.hip is not None)


def _gpu_unused(found: Examination, built_for_gpu: bool) -> None:
    """A GPU that the system has and torch does not use."""
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if not has_driver or any(name.startswith("cuda:") for name in found.facts):
        return
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ
    why = "CUDA_VISIBLE_DEVICES hides it" if hidden else "its driver may be too old for it"
    do = "unset CUDA_VISIBLE_DEVICES" if hidden else "nvidia-smi shows the driver's CUDA version"
    if not built_for_gpu:
        why = "it is built for the CPU alone"
        do = f"{_pip()} install --force-reinstall torch, as pytorch.org says for your CUDA version"
    found.problems.append(Problem(f"an NVIDIA driver is here, but torch sees no GPU: {why}", do))


def _compiler(found: Examination) -> None:
    name = next((n for n in ("c++", "g++", "clang++", "cl") if shutil.which(n)), None)
    found.facts["compiler"] = name or "none: training.compile stays off"


def _memory(found: Examination) -> None:
    if "torch" not in sys.modules:
        found.facts["memory"] = "unknown without torch"
        return
    from gptcli.device import free_memory_bytes, memory_bytes, resolve_device

    total, free = memory_bytes(), free_memory_bytes(resolve_device("cpu"))
    parts = [f"{_size(total)}" if total is not None else "unknown"]
    parts += [f"{_size(free)} free to this process"] if free is not None else []
    found.facts["memory"] = ", ".join(parts)
    if free is not None and free < _LITTLE:
        do = "end other programs, or give the container more (docker run --memory)"
        found.problems.append(Problem(f"only {_size(free)} of memory is free", do))


def _runs(found: Examination) -> None:
    from gptcli.runs.run_dir import runs_root

    root = runs_root().absolute()
    do = "go to a folder of yours, or set GPT_RUNS to one with room"
    _folder(found, "runs", root, do, essential=True)


def _cache(found: Examination) -> None:
    from gptcli.data.cache_folder import cache_root

    do = "set GPT_CACHE to a folder of yours with room"
    _folder(found, "cache", cache_root().absolute(), do, essential=False)


def _folder(found: Examination, name: str, root: Path, do: str, *, essential: bool) -> None:
    """Whether files can be made in `root`, or in what is there of it, and how much fits."""
    existing = next(path for path in (root, *root.parents) if os.path.lexists(path))
    found.facts[name] = str(root)
    try:
        free = shutil.disk_usage(existing).free
        found.facts[name] += f", {_size(free)} free"
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        reason = f"the {name} folder {root} cannot be written: {error.strerror or error}"
        found.problems.append(Problem(reason, do, essential))
        return
    if free < _LITTLE:
        found.problems.append(Problem(f"only {_size(free)} of disk are free for {root}", do))


def _corpora(found: Examination) -> None:
    from gptcli.data.store import store_sizes

    sizes = [store.size_bytes for store in store_sizes()]
    found.facts["cached corpora"] = f"{len(sizes)}, {_size(sum(sizes))}"


def _encodings(found: Examination) -> None:
    from gptcli.data.tiktoken_tables import ENCODINGS, named_encoding
    from gptcli.errors import DataError

    here, hints = list[str](), dict[str, str]()
    for name in ENCODINGS:
        try:
            named_encoding(name)
            here.append(name)
        except DataError as error:
            hints[name] = error.hint or error.message
    found.facts["encodings"] = ", ".join([*here, "bpe (trained here)", "bytes"])
    for name, hint in hints.items():
        found.facts[f"no {name}"] = hint


def _settings(found: Examination) -> None:
    given = {k: v for k, v in os.environ.items() if k.startswith(_SETTINGS)}
    shown = ", ".join(f"{name}={value}" for name, value in sorted(given.items()))
    found.facts["environment"] = shown or "nothing set that gpt reads"


_LOOKS: dict[str, Callable[[Examination], None]] = {
    "python": _python,
    "packages": _packages,
    "torch": _torch,
    "devices": _devices,
    "compiler": _compiler,
    "memory": _memory,
    "runs": _runs,
    "cache": _cache,
    "cached corpora": _corpora,
    "encodings": _encodings,
    "environment": _settings,
}
_ADVICE = {
    "runs": "set GPT_RUNS to a folder of yours",
    "cache": "set GPT_CACHE to a folder of yours",
    "cached corpora": "set GPT_CACHE to a folder of yours",
    "devices": "to leave GPUs out: CUDA_VISIBLE_DEVICES= gpt doctor",
    "encodings": "install what is missing above",
}


def installed(package: str) -> str | None:
    """The version of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> tuple[dict[str, str], dict[str, list[str]]]:
    """The core packages with the least version of each, and the packages of each extra."""
    try:
        lines = metadata.requires("gptcli") or []
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return dict.fromkeys(_CORE, ""), {}
    core, extras = dict[str, str](), dict[str, list[str]]()
    for line in lines:
        if (match := _REQUIREMENT.match(line)) is None:
            continue
        package, least, extra = match.groups()
        if extra is None:
            core[package] = least or ""
        else:
            extras.setdefault(extra, []).append(package)
    return core, extras


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, to compare: 2.13.0+cpu is (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _pip() -> str:
    return f"{sys.executable} -m pip" if sys.executable else "pip"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
