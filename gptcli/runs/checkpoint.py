"""Checkpoints: written whole or not at all, checked by hash when read, pruned with care.

A checkpoint is a directory `checkpoints/step-XXXXXXXX` that stands alone. It is filled under
another name, every file is synced, manifest.json (sizes and hashes) comes last, and one rename
publishes it, so a crash at any moment leaves either the whole of it or a leftover that nobody
reads. Hashes detect damage, not malice; names, sizes and file types are checked for the latter.
"""

import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, ResourceError
from gptcli.runs.manifest import (
    ADAPTER,
    CONFIG,
    MODEL,
    OPTIMIZER,
    SMALL_FILE_BYTES,
    STATE,
    TOKENIZER,
    NewerFormatError,
    check_files,
    damage,
    read_manifest,
    write_manifest,
)
from gptcli.runs.run_dir import CHECKPOINTS, read_json, sync_directory, write_json_atomic
from gptcli.runs.space import free_bytes, megabytes, refuse_link
from gptcli.runs.swap import remove, swap_in
from gptcli.runs.tensors import read_tensors, refuse_non_finite, save_tensors, untied, with_tied

_BEST = "best.json"
_BEST_BYTES = 4096
_STEP_NAME = re.compile(r"step-(\d{8,18})")
_DELETED_NAME = re.compile(r"\.del-(step-\d{8,18})-\d+")
_OVERHEAD_BYTES = 8 * 2**20  # state, config, a tokenizer of 200 000 tokens, headers

log = logging.getLogger("gptcli")


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds. `state` is JSON that comes back equal: str keys, lists, no tuples.

    Tensors that are the same memory under two names (tied weights) are stored once. Where `adapter`
    is given, `model` holds what belongs on the base that it names (see `runs.adapter`).
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    config_yaml: str
    tokenizer: Tokenizer
    adapter: dict[str, Any] | None = None


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is or would be."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def write_whole(folder: Path, contents: Contents) -> dict[str, str]:
    """Write the tensors' files into `folder` and return the sha256 of each."""
    model, _ = untied(contents.model)
    with ThreadPoolExecutor(2) as pool:  # a hash takes as long as the disk does, or longer
        saved = {
            name: pool.submit(save_tensors, tensors, folder / name)
            for name, tensors in ((MODEL, model), (OPTIMIZER, contents.optimizer))
        }
        return {name: done.result() for name, done in saved.items()}


def publish(
    run_dir: Path,
    step: int,
    contents: Contents,
    write: Callable[[Path, Contents], dict[str, str]] = write_whole,
) -> Path:
    """Save `contents` as the checkpoint of `step`; once this returns, it survives a crash.

    `write` writes the tensors' files. Raises NonFiniteError for weights with nan or infinity,
    ResourceError when the disk does not take it; then nothing is left behind and older checkpoints
    are untouched.
    """
    refuse_link(run_dir)
    if write is write_whole:
        refuse_non_finite(step, contents.model)
    target = checkpoint_dir(run_dir, step)
    temp = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    needed, free = space_needed(contents, write is not write_whole), free_bytes(run_dir)
    try:
        if free is not None and free < needed:
            raise ResourceError("disk full")
        target.parent.mkdir(parents=True, exist_ok=True)
        sync_directory(run_dir)
        remove(temp)
        temp.mkdir()
        _write(temp, step, contents, write(temp, contents))
        swap_in(temp, target)
    except (OSError, ResourceError) as error:
        unsaved = f"checkpoint of step {step} is not saved"
        if errno.EFBIG in (getattr(e, "errno", None) for e in (error, error.__cause__)):
            raise ResourceError(
                f"{unsaved}: a file of it is larger than this process may write",
                hint="ulimit -f unlimited",
            ) from error
        raise ResourceError(
            f"{unsaved}: {getattr(error, 'strerror', None) or error};"
            f" it needs up to {megabytes(needed)}, free in {run_dir}: {megabytes(free)}"
        ) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return target


def verify(
    directory: Path, *, optimizer: bool = True, weights: bool = True, hashes: bool = True
) -> dict[str, Any]:
    """Check a checkpoint against its manifest and return the manifest.

    Without `optimizer` its file is not hashed (generation does not read it), without `weights` the
    model's is not (who reads it hashes it); without `hashes` only presence and sizes are checked.
    CheckpointError says which file and why.
    """
    manifest = read_manifest(directory)
    skipped = {name for name, wanted in ((OPTIMIZER, optimizer), (MODEL, weights)) if not wanted}
    check_files(directory, manifest, set(manifest["files"]) - skipped if hashes else ())
    return manifest


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint directories by step, the oldest first; they may be damaged."""
    parent = run_dir / CHECKPOINTS
    paths = [p for p in parent.glob("step-*") if _STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(paths, key=_step)


def newest_valid(run_dir: Path, log: logging.Logger) -> Path | None:
    """The checkpoint of the highest step that `verify` accepts; see `newest_first`."""
    return next(newest_first(run_dir, log), None)


def newest_first(
    run_dir: Path, log: logging.Logger, *, optimizer: bool = True, weights: bool = True
) -> Iterator[Path]:
    """Checkpoints that `verify` accepts, from the highest step down; damaged ones are reported.

    NewerFormatError when a newer gpt wrote the next one: going back would lose good work.
    """
    damaged: list[tuple[int, CheckpointError]] = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify(path, optimizer=optimizer, weights=weights)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            damaged.append((_step(path), error))
            continue
        found = _step(path)
        for step, problem in damaged:
            rest = f"; using step {found} instead: {step - found} steps lost"
            log.warning("checkpoint skipped: %s%s", problem.message, rest)
        damaged = []
        yield path
    for _, problem in damaged:
        log.warning("checkpoint skipped: %s", problem.message)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has all its files in their sizes; their contents are not checked."""
    try:
        verify(path, hashes=False)
    except NewerFormatError:
        return True  # not ours to judge, so not ours to delete
    except CheckpointError:
        return False
    return True


def is_sound(path: Path) -> bool:
    """Whether a checkpoint is whole and its hashes agree, which a process looks at once for as long
    as its files stay as they are."""
    if not is_whole(path):
        return False
    try:
        problem = damage(path)
    except NewerFormatError:
        return True
    except (CheckpointError, OSError) as error:
        problem = str(error)
    if problem:
        log.warning("not counted as a checkpoint to keep: %s", problem)
    return not problem


def read(
    directory: Path, *, with_optimizer: bool, tensors: bool = True, hashes: bool = True
) -> Contents:
    """Contents of a checkpoint, tensors on the CPU; without its optimizer, that dict is empty, and
    without `tensors` the model's too. Without `hashes` only presence and sizes are checked.

    CheckpointError when it is damaged. Raises `stop.Stopped`.
    """
    manifest = verify(directory, optimizer=with_optimizer, hashes=hashes)
    return Contents(
        model=with_tied(read_tensors(directory / MODEL), manifest["tied"], directory)
        if tensors
        else {},
        optimizer=read_tensors(directory / OPTIMIZER) if with_optimizer and tensors else {},
        state=read_state(directory),
        config_yaml=_read_text(directory / CONFIG),
        tokenizer=read_tokenizer(directory, manifest),
        adapter=read_adapter(directory, manifest),
    )


def read_tokenizer(directory: Path, manifest: dict[str, Any]) -> Tokenizer:
    """The checkpoint's tokenizer. CheckpointError when it is not the one the manifest names."""
    tokenizer = Tokenizer.load(directory / TOKENIZER)
    if tokenizer.identity != manifest["tokenizer"]:
        raise CheckpointError(
            f"{directory / TOKENIZER} holds the tokenizer {tokenizer.identity}, but the model was"
            f" trained with {manifest['tokenizer']}"
        )
    return tokenizer


def read_state(directory: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    return read_json(directory / STATE, SMALL_FILE_BYTES)


def read_adapter(directory: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """adapter.json of a verified checkpoint; None where its weights are whole ones."""
    listed = ADAPTER in manifest["files"]
    return read_json(directory / ADAPTER, SMALL_FILE_BYTES) if listed else None


def write_best(run_dir: Path, step: int, loss: float) -> None:
    """Point best.json at `step`. A loss that is not finite never becomes the best."""
    if not math.isfinite(loss):
        log.warning("validation loss %s at step %d cannot be the best", loss, step)
        return
    write_json_atomic(run_dir / CHECKPOINTS / _BEST, {"step": step, "loss": loss})


def read_best(run_dir: Path) -> tuple[int, float] | None:
    """Step and validation loss (nats per token) of the best checkpoint; None when there is none."""
    path = run_dir / CHECKPOINTS / _BEST
    if not path.exists():
        return None
    try:
        best = read_json(path, _BEST_BYTES)
        step, loss = int(best["step"]), float(best["loss"])
    except (CheckpointError, KeyError, TypeError, ValueError, OverflowError) as error:
        log.warning("%s is damaged (%s); going on without a best checkpoint", path, error)
        return None
    if not math.isfinite(loss):
        log.warning("%s has no finite loss; going on without a best checkpoint", path)
        return None
    return step, loss


def prune(run_dir: Path, keep_last: int, protect: Collection[int]) -> None:
    """Delete all checkpoints but the last `keep_last` (>= 1), the best and the steps `protect`.

    Damaged ones, by their hashes too, do not count as the last, and are left alone after the last
    whole one. What cannot be deleted is a warning.
    """
    refuse_link(run_dir)
    paths, count = list_checkpoints(run_dir), max(keep_last, 1)
    keep = set(protect)
    if best := read_best(run_dir):
        keep.add(best[0])
    if len(paths) <= count or keep.issuperset(_step(path) for path in paths[:-count]):
        return  # so that nothing is hashed for nothing
    last = list(islice(filter(is_sound, reversed(paths)), count))
    keep |= {_step(path) for path in last}
    for path in paths:
        if not last or _step(path) in keep or path.is_symlink() or _step(path) > _step(last[0]):
            continue
        aside = path.with_name(f".del-{path.name}-{os.getpid()}")
        try:
            remove(aside)
            path.rename(aside)  # a half deleted one must not look like a checkpoint
            remove(aside)
        except OSError as error:
            log.warning("cannot delete the old checkpoint %s: %s", path, error.strerror)


def set_aside_after(run_dir: Path, step: int) -> None:
    """Make `step` the newest: later checkpoints are renamed to replaced-step-XXXXXXXX.

    For a run that goes on from an older step: they belong to a course of training that is over,
    and would be taken for the newest. They still load by their path. ResourceError when it fails.
    """
    try:
        for path in list_checkpoints(run_dir):
            if _step(path) > step:
                aside = path.with_name(f"replaced-{path.name}")
                remove(aside)
                path.rename(aside)
                log.info("set aside %s", aside)
        best = read_best(run_dir)
        if best is not None and best[0] > step:
            (run_dir / CHECKPOINTS / _BEST).unlink()
    except OSError as error:
        raise ResourceError(f"cannot set checkpoints of {run_dir} aside: {error}") from error


def clean_leftovers(run_dir: Path) -> None:
    """Remove what a killed process left (.tmp-*, .del-*); hold the run's lock when calling this.

    A whole checkpoint that was being replaced by another of its step when the kill came goes back
    to its place.
    """
    for path in [*run_dir.glob(".tmp-*"), *(run_dir / CHECKPOINTS).glob(".*-*")]:
        deleted = _DELETED_NAME.fullmatch(path.name)
        if not deleted and not path.name.startswith(".tmp-"):
            continue
        try:
            if deleted and not os.path.lexists(path.with_name(deleted[1])) and is_whole(path):
                path.rename(path.with_name(deleted[1]))
            else:
                remove(path)
        except OSError as error:
            log.warning("cannot remove the leftover %s: %s", path, error.strerror)


def space_needed(contents: Contents, in_shares: bool = False) -> int:
    """Bytes on disk of a checkpoint, rounded up; of one that is written `in_shares`, the larger
    file's shares are there beside it."""
    parts = [untied(contents.model)[0], contents.optimizer]
    sizes = [sum(t.numel() * t.element_size() for t in part.values()) for part in parts]
    return sum(sizes) + (max(sizes) if in_shares else 0) + _OVERHEAD_BYTES


def _write(temp: Path, step: int, contents: Contents, hashes: dict[str, str]) -> None:
    """Fill `temp` beside the tensors' files; manifest.json last, everything synced."""
    tied = untied(contents.model)[1]
    # Unlike our other JSON this may hold NaN and Infinity: an exact resume needs the same numbers.
    (temp / STATE).write_text(json.dumps(contents.state, indent=1) + "\n", encoding="utf-8")
    (temp / CONFIG).write_text(contents.config_yaml, encoding="utf-8")
    if contents.adapter is not None:
        text = json.dumps(contents.adapter, indent=1) + "\n"
        (temp / ADAPTER).write_text(text, encoding="utf-8")
    contents.tokenizer.save(temp / TOKENIZER)
    sync_directory(temp / TOKENIZER)
    # It comes last, and syncs the files and `temp`.
    write_manifest(temp, step, tied, contents.tokenizer.identity, hashes)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _step(path: Path) -> int:
    """Step in the manifest, else in the name; never the file times, which a copy changes."""
    try:
        return int(read_manifest(path)["step"])
    except CheckpointError:
        match = _STEP_NAME.fullmatch(path.name)
        return int(match[1]) if match else -1
