"""`gpt doctor`: what this machine has, what will be used, what is missing."""

import os
import platform
import shutil
from collections.abc import Iterator

from gptcli import __version__
from gptcli.cli.terminal import columns, write_out
from gptcli.errors import DataError

_PACKAGES = ("torch", "datasets", "tokenizers", "tiktoken", "safetensors", "transformers")
_ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")


def doctor() -> int:
    """Show versions, devices, memory, disk, tokenizers at hand."""
    rows = [
        ["gptcli", __version__],
        ["python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"],
        *([name, _version(name)] for name in _PACKAGES),
        *_device_rows(),
        ["memory", _memory()],
        ["free disk", _disk()],
        ["token cache", _cache()],
        *([f"tokenizer {name}", _table(name)] for name in _ENCODINGS),
    ]
    write_out(columns(rows))
    return 0


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device_rows() -> Iterator[list[str]]:
    import torch

    from gptcli.device import choose_precision, resolve_device

    yield ["cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield [f"cuda:{index}", f"{about.name}, {_size(about.total_memory)}"]
    if torch.backends.mps.is_available():
        yield ["mps", "available"]
    device = resolve_device("auto")
    yield ["auto uses", f"{device.torch} in {choose_precision('auto', device)}"]


def _memory() -> str:
    from gptcli.device import memory_bytes

    total = memory_bytes()
    return "unknown" if total is None else _size(total)


def _disk() -> str:
    from gptcli.runs.run_dir import runs_root

    root = runs_root().absolute()
    existing = next(path for path in (root, *root.parents) if path.exists())
    return f"{_size(shutil.disk_usage(existing).free)} for {root}"


def _cache() -> str:
    from gptcli.data.cache_folder import cache_root
    from gptcli.data.store import store_sizes

    sizes = [store.size_bytes for store in store_sizes()]
    return f"{len(sizes)} corpora, {_size(sum(sizes))} in {cache_root()}"


def _table(name: str) -> str:
    from gptcli.data.tiktoken_tables import named_encoding

    try:
        return f"found, {len(named_encoding(name).ranks):,} tokens"
    except DataError as error:
        return f"missing; {error.hint}" if error.hint else "missing"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
