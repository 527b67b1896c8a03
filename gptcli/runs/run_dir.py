"""Run directories: making and finding them, the lock that keeps two processes apart, run.json.

Also what else is written whole or not at all: new directories and single files."""

import contextlib
import errno
import json
import logging
import math
import os
import re
import shlex
import shutil
import socket
import stat
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from gptcli import portable
from gptcli.errors import CheckpointError, ConfigError, ResourceError
from gptcli.runs.regular import refuse_special

log = logging.getLogger("gptcli")

CHECKPOINTS = "checkpoints"
LOCK, LOG = ".lock", "log.txt"
RUN_JSON = "run.json"
RUN_JSON_BYTES = 16 * 2**20  # far above what a run writes; keeps a hostile file out of memory
_BEFORE_A_CHECKPOINT = ("run.json", "config.yaml", LOG, "metrics.jsonl", "samples.jsonl")
_HOLDS_A_RUN = "{} holds a run; use --resume to continue or --overwrite to move it aside"
_STAMP = "%Y%m%d-%H%M%S"
MOVED_ASIDE = re.compile(r"\.old-\d{8}-\d{6}(-\d+)?$")
# Answers of file systems that cannot do what was asked at all, as opposed to failing at it.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def runs_root() -> Path:
    """Where runs are made and looked for: $GPT_RUNS, else ./runs."""
    return Path(os.path.expanduser(os.environ.get("GPT_RUNS") or "runs"))


def new_run_dir(name: str, explicit: Path | None, *, overwrite: bool) -> Path:
    """Make the directory of a fresh run of config `name` and write its first run.json.

    `explicit` is used where given (an old run there is moved aside with `overwrite`), else
    NAME-YYYYmmdd-HHMMSS under `runs_root()`. Raises ConfigError when `explicit` cannot be used,
    ResourceError when nothing can be written there or the run to move is in use.
    """
    target = runs_root() if explicit is None else explicit
    try:
        if explicit is None:
            target = _make_unique(target / f"{name}-{datetime.now().strftime(_STAMP)}")
        else:
            _clear(explicit, overwrite)
            explicit.mkdir(parents=True, exist_ok=True)
        for place in (target.parent, target.parent.parent):  # a power cut must not lose the run
            with contextlib.suppress(OSError):  # of a folder that may be written but not read
                sync_directory(place)
    except OSError as error:
        raise ResourceError(f"cannot make the run directory {target}: {error.strerror}") from error
    created = datetime.now(timezone.utc).isoformat()
    with RunLock(target):
        if (target / RUN_JSON).exists():  # another process was faster by a moment
            raise ConfigError(_HOLDS_A_RUN.format(target))
        about = {"name": name, "created": created, "status": "running"}
        write_json_atomic(target / RUN_JSON, about)
    return target


class RunLock:
    """Context manager: this process alone works in `run_dir`. A second one gets ResourceError."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._descriptor = -1

    def __enter__(self) -> "RunLock":
        try:
            flags = os.O_RDWR | os.O_CREAT | portable.PLAIN | portable.NO_LINK
            self._descriptor = os.open(self.run_dir / LOCK, flags, 0o666)
            self._acquire()
        except OSError as error:
            self._close()
            raise ResourceError(f"cannot lock {self.run_dir}: {error.strerror}") from error
        except ResourceError:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()  # the file stays: removing it would let two processes lock two files

    def _acquire(self) -> None:
        try:
            portable.lock(self._descriptor)
        except BlockingIOError:
            holder = os.read(self._descriptor, 300).decode("ascii", "replace")
            match = re.match(r"(\d+) ([\w.-]+)\n", holder)
            who = f"process {match[1]} on {match[2]}" if match else "another process"
            raise ResourceError(
                f"{self.run_dir} is in use by {who}",
                hint="wait for it or stop it; or choose another directory with --run-dir",
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s: this file system has no locks; start no second process", self.run_dir)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())

    def _close(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # a forked child may still hold the descriptor
                portable.unlock(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def runs_by_age(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The runs under `root` with their run.json, the oldest first; none that were moved aside."""
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if is_run_dir(path) and not MOVED_ASIDE.search(path.name):
            about = read_run_json(path)
            found.append((created(about), path, about))
    for _, path, about in sorted(found, key=lambda item: item[0]):
        yield path, about


def newest_run(root: Path, *, having_checkpoint: bool = True) -> Path | None:
    """The run under `root` that was created last, by run.json; runs moved aside do not count."""
    runs = [run for run, _ in runs_by_age(root) if not having_checkpoint or has_checkpoint(run)]
    return runs[-1] if runs else None


def newest_unfinished(root: Path, name: str) -> Path | None:
    """The last created run of config `name` that has a checkpoint and is not finished."""
    runs = [
        run
        for run, about in runs_by_age(root)
        if about.get("name") == name and about.get("status") != "finished" and has_checkpoint(run)
    ]
    return runs[-1] if runs else None


def resume_line(job: str, run_dir: Path, processes: int = 1) -> str:
    """The command line that continues the run, made by `gpt JOB`."""
    directory, config = shlex.quote(str(run_dir)), shlex.quote(str(run_dir / "config.yaml"))
    devices = f" --devices {processes}" if processes > 1 else ""
    return f"gpt {job} {config} --run-dir {directory}{devices} --resume"


def is_run_dir(path: Path) -> bool:
    """Whether `path` is a directory that holds a run."""
    return (path / RUN_JSON).is_file() or (path / CHECKPOINTS).is_dir()


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a published checkpoint is there; says nothing about its health.

    One that was being replaced when a kill came has another name until the next start.
    """
    saved = run_dir / CHECKPOINTS
    return any(saved.glob("step-*")) or any(saved.glob(".del-step-*"))


def read_run_json(run_dir: Path) -> dict[str, Any]:
    """What run.json holds; {} when it is missing or damaged (the latter with a warning)."""
    path = run_dir / RUN_JSON
    if not path.exists():
        return {}
    try:
        return read_json(path, RUN_JSON_BYTES)
    except CheckpointError as error:
        log.warning("%s; going on without it", error.message)
        return {}


def update_run_json(run_dir: Path, **changes: Any) -> None:
    """Set keys of run.json. ResourceError when it cannot be written."""
    write_json_atomic(run_dir / RUN_JSON, {**read_run_json(run_dir), **changes})


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in a regular file of at most `max_bytes`. CheckpointError says what is wrong."""
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        if found.st_size > max_bytes:
            raise CheckpointError(f"{path} has {found.st_size} bytes, more than {max_bytes}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def write_json_atomic(path: Path, obj: Any) -> None:
    """Replace `path` by `obj` as JSON; readers see the old or the new one, never a part."""
    write_atomic(path, json_bytes(obj, indent=2) + b"\n")


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, on disk when this returns.

    ResourceError if it cannot be, ConfigError for what `refuse_special` refuses.
    """
    refuse_special(path)
    temp = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temp, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        sync_directory(path.parent)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


def refuse_existing(out: Path) -> None:
    """ConfigError unless a new file or directory can be at `out`.

    Nothing may be there but an empty directory, and that not the one in which somebody works.
    ResourceError when it cannot be looked at.
    """
    place = Path(os.path.abspath(out))  # `.` has no name and no parents
    above = next((parent for parent in place.parents if os.path.lexists(parent)), place)
    if not above.is_dir():
        raise ConfigError(f"{above} is no directory, so there can be no {out}")
    if not os.path.lexists(out):
        return
    try:
        empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
        if not empty or out.samefile(os.curdir):
            raise ConfigError(f"{out} exists already", hint="name a new one, or remove it first")
    except OSError as error:
        raise ResourceError(f"cannot write {out}: {error.strerror}") from error


@contextlib.contextmanager
def new_place(out: Path) -> Iterator[Path]:
    """The absolute path of `out`, where the block puts something new, by one rename.

    Directories above it are made, and removed again when the block puts nothing there. Raises what
    `refuse_existing` does, and ResourceError when the disk does not take it.
    """
    refuse_existing(out)
    place = Path(os.path.abspath(out))
    missing = [parent for parent in place.parents if not os.path.lexists(parent)]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield place
        sync_directory(place.parent)
    except OSError as error:
        raise ResourceError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # it holds something now
                parent.rmdir()


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory for the block to fill, which then becomes `out`: whole and on disk, or not there.

    Raises what `new_place` raises.
    """
    with new_place(out) as place:
        temp = place.with_name(f".tmp-{place.name}-{os.getpid()}")
        try:
            shutil.rmtree(temp, ignore_errors=True)  # of a process that was killed
            temp.mkdir()
            yield temp
            _sync_all(temp)
            os.rename(temp, place)  # over an empty directory, if one is there
        finally:
            shutil.rmtree(temp, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """fsync a directory, so that the names in it survive a power cut."""
    try:
        portable.sync_names(path)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise


def json_bytes(obj: Any, indent: int | None = None) -> bytes:
    """UTF-8 JSON that every parser reads: non-finite numbers become null."""
    text = json.dumps(_finite(obj), indent=indent, ensure_ascii=False, allow_nan=False)
    # A lone surrogate (an undecodable file name) is written as the JSON escape \udcXX.
    return text.encode("utf-8", "backslashreplace")


def _sync_all(directory: Path) -> None:
    """fsync everything in `directory`, and it."""
    for path in directory.iterdir():
        if path.is_dir():
            _sync_all(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def _finite(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return obj


def _clear(path: Path, overwrite: bool) -> None:
    """Make sure that `path` can become a fresh run directory.

    Hidden files do not count, nor does a run that ended before its first checkpoint.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise ConfigError(f"--run-dir {path} is not a directory")
    if not path.is_dir() or not any(not p.name.startswith(".") for p in path.iterdir()):
        return
    if not is_run_dir(path):
        raise ConfigError(f"--run-dir {path} holds other files and no run; choose a new directory")
    if not has_checkpoint(path):  # it failed before it had anything to lose
        with RunLock(path):
            for name in _BEFORE_A_CHECKPOINT:
                (path / name).unlink(missing_ok=True)
        return
    if not overwrite:
        raise ConfigError(_HOLDS_A_RUN.format(path))
    place = path.resolve()
    if Path.cwd().is_relative_to(place):  # which would move along, and `.` with it
        raise ConfigError(
            f"--overwrite would move {path}, in which you are, aside",
            hint=f"cd {shlex.quote(str(place.parent))}, and --run-dir {shlex.quote(place.name)}",
        )
    with RunLock(path):  # a run that is still going keeps its directory
        aside = _free_name(path.with_name(f"{path.name}.old-{datetime.now().strftime(_STAMP)}"))
        path.rename(aside)
    log.info("moved the run at %s to %s", path, aside)


def _make_unique(path: Path) -> Path:
    while True:
        candidate = _free_name(path)
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:  # another process took the name just now
            if not candidate.exists():
                raise


def _free_name(path: Path) -> Path:
    candidate, number = path, 2
    while os.path.lexists(candidate):
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def created(about: dict[str, Any]) -> datetime:
    """When the run of this run.json began. Not the file times: a copy of a run has new ones."""
    try:
        return datetime.fromisoformat(about["created"]).astimezone(timezone.utc)
    except (KeyError, TypeError, ValueError, OverflowError):
        return datetime.min.replace(tzinfo=timezone.utc)
