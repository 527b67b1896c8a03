"""What MODEL, as users write it, means: a run, a checkpoint, a Hugging Face folder, a hub name."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptcli.data.published_files import CONFIG as HF_CONFIG
from gptcli.data.published_files import PICKLES
from gptcli.errors import CheckpointError
from gptcli.runs.manifest import MANIFEST, whole_hint
from gptcli.runs.run_dir import is_run_dir, newest_run, runs_root

_FILES = {*PICKLES, ".safetensors", ".gguf", ".json", ".yaml", ".yml"}
_HUB_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w-][\w./-]*))?", re.ASCII)
# Of folders, not of the models in them.
_COMMON_NAMES = frozenset(
    ("hf", "model", "final", "best", "last", "latest", "snapshot", "snapshots", "checkpoint")
)


@dataclass(frozen=True)
class ModelPlace:
    """Where a model lies. `name` and `commit` are those of the hub's models, else the folder's name
    and None. `hub` is owner/name@commit of the hub's."""

    kind: Literal["run", "checkpoint", "folder"]
    path: Path
    name: str
    commit: str | None = None
    hub: str | None = None


def locate(reference: str | None, *, allow_pickle: bool = False) -> ModelPlace:
    """What MODEL means: a run directory, a checkpoint directory, a folder with config.json, or a
    name on the hub (`gpt2`, `owner/name`, `owner/name@revision`), fetched where need be.

    None is the newest run under `runs_root()` that has a checkpoint. What is there is not verified.
    Raises CheckpointError, `stop.Stopped`.
    """
    if reference is None:
        root = runs_root()
        run_dir = newest_run(root)
        if run_dir is None:
            raise CheckpointError(
                f"no run with a checkpoint under {root}/",
                hint="make one: gpt pretrain configs/small.yaml",
            )
        return ModelPlace("run", run_dir, run_dir.name)
    path = Path(os.path.expanduser(reference))
    if path.is_file():
        raise _not_a_directory(path)
    if not path.is_dir():
        return _elsewhere(reference, allow_pickle)
    name = telling_name(Path(os.path.abspath(path)))
    if os.path.lexists(path / MANIFEST):
        return ModelPlace("checkpoint", path, name)
    if is_run_dir(path):
        return ModelPlace("run", path, name)
    if (path / HF_CONFIG).is_file():
        return ModelPlace("folder", path, name)
    pickled = any(p.suffix in PICKLES for p in path.iterdir())
    raise CheckpointError(
        f"{path} is not a run or a checkpoint (no {MANIFEST}), nor a Hugging Face folder"
        f" (no {HF_CONFIG})",
        hint=_pickle_hint(path) if pickled else whole_hint(path) or "gpt runs list",
    )


def says_little(name: str) -> bool:
    """Whether a folder's name is what many are called: its kind, or a commit."""
    return name in _COMMON_NAMES or re.fullmatch(r"[0-9a-f]{40}", name) is not None


def telling_name(path: Path) -> str:
    """The folder's name, or that of the first one above it whose name tells more."""
    telling = (p.name for p in (path, *path.parents) if p.name and not says_little(p.name))
    return next(telling, path.name)


def hub_name(reference: str) -> tuple[str, str | None] | None:
    """Name and revision where `reference` can only be a name on the hub, else None.

    What looks like a path or a file, or whose folder is there, is meant to be one.
    """
    match = _HUB_NAME.fullmatch(reference)
    if match is None or Path(match[1]).suffix.lower() in _FILES:
        return None
    owner, slash, _ = match[1].partition("/")
    if slash and (Path(owner).exists() or owner == runs_root().name):
        return None
    return match[1], match[2]


def _elsewhere(reference: str, allow_pickle: bool) -> ModelPlace:
    """The hub's model of that name; CheckpointError says what was looked for in vain."""
    elsewhere = runs_root() / reference
    if elsewhere.is_dir():
        hint = f"did you mean {elsewhere}?"
        if hub_name(reference) and "@" not in reference:
            hint += f" (the hub's model of that name: {reference}@main)"
        raise CheckpointError(f"no run, checkpoint or folder at {reference}", hint=hint)
    named = hub_name(reference)
    if named is None:
        message = f"no run, checkpoint or folder at {reference}"
        raise CheckpointError(message, hint="see: gpt runs list")
    # The library is slow to import, and every other kind of MODEL does without it.
    from gptcli.interop.hub import HubLookupError, fetch

    name, revision = named
    try:
        found = fetch(name, revision, allow_pickle=allow_pickle)
    except HubLookupError as error:
        hints = ["see: gpt runs list", *([error.hint] if error.hint else [])]
        raise CheckpointError(
            f"no run, checkpoint or folder at {reference}; as a name on the hub: {error.message}",
            hint="\n".join(hints),
        ) from error
    plain, hub = name.rpartition("/")[2], f"{name}@{found.commit}"
    return ModelPlace("folder", found.folder, plain, found.commit, hub)


def _not_a_directory(path: Path) -> CheckpointError:
    if path.suffix in PICKLES:
        return CheckpointError(
            f"{path} is a pickle file, which can run any code when it is read, so gpt never does",
            hint=_pickle_hint(path.parent),
        )
    beside = (path.parent / MANIFEST, path.parent / HF_CONFIG)
    hint = f"did you mean {path.parent}?" if any(p.is_file() for p in beside) else None
    return CheckpointError(f"{path} is a file; give a run or checkpoint directory", hint=hint)


def _pickle_hint(folder: Path) -> str:
    if (folder / HF_CONFIG).is_file():
        return f"where you trust it: gpt import {folder} OUT --allow-pickle"
    return (
        "where you trust it: put it into a folder as pytorch_model.bin, with its config.json;"
        " then gpt import FOLDER OUT --allow-pickle"
    )
