"""Models on the Hugging Face hub: their files fetched once into the library's cache, at a commit.

HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE are honoured. Only configs, tokenizers and
safetensors are fetched; code and, unless asked for, pickles never are.
"""

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The library fills this module when it runs, which type checkers do not see.
from huggingface_hub.utils import httpx, tqdm  # type: ignore[attr-defined]

from gptcli import stop
from gptcli.data.published_files import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    MERGES,
    PICKLE,
    PICKLE_INDEX,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCABULARY,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from gptcli.data.remote import hub_endpoint, prepare_library
from gptcli.errors import CheckpointError, ResourceError
from gptcli.interop.hf_files import weight_files

log = logging.getLogger("gptcli")

LOOKUP_SECONDS = 10.0  # a mistyped run is looked up, too: where no network answers, say so soon
_WORKERS = 4  # files fetched at the same time
_TOKEN = "set HF_TOKEN, or log in with `hf auth login`"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ABOUT = (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    VOCABULARY,
    MERGES,
    CHAT_TEMPLATE,
)
_SHARDS = "model-*-of-*.safetensors"
_PICKLE_SHARDS = "pytorch_model-*-of-*.bin"


class HubLookupError(CheckpointError):
    """The hub has no such model, or does not say."""


@dataclass(frozen=True)
class HubModel:
    """A fetched model: `folder` holds its files at `commit`."""

    name: str
    folder: Path
    commit: str


def fetch(name: str, revision: str | None, *, allow_pickle: bool = False) -> HubModel:
    """The model `name` (gpt2, owner/name) at a branch, tag or commit, fetched where it is not yet
    in the cache. Where the hub cannot be reached, what is in the cache is taken.

    Raises HubLookupError when there is no such model or no way to know, CheckpointError when it
    has no files to read here or the download fails, ResourceError when the disk of the cache is
    full, `stop.Stopped`.
    """
    prepare_library()
    api = HfApi(endpoint=hub_endpoint())
    try:
        with _explained(name, revision):
            info = api.model_info(
                name, revision=revision, timeout=LOOKUP_SECONDS, files_metadata=True
            )
    except HubLookupError as error:
        cached = _cached(name, revision, allow_pickle)
        if cached is None or not _is_unreachable(error.__cause__):
            raise
        log.info(f"{name} is taken from the cache: {error.message}")
        return cached
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or []}
    files = _chosen(name, sizes, allow_pickle)
    missing = [file for file in files if not _is_cached(name, file, info.sha)]
    if missing:
        megabytes = sum(sizes[file] for file in missing) / 1e6
        log.info(
            f"fetching {name} at {str(info.sha)[:12]} from {hub_endpoint()}:"
            f" {len(missing)} files, {megabytes:,.1f} MB"
        )
    with _explained(name, revision):
        folder = snapshot_download(
            name,
            revision=revision,
            endpoint=hub_endpoint(),
            allow_patterns=files,
            max_workers=_WORKERS,
            tqdm_class=_Silent,
        )
    return HubModel(name, Path(folder), Path(folder).name)


class _Silent(tqdm):
    """The library's progress bar, which draws nothing and ends the download on a stop request."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **{**keywords, "disable": True})  # type: ignore[no-untyped-call]

    def update(self, n: float | None = 1) -> bool | None:
        """Called for each piece that has come."""
        stop.raise_if_requested()
        return None


def _chosen(name: str, sizes: dict[str, int], allow_pickle: bool) -> list[str]:
    """The files to fetch, of those in the repository's own folder."""
    if CONFIG not in sizes:
        raise CheckpointError(f"{name} on the hub has no {CONFIG}: it holds no model to read")
    weights = _weights(sizes, WEIGHTS, WEIGHTS_INDEX, _SHARDS)
    pickles = _weights(sizes, PICKLE, PICKLE_INDEX, _PICKLE_SHARDS)
    if not weights and pickles and not allow_pickle:
        raise CheckpointError(
            f"{name} on the hub has its weights in pickles only ({pickles[-1]}), which are never"
            " fetched unless that is asked for",
            hint=f"where you trust it: gpt import {name} OUT --allow-pickle",
        )
    if not weights and not pickles:
        raise CheckpointError(
            f"{name} on the hub has no {WEIGHTS}: its weights cannot be read here"
        )
    return [file for file in _ABOUT if file in sizes] + (weights or pickles)


def _weights(sizes: dict[str, int], whole: str, index: str, shards: str) -> list[str]:
    """The one file, else the index and its shards; none where neither is there."""
    if whole in sizes:
        return [whole]
    pattern = re.escape(shards).replace(r"\*", r"\d+")
    found = sorted(file for file in sizes if re.fullmatch(pattern, file))
    return [index, *found] if index in sizes and found else []


def _is_cached(name: str, file: str, commit: str | None) -> bool:
    return isinstance(try_to_load_from_cache(name, file, revision=commit), str)


def _cached(name: str, revision: str | None, allow_pickle: bool) -> HubModel | None:
    """What an earlier fetch left in the cache, if that is all of it."""
    try:
        config = try_to_load_from_cache(name, CONFIG, revision=revision)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
        weights = [path.name for path in weight_files(folder, allow_pickle)]
        # Nothing is fetched: the library compares with the hub's listing, where it has kept that.
        snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=[*_ABOUT, *weights]
        )
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        return None
    return HubModel(name, folder, folder.name)


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether the hub did not answer, rather than answer no."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return not isinstance(error, HFValidationError)


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """The library's errors in plain words."""
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if isinstance(error, LocalEntryNotFoundError) and not isinstance(
            error.__cause__, OfflineModeIsEnabled
        ):
            raise _unread(error.__cause__ or error) from error
        raise HubLookupError(
            f"the hub is switched off by HF_HUB_OFFLINE and {name} is not in its cache",
            hint="unset HF_HUB_OFFLINE to ask the hub",
        ) from error
    except GatedRepoError as error:
        raise HubLookupError(
            f"access to {name} must be asked for at {hub_endpoint()}/{name}", hint=_TOKEN
        ) from error
    except RepositoryNotFoundError as error:
        raise HubLookupError(
            f"no model {name!r} at {hub_endpoint()}", hint=f"if it is private, {_TOKEN}"
        ) from error
    except RevisionNotFoundError as error:
        raise HubLookupError(f"{name} on the hub has no revision {revision!r}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        raise HubLookupError(
            f"the hub answered HTTP {code} about {name}",
            hint=_TOKEN if code in (401, 403) else "try again later",
        ) from error
    except HFValidationError as error:
        raise HubLookupError(f"{name!r} is no name of the hub's") from error
    except (httpx.HTTPError, OSError, ValueError) as error:  # ValueError: an answer of no JSON
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise ResourceError(
                f"no space left on the disk for {name} in {constants.HF_HUB_CACHE}",
                hint="make room, or set HF_HUB_CACHE to a folder on another disk",
            ) from error
        raise _unread(error) from error


def _unread(error: BaseException) -> HubLookupError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return HubLookupError(
        f"the hub could not be read: {reason}",
        hint=f"check the network and HF_ENDPOINT ({hub_endpoint()})",
    )
