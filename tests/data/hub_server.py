"""A small server that speaks the hub's API, for tests: datasets and models, listings, redirects and
ranged reads.

`with HubServer() as hub:` serves on 127.0.0.1; set HF_ENDPOINT to `hub.url`. Commits are kept, so
that a branch may move while an old commit stays readable, as on the hub.
"""

import contextlib
import functools
import hashlib
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Kept in LFS, served after a redirect.
LARGE = (".parquet", ".arrow", ".gz", ".zst", ".xz", ".safetensors", ".bin")
_VERBS = "revision|tree|refs|paths-info"


@functools.cache
def blob_id(data: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """Datasets and models (their names differ), and switches for what goes wrong."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()  # readable with a token only
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.sent_bytes = 0  # of file content
        self.drop_after, self.drops = 0, 0  # cut the next `drops` file answers after some bytes
        self.refuse, self.refusals = 503, 0  # answer the next `refusals` file requests so
        self.stall_seconds = 0.0  # before each answer
        self.page = 1000  # entries of one page of a listing
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new state of a repository; the branch moves to it. Returns the commit's hash."""
        state = json.dumps([name, sorted((k, blob_id(v)) for k, v in files.items())])
        commit = hashlib.sha1(state.encode()).hexdigest()
        self.commits[name, commit] = dict(files)
        self.refs.setdefault(name, {})[branch] = commit
        return commit

    def reads(self) -> list[tuple[str, str | None]]:
        """Path and range of each request for a file's content, redirects counted once."""
        return [(path, part) for _, path, part in self.requests if "/resolve/" in path]

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Answers):
        server_state = hub

    return Handler


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has gone: a timeout, a test's end
            self._route()

    def _route(self) -> None:
        hub = self.server_state
        address = urlsplit(self.path)
        query = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        query.update(parse_qs(address.query))
        hub.requests.append((self.command, unquote(address.path), self.headers.get("Range")))
        time.sleep(hub.stall_seconds)
        path = address.path
        if match := re.fullmatch(
            rf"/api/(?:datasets|models)/(.+?)(?:/({_VERBS})(?:/(.*))?)?", path
        ):
            self._api(unquote(match[1]), match[2], match[3] or "", query)
        elif match := re.fullmatch(r"/(?:datasets/)?(.+?)/resolve/([^/]+)/(.+)", path):
            self._resolve(*(unquote(part) for part in match.groups()))
        elif match := re.fullmatch(r"/lfs/(\w+)", path):
            headers = {"X-Repo-Commit": query["commit"][0]}
            self._content(self._by_hash(match[1]), f'"{match[1][:32]}"', headers)
        else:
            self._json({"error": "Not Found"}, 404)

    def _by_hash(self, digest: str) -> bytes:
        files = (data for state in self.server_state.commits.values() for data in state.values())
        return next(data for data in files if hashlib.sha256(data).hexdigest() == digest)

    def _state(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and files of a revision; answers with the hub's error code without one."""
        hub = self.server_state
        if name not in hub.refs:
            self._json({"error": "Repository not found"}, 401, "RepoNotFound")
            return None
        commit = hub.refs[name].get(revision, revision)
        if (name, commit) not in hub.commits:
            self._json({"error": f"Invalid rev id: {revision}"}, 404, "RevisionNotFound")
            return None
        return commit, hub.commits[name, commit]

    def _api(self, name: str, verb: str | None, rest: str, query: dict[str, list[str]]) -> None:
        if verb == "refs":
            refs = self.server_state.refs[name].items()
            branches = [{"name": k, "ref": f"refs/heads/{k}", "targetCommit": v} for k, v in refs]
            self._json({"branches": branches, "tags": [], "converts": []})
            return
        revision, _, folder = rest.partition("/")
        found = self._state(name, unquote(revision) or "main")
        if found is None:
            return
        commit, files = found
        if verb in (None, "revision"):
            siblings = [{"rfilename": k, "size": len(v)} for k, v in files.items()]
            gated = "auto" if name in self.server_state.gated else False
            self._json({"id": name, "sha": commit, "siblings": siblings, "gated": gated})
        elif verb == "paths-info":
            self._json([_entry(path, files[path]) for path in query["paths"] if path in files])
        elif verb == "tree":
            self._tree(files, unquote(folder), query)
        else:
            self._json({"error": "Not Found"}, 404)

    def _tree(self, files: dict[str, bytes], folder: str, query: dict[str, list[str]]) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = sorted(path for path in files if path.startswith(prefix))
        if not inside and folder:
            self._json({"error": "not found"}, 404, "EntryNotFound")
            return
        entries: dict[str, dict[str, Any]] = {}
        for path in inside:
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            entries[path] = _entry(path, files[path])
        if query.get("recursive", ["False"])[0].lower() != "true":
            entries = {k: v for k, v in entries.items() if "/" not in k[len(prefix) :]}
        listed = list(entries.values())
        start, page = int(query.get("cursor", ["0"])[0]), self.server_state.page
        headers = {}
        if start + page < len(listed):
            options = f"recursive={query.get('recursive', ['False'])[0]}&cursor={start + page}"
            address = f"{self.server_state.url}{urlsplit(self.path).path}?{options}"
            headers["Link"] = f'<{address}>; rel="next"'
        self._json(listed[start : start + page], headers=headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        hub = self.server_state
        found = self._state(name, revision)
        if found is None:
            return
        commit, files = found
        if name in hub.gated and not self.headers.get("Authorization"):
            self._json({"error": "Access is restricted"}, 401, "GatedRepo")
        elif path not in files:
            self._json({"error": "Entry not found"}, 404, "EntryNotFound")
        elif hub.refusals:
            hub.refusals -= 1
            self._json({"error": "Try again"}, hub.refuse)
        elif path.endswith(LARGE):
            digest = hashlib.sha256(files[path]).hexdigest()
            self.send_response(302)
            self.send_header("Location", f"{hub.url}/lfs/{digest}?commit={commit}")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(files[path])))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            etag = f'"{blob_id(files[path])}"'
            self._content(files[path], etag, {"X-Repo-Commit": commit})

    def _content(self, data: bytes, etag: str, headers: dict[str, str]) -> None:
        hub = self.server_state
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part, status = data, 200
        if asked:
            low, high = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if low >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            part, status = data[low : high + 1], 206
            headers["Content-Range"] = f"bytes {low}-{high}/{len(data)}"
        self.send_response(status)
        for key, value in {**headers, "ETag": etag, "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.drops:
            hub.drops -= 1
            hub.sent_bytes += len(part[: hub.drop_after])
            self.wfile.write(part[: hub.drop_after])
            self.wfile.flush()
            time.sleep(0.02)  # or the reset overtakes the bytes
            # Close with a reset, as a broken network does.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        hub.sent_bytes += len(part)
        self.wfile.write(part)

    def _json(
        self,
        value: Any,
        status: int = 200,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code is not None:
            self.send_header("X-Error-Code", code)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if path.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
    return entry
