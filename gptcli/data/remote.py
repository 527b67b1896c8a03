"""Ranged reads of files on the Hugging Face hub, with retries, and its errors in plain words.

Nothing is downloaded to disk: blocks of a file at a pinned commit are kept in memory.
"""

import difflib
import io
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The library fills this module when it runs, which type checkers do not see.
from huggingface_hub.utils import build_hf_headers, httpx  # type: ignore[attr-defined]

from gptcli import stop
from gptcli.errors import DataError

BLOCK_BYTES = 1024 * 1024  # what the cache holds; a shard of text is as long
AHEAD_BLOCKS = 4  # most blocks of one request: long enough that its delay matters little
CACHE_BLOCKS = 24  # over all files; shards next to each other share blocks
HEAD_BYTES = 4096  # kept of every file: each opening looks for a byte-order mark
BACKOFF_SECONDS = (0.5, 1.0, 2.0, 4.0)  # between the five tries of a read
REQUEST_SECONDS = 30.0  # for listings, where huggingface_hub would wait forever
REMOTE_PATH = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@([^/@]+)/(.+)")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's blob id, or LFS's SHA-256
_AGAIN = (408, 429, 500, 502, 503, 504)


def hub_endpoint() -> str:
    """The hub's address: HF_ENDPOINT as it is now, else the library's."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def prepare_library() -> None:
    """Let no request of the library wait forever (its listings take no timeout of their own), and
    none tell about this machine or ask for what is not the data."""
    constants.HF_HUB_DISABLE_TELEMETRY = True
    session = get_session()
    if session.timeout == httpx.Timeout(None):  # else somebody has set one
        session.timeout = httpx.Timeout(REQUEST_SECONDS)


@contextmanager
def explained(written: str, name: str) -> Iterator[None]:
    """The library's errors as DataErrors; `written` is what the user named, `name` the dataset."""
    token = "set HF_TOKEN, or log in with `hf auth login`"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise DataError(
            f"{written}: the hub is switched off by HF_HUB_OFFLINE",
            hint="unset it, or name local files",
        ) from error
    except GatedRepoError as error:
        raise DataError(
            f"{written}: access must be asked for at {hub_endpoint()}/datasets/{name}", hint=token
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{written}: no dataset {name!r} at {hub_endpoint()}",
            hint=f"check its name; if it is private, {token}",
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(f"{written}: no such revision{_revisions(name)}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        raise DataError(
            f"{written}: the hub answered HTTP {code}",
            hint=token if code in (401, 403) else "try again later",
        ) from error
    except (httpx.HTTPError, OSError, ValueError) as error:  # ValueError: an answer of no JSON
        raise DataError(
            f"{written}: the hub could not be read: {_reason(error)}",
            hint=f"check the network and HF_ENDPOINT ({hub_endpoint()}), or name local files",
        ) from error


def _revisions(name: str) -> str:
    try:
        refs = HfApi(endpoint=hub_endpoint()).list_repo_refs(name, repo_type="dataset")
    except (httpx.HTTPError, OSError, ValueError):
        return ""
    return f"; it has: {some_of(ref.name for ref in (*refs.branches, *refs.tags))}"


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def some_of(names: Iterable[Any], wanted: str = "") -> str:
    """At most a dozen names, those like `wanted` first."""
    known = [str(name) for name in names]
    near = difflib.get_close_matches(wanted, known, n=3)
    known = [*near, *(name for name in known if name not in near)]
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return ", ".join(known[:12]) + more


class _Cache:
    """The blocks read last, of all files, for shards that open a file one after the other; and
    the first bytes of each file."""

    def __init__(self) -> None:
        self.heads: dict[tuple[str, str], bytes] = {}
        self._blocks: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str, int]) -> bytes | None:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def put(self, key: tuple[str, str, int], block: bytes) -> None:
        with self._lock:
            if key[2] == 0:
                self.heads[key[:2]] = block[:HEAD_BYTES]
            self._blocks[key] = block
            self._blocks.move_to_end(key)
            while len(self._blocks) > CACHE_BLOCKS:
                self._blocks.popitem(last=False)


_CACHE = _Cache()


class _Again(Exception):  # noqa: N818  not an error yet
    """The hub asks to try again, or the connection broke; wait at least `seconds`."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class Ranges(io.RawIOBase):
    """Reads a remote file block by block; in order, the next blocks come in a thread."""

    def __init__(self, path: str, size: int | None, identity: str | None) -> None:
        match = REMOTE_PATH.fullmatch(path)
        assert match is not None
        self._path, self._size, self._identity = path, size, identity
        self._repository, self._endpoint = match[1], hub_endpoint()
        prepare_library()
        self._url = hf_hub_url(
            match[1], match[3], repo_type="dataset", revision=match[2], endpoint=self._endpoint
        )
        self._place = 0
        self._last, self._streak = -2, 0  # the block read last; how many came in order
        self._ahead: _Ahead | None = None

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes from the file's start."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; asks the hub only for the end of a file of unknown size."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place}.get(whence)
        place = offset + (self._length() if base is None else base)
        if place < 0:
            raise ValueError(f"negative seek position {place}")
        self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` up to the end of a block; bytes read, 0 at the end of the file."""
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._length() - self._place)
        if wanted <= 0:
            return 0
        number, start = divmod(self._place, BLOCK_BYTES)
        block = _CACHE.heads.get((self._endpoint, self._path), b"")
        if self._place >= len(block):
            block = self._block(number, -(-(start + wanted) // BLOCK_BYTES))
        data = block[start : start + wanted]
        view[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _length(self) -> int:
        if self._size is None:
            head = bytearray()
            self._retried(head, 0, 1)
            assert self._size is not None
        return self._size

    def _block(self, number: int, wanted: int) -> bytes:
        """Block `number`; where it must be fetched, up to `wanted` come at once."""
        if number != self._last:
            self._streak = self._streak + 1 if number == self._last + 1 else 0
            self._last = number
        ahead = self._ahead
        block = _CACHE.get(self._key(number))
        if block is None and ahead is not None and number in ahead.numbers:
            self._ahead = None  # an error is raised once; a later read tries again
            ahead.wait()
            block = _CACHE.get(self._key(number))
        if block is None:
            block = self._load(self._missing(number, min(wanted, AHEAD_BLOCKS)))
        # A shard's own end is no reason to read on: only the third block in order is.
        if self._streak >= 2 and (ahead is None or ahead.done):
            numbers = self._missing(number + 1, min(AHEAD_BLOCKS, 2 ** (self._streak - 2)))
            self._ahead = _Ahead(self, numbers) if numbers else None
        return block

    def _key(self, number: int) -> tuple[str, str, int]:
        return self._endpoint, self._path, number

    def _missing(self, first: int, most: int) -> range:
        """Up to `most` blocks from `first` on, up to one that is at hand."""
        last = first
        end = min(first + most, -(-self._length() // BLOCK_BYTES))
        while last < end and _CACHE.get(self._key(last)) is None:
            last += 1
        return range(first, last)

    def _load(self, numbers: range) -> bytes:
        """Fetch these blocks into the cache and return the first of them."""
        start = numbers.start * BLOCK_BYTES
        data = bytearray()
        self._retried(data, start, min(numbers.stop * BLOCK_BYTES, self._length()))
        for number in numbers:
            low = number * BLOCK_BYTES - start
            _CACHE.put(self._key(number), bytes(data[low : low + BLOCK_BYTES]))
        return bytes(data[:BLOCK_BYTES])

    def _retried(self, data: bytearray, start: int, end: int) -> None:
        """Bytes [start, end) into `data`; a new try goes on behind what has come."""
        failures = 0
        with explained(self._path, self._repository):
            while True:
                stop.raise_if_requested()
                try:
                    return self._request(data, start, end)
                except (httpx.TransportError, _Again) as error:
                    if failures == len(BACKOFF_SECONDS):
                        raise DataError(
                            f"{self._path}: the network failed: {_reason(error)}",
                            hint="try again later; --resume goes on from what a run has saved",
                        ) from error
                    _pause(max(BACKOFF_SECONDS[failures], getattr(error, "seconds", 0.0)))
                    failures += 1

    def _request(self, data: bytearray, start: int, end: int) -> None:
        headers = build_hf_headers()
        headers["Range"] = f"bytes={start + len(data)}-{end - 1}"
        headers["Accept-Encoding"] = "identity"  # ranges count the file's own bytes
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        session = get_session()
        with session.stream("GET", self._url, headers=headers, timeout=seconds) as response:
            if response.status_code in _AGAIN:
                after = response.headers.get("Retry-After", "")
                wait = min(60.0, float(after)) if after.isdecimal() else 0.0
                raise _Again(f"HTTP {response.status_code}", wait)
            if response.status_code != 416:  # the range is not in the file: empty, or changed
                hf_raise_for_status(response)
            self._check(response)
            if not self._size:
                return
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > end - start:
                    raise DataError(f"{self._path}: the hub sent more than the range asked for")
        if len(data) < end - start:
            raise _Again("the answer was cut short")

    def _check(self, response: Any) -> None:
        """Take size and hash from the first answer; DataError when a later one has others."""
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code not in (206, 416) or not total.isdecimal():
            raise DataError(f"{self._path}: the hub does not serve parts of files")
        length = int(total)
        hops = [*response.history, response]
        linked = [hop.headers["X-Linked-Etag"] for hop in hops if "X-Linked-Etag" in hop.headers]
        etag = (linked or [response.headers.get("ETag", "")])[0].removeprefix("W/").strip('"')
        identity = etag if _HASH.fullmatch(etag) else None
        same = not (identity and self._identity) or identity == self._identity
        if self._size not in (None, length) or not same:
            raise DataError(
                f"{self._path}: the file is not the one that was listed any more",
                hint="--allow-data-change goes on with changed data",
            )
        self._size = length
        self._identity = self._identity or identity


class _Ahead:
    """Blocks being fetched in a thread (a daemon: a stalled one does not keep the process)."""

    def __init__(self, ranges: Ranges, numbers: range) -> None:
        self.numbers = numbers
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(ranges,), daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until the blocks are there; raises what the thread raised."""
        while not self.done:
            stop.raise_if_requested()
            self._thread.join(0.1)
        if self._error is not None:
            raise self._error

    def _run(self, ranges: Ranges) -> None:
        try:
            ranges._load(self.numbers)
        except Exception as error:  # raised again where the blocks are read
            self._error = error


def _pause(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        stop.raise_if_requested()
        time.sleep(min(0.1, left))
