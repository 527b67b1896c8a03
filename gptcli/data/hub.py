"""Corpora on the Hugging Face hub: which files a name means, at which commit.

HF_ENDPOINT and HF_TOKEN are honoured; code in a dataset's repository is never run.
"""

import io
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from datasets import DownloadConfig
from datasets.data_files import (
    EmptyDatasetError,
    get_data_patterns,
    resolve_pattern,
    sanitize_patterns,
)
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, HfApi, HfFileSystem, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

# The library fills this module when it runs, which type checkers do not see.
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from gptcli import stop
from gptcli.config.data_schema import SourceConfig
from gptcli.data.remote import (
    REMOTE_PATH,
    Ranges,
    explained,
    hub_endpoint,
    prepare_library,
    some_of,
)
from gptcli.errors import DataError

_CARD_BYTES = 16 * 1024 * 1024
_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?::([\w.+-]+))?(?:@([\w./+-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_GROUPS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
_READABLE = ", ".join(_GROUPS) + " (also .gz, .zst, .xz)"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a dataset at one commit: `path` is hf://datasets/owner/name@COMMIT/path, `size`
    its bytes, `identity` the SHA-256 of a large file or git's blob id of a small one."""

    path: str
    size: int
    identity: str


@dataclass(frozen=True)
class _Dataset:
    """A dataset at one commit. `written` is the source as the user wrote it."""

    written: str
    name: str
    commit: str
    files: HfFileSystem
    download: DownloadConfig

    @property
    def root(self) -> str:
        return f"hf://datasets/{self.name}@{self.commit}"


def hub_files(source: SourceConfig, known: dict[str, Any] | None = None) -> list[RemoteFile]:
    """The files of `hub:owner/name[:config][@revision]` and `split` (default train).

    The commit of `known` (a saved fingerprint: a mapping whose keys are paths) is used again where
    it names this dataset. Without a card that lists the files, those of the most frequent kind are
    taken. DataError for names that do not exist, unreadable kinds, no access and no network.
    """
    name, config, revision = _parse(source.path)
    endpoint = hub_endpoint()
    with explained(source.path, name):
        prepare_library()
        found = HfApi(endpoint=endpoint).dataset_info(
            name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        commit = _pinned(found.id, found.sha or "", revision, known or {})
        dataset = _Dataset(
            source.path,
            found.id,
            commit,
            HfFileSystem(endpoint=endpoint),
            DownloadConfig(storage_options={"hf": {"endpoint": endpoint}}),
        )
        patterns, listed = _patterns(dataset, config)
        split = source.split or "train"
        if split not in patterns:
            raise DataError(
                f"{source.path}: no split {split!r}; it has: {some_of(patterns, split)}",
                hint="set split of the source",
            )
        paths = _matching(dataset, patterns[split])
        return [_remote_file(dataset, path) for path in _readable(dataset, paths, listed)]


def open_remote(path: str, size: int | None = None, identity: str | None = None) -> BinaryIO:
    """A file of `hub_files`, read by ranges: seekable, buffered, with read-ahead when it is read in
    order. Memory is bounded by the blocks that all files share.

    Reading raises DataError when the network fails five times in a row, or when the file is not
    the one of `size` bytes and `identity` any more (None: not checked).
    """
    if not REMOTE_PATH.fullmatch(path):
        raise DataError(f"{path}: not a file of a hub dataset at a commit")
    return cast(BinaryIO, io.BufferedReader(Ranges(path, size, identity), 64 * 1024))


def _parse(written: str) -> tuple[str, str | None, str | None]:
    """Name, config and revision of a source's path."""
    match = _NAME.fullmatch(written)
    hint = "write hub:owner/name, hub:owner/name:config or hub:owner/name:config@revision"
    if match is None:
        raise DataError(f"{written}: not the name of a hub dataset", hint=hint)
    try:
        validate_repo_id(match[1])
    except HFValidationError as error:
        raise DataError(f"{written}: {str(error).splitlines()[0]}", hint=hint) from error
    return match[1], match[2], match[3]


def _pinned(name: str, current: str, revision: str | None, known: dict[str, Any]) -> str:
    """The commit to read: the known one, though the branch has moved."""
    if revision and _COMMIT.fullmatch(revision):
        return current
    matches = [REMOTE_PATH.fullmatch(path) for path in known]
    commits = {match[2] for match in matches if match and match[1] == name}
    return commits.pop() if len(commits) == 1 else current


def _patterns(dataset: _Dataset, config: str | None) -> tuple[dict[str, list[str]], bool]:
    """Split -> patterns of its files, and whether the card lists them.

    Of the card only `data_files`, `data_dir` and the default's mark are used.
    """
    configs = _configs(dataset)
    try:
        chosen = config or configs.get_default_config_name()
    except ValueError as error:
        raise DataError(f"{dataset.written}: {error}") from error
    if config is not None and config not in configs and (configs or config != "default"):
        has = f"it has: {some_of(configs, config)}" if configs else "it has no configs"
        raise DataError(
            f"{dataset.written}: no config {config!r}; {has}",
            hint=f"write hub:{dataset.name}:CONFIG" if configs else f"write hub:{dataset.name}",
        )
    if chosen is None and configs:
        raise DataError(
            f"{dataset.written}: name one of its configs: {some_of(configs)}",
            hint=f"write hub:{dataset.name}:{next(iter(configs))}",
        )
    settings = configs.get(chosen, {}) if chosen else {}
    listed = settings.get("data_files")
    if listed is not None:
        return cast(dict[str, list[str]], sanitize_patterns(listed)), True
    folder = str(settings.get("data_dir") or "").strip("/")
    _check_inside(dataset, folder)
    try:
        found = get_data_patterns(f"{dataset.root}/{folder}".rstrip("/"), dataset.download)
    except EmptyDatasetError as error:
        raise DataError(f"{dataset.written}: no data files in this dataset") from error
    prefix = f"{folder}/" if folder else ""
    return {str(k): [prefix + pattern for pattern in v] for k, v in found.items()}, False


def _configs(dataset: _Dataset) -> MetadataConfigs:
    """The configs of the dataset's card; empty without one."""
    path = f"{dataset.root}/README.md"
    try:
        size = int(dataset.files.info(path)["size"])
    except FileNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # the commit is gone, not only the card
            raise error.__cause__ from None
        return MetadataConfigs()
    with open_remote(path, size) as file:
        text = file.read(_CARD_BYTES).decode("utf-8", "replace")
    try:
        return MetadataConfigs.from_dataset_card_data(
            DatasetCard(text, ignore_metadata_errors=True).data
        )
    except Exception as error:  # whatever a stranger's YAML makes the parser raise
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{dataset.written}: its card cannot be read: {message}") from error


def _check_inside(dataset: _Dataset, pattern: str) -> None:
    # The library would also read local files and other addresses that a card names.
    if pattern.startswith(("/", "~")) or "::" in pattern or "://" in pattern:
        inside = False
    else:
        inside = ".." not in re.split(r"[/\\]", pattern)
    if not inside:
        raise DataError(f"{dataset.written}: its card names a file outside it: {pattern[:200]!r}")


def _matching(dataset: _Dataset, patterns: list[str]) -> list[str]:
    """Paths of the files, those of each pattern in sorted order, none twice."""
    paths: dict[str, None] = {}
    for pattern in patterns:
        stop.raise_if_requested()
        _check_inside(dataset, pattern)
        try:
            found = resolve_pattern(pattern, dataset.root, download_config=dataset.download)
        except FileNotFoundError:
            continue
        paths.update(dict.fromkeys(sorted(found)))
    if not paths:
        raise DataError(f"{dataset.written}: no file matches {', '.join(map(repr, patterns))}")
    return list(paths)


def _readable(dataset: _Dataset, paths: list[str], listed: bool) -> list[str]:
    """Those that can be read: all where the card lists them, else those of the commonest kind."""
    groups = {path: _group(path) for path in paths}
    bad = [path for path in paths if groups[path] is None]
    if bad and (listed or len(bad) == len(paths)):
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DataError(
            f"{dataset.written}: {bad[0].removeprefix(dataset.root)[1:]}{more}:"
            " not a kind of file that is read here",
            hint=f"read here are {_READABLE}; a dataset that a script makes may have a copy in"
            f" parquet: hub:{dataset.name}@refs/convert/parquet",
        )
    if listed:
        return paths
    [(common, _)] = Counter(group for group in groups.values() if group).most_common(1)
    return [path for path in paths if groups[path] == common]


def _group(path: str) -> str | None:
    name = re.sub(r"\.(gz|zst|xz)$", "", path.lower().rsplit("/", 1)[-1])
    return _GROUPS.get(os.path.splitext(name)[1])


def _remote_file(dataset: _Dataset, path: str) -> RemoteFile:
    found = dataset.files.info(path)
    large = found.get("lfs")
    return RemoteFile(path, int(found["size"]), large.sha256 if large else found["blob_id"])
