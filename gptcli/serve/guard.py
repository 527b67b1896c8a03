"""Who may ask: checks that come before any work, on every request."""

import hmac
import ipaddress
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from gptcli.serve.refusals import RefusedError
from gptcli.serve.responses import send_refusal

_OPEN_TO_ALL = ("/", "/health")  # the page has no secrets: what it asks for needs the token
_MOST_OPEN = 1024  # requests at hand, those of slow readers among them


@dataclass
class Door:
    """Whether requests are taken, and how many are at hand: all, and those whose body is large and
    being read."""

    closing: bool = False
    open: int = 0
    large: int = 0


class Guard:
    """An ASGI application around another one, for those who may use it.

    A page of another site that a browser shows must not reach a server on its user's machine: not
    by a name that points here (DNS rebinding: where `only_local`, the Host header must be a name of
    this machine), nor by a form or a script of its own (their Origin is another one's).
    """

    def __init__(self, app: ASGIApp, door: Door, token: str | None, only_local: bool) -> None:
        self._app, self._door, self._only_local = app, door, only_local
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse."""
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
        except RefusedError as refused:
            await send_refusal(send, refused, f"req-{uuid.uuid4().hex}")
            return
        self._door.open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._door.open -= 1

    def _check(self, scope: Scope, headers: Mapping[bytes, str]) -> None:
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._only_local and not _is_local(host):
            what = f"the Host header {host[:80]!r} is no name of this machine"
            raise RefusedError(403, what, code="host_not_allowed")
        if origin is not None and _netloc(origin) != host.lower():
            what = "no requests from pages of other sites"
            raise RefusedError(403, what, code="origin_not_allowed")
        if scope["path"] in _OPEN_TO_ALL:
            return
        if self._token is not None:
            given = headers.get(b"authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._token):
                what = "a token is needed, as: Authorization: Bearer TOKEN"
                raise RefusedError(401, what, code="invalid_api_key")
        if self._door.closing:
            raise RefusedError(503, "the server is shutting down", code="shutting_down")
        if self._door.open >= _MOST_OPEN:
            raise RefusedError(429, "too many requests at once", code="queue_full")


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
