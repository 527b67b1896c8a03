"""manifest.json: which files a checkpoint holds, their sizes and hashes. Reading trusts nothing."""

import hashlib
import json
import os
import re
import shlex
import stat
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gptcli import __version__, stop
from gptcli.errors import CheckpointError
from gptcli.runs.run_dir import CHECKPOINTS, read_json, write_json_atomic

FORMAT_VERSION = 1
MODEL, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
STATE, CONFIG, TOKENIZER = "state.json", "config.yaml", "tokenizer"
ADAPTER = "adapter.json"  # where model.safetensors holds an adapter: what it belongs to
# Far above what we write (state.json holds a data position); keeps a hostile file out of memory.
SMALL_FILE_BYTES = 64 * 2**20
_MANIFEST_BYTES = 2**20
_SEAL = "sha256"
_REQUIRED = {MODEL, OPTIMIZER, STATE, CONFIG}
_TOKENIZER_FILE = re.compile(TOKENIZER + r"/[a-z0-9_]{1,50}\.(json|tiktoken)")


class NewerFormatError(CheckpointError):
    """A checkpoint of a later gpt: whole, but not for this one."""


class DamagedFileError(CheckpointError):
    """A file whose content is not what was written."""


def write_manifest(
    directory: Path,
    step: int,
    tied: dict[str, str],
    tokenizer: str,
    hashes: dict[str, str] | None = None,
) -> None:
    """Sync every file in `directory`, then write its manifest.json.

    `tied` maps tensor names that are not stored to the stored one they equal; `tokenizer` is the
    tokenizer's identity; `hashes` are those of files that need not be read for it.
    """
    files, known = {}, hashes or {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if not _is_known(name):
            raise ValueError(f"{name}: no checkpoint may hold such a file")
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or sha256_of(path)}
    manifest = {
        "format": FORMAT_VERSION,
        "gptcli": __version__,
        "torch": torch.__version__,
        "step": step,
        "tokenizer": tokenizer,
        "tied": tied,
        "files": files,
    }
    write_json_atomic(directory / MANIFEST, sealed(manifest))


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the hash of itself: of its other keys, as sorted JSON."""
    rest = {key: value for key, value in manifest.items() if key != _SEAL}
    return {**rest, _SEAL: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


@contextmanager
def _telling_which_are_whole(directory: Path) -> Iterator[None]:
    """Where a checkpoint of a run is damaged, the run has others."""
    try:
        yield
    except CheckpointError as error:
        if error.hint is None:
            error.hint = whole_hint(directory)
        raise


def whole_hint(directory: Path) -> str | None:
    """A command that tells which checkpoints are whole, where `directory` has a run's place."""
    if directory.parent.name != CHECKPOINTS:
        return None
    run_dir = shlex.quote(str(directory.parent.parent))
    return f"which checkpoints of the run are whole: gpt runs verify {run_dir}"


def read_manifest(directory: Path) -> dict[str, Any]:
    """manifest.json with its form checked, the files it lists not. CheckpointError if it is bad."""
    with _telling_which_are_whole(directory):
        return _read_manifest(directory)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    manifest = read_json(path, _MANIFEST_BYTES)
    # First: a flipped bit can look like a newer format. Those of early versions have no seal.
    if _SEAL in manifest and manifest != sealed(manifest):
        raise CheckpointError(f"{path} is damaged (its sha256 differs)")
    version = manifest.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: no valid format number")
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{directory} is in format {version}: it needs gpt >= {manifest.get('gptcli')}"
            f" (this is {__version__})",
            hint="in a clone of its newer version: git pull && pip install .",
        )
    for problem in _problems(manifest):
        raise CheckpointError(f"{path}: {problem}")
    return manifest


def check_files(directory: Path, manifest: dict[str, Any], hashed: Collection[str]) -> None:
    """Compare the files in `directory` with its manifest. CheckpointError names the first bad one.

    Presence and sizes of all, the hashes of the files `hashed`.
    """
    with _telling_which_are_whole(directory):
        _check_presence(directory, manifest)
    for name in manifest["files"]:
        if name in hashed:
            check_hash(directory, manifest, name)


def _check_presence(directory: Path, manifest: dict[str, Any]) -> None:
    files = manifest["files"]
    on_disk = {f"{TOKENIZER}/{p.name}" for p in (directory / TOKENIZER).glob("[!.]*")}
    if stray := sorted(on_disk - set(files)):
        raise CheckpointError(f"{directory}: {stray[0]} is not in {MANIFEST}")
    for name, entry in files.items():
        path = directory / name
        if path.is_symlink() or (path.parent != directory and path.parent.is_symlink()):
            raise CheckpointError(f"{directory}: {name} is a symbolic link")
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{directory}: {name} is not a regular file")
            if found.st_size != entry["bytes"]:
                raise CheckpointError(
                    f"{directory}: {name} has {found.st_size} bytes instead of {entry['bytes']}"
                )
        except FileNotFoundError:
            raise CheckpointError(f"{directory}: {name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def check_hash(directory: Path, manifest: dict[str, Any], name: str) -> None:
    """Compare one file with its hash in the manifest; DamagedFileError when they differ.

    The GIL is released meanwhile: another thread can read the same file. Raises `stop.Stopped`.
    """
    try:
        found = sha256_of(directory / name, stoppable=True)
    except OSError as error:
        raise DamagedFileError(f"{directory / name} cannot be read: {error.strerror}") from error
    if found != manifest["files"][name]["sha256"]:
        with _telling_which_are_whole(directory):
            raise DamagedFileError(f"{directory}: {name} is damaged (its sha256 differs)")


def damage(directory: Path) -> str | None:
    """Which file's hash differs from the manifest, if one does; looked at once by a process for as
    long as the files stay as they are. CheckpointError for a bad manifest, OSError."""
    manifest = read_manifest(directory)
    times = tuple((directory / name).stat().st_mtime_ns for name in manifest["files"])
    return _damage(directory, manifest.get(_SEAL), times)


@lru_cache(maxsize=64)
def _damage(directory: Path, _seal: str | None, _times: tuple[int, ...]) -> str | None:
    files = read_manifest(directory)["files"]
    with ThreadPoolExecutor(2) as pool:  # weights and moments are nearly all of the work
        hashes = pool.map(lambda name: sha256_of(directory / name), files)
        for name, found in zip(files, hashes, strict=True):
            if found != files[name]["sha256"]:
                return f"{directory}: {name} is damaged (its sha256 differs)"
    return None


def _problems(manifest: dict[str, Any]) -> Iterator[str]:
    step, tied, files = (manifest.get(key) for key in ("step", "tied", "files"))
    if type(step) is not int or not 0 <= step < 10**18:
        yield "no valid step"
    if not isinstance(tied, dict) or not all(isinstance(kept, str) for kept in tied.values()):
        yield "no valid list of tied tensors"
    if not isinstance(manifest.get("tokenizer"), str):
        yield "no identity of the tokenizer"
    if not isinstance(files, dict):
        yield "no list of files"
        return
    if missing := sorted(_REQUIRED - set(files)):
        yield f"{missing[0]} is not listed"
    if not any(_TOKENIZER_FILE.fullmatch(name) for name in files):
        yield "no tokenizer is listed"
    for name, entry in files.items():
        if not _is_known(name):
            yield f"unknown file name {name!r}"
        elif not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
            yield f"{name} has no size"
        elif not isinstance(entry.get("sha256"), str):
            yield f"{name} has no sha256"
        elif name not in (MODEL, OPTIMIZER) and entry["bytes"] > SMALL_FILE_BYTES:
            yield f"{name} is larger than {SMALL_FILE_BYTES} bytes"


def _is_known(name: str) -> bool:
    return name in {*_REQUIRED, ADAPTER} or _TOKENIZER_FILE.fullmatch(name) is not None


def sha256_of(path: Path, *, stoppable: bool = False) -> str:
    """Of the file's content. OSError; `stop.Stopped` where it is `stoppable`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            if stoppable:  # reading is; what is saved after a stop request must become whole
                stop.raise_if_requested()
    return digest.hexdigest()
