"""The HTTP interface: OpenAI's paths, the page, and how it goes."""

import asyncio
import base64
import hashlib
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gptcli.serve.answers import Answer
from gptcli.serve.asked import Served, asked, check_model, parse
from gptcli.serve.constrained import takes_time
from gptcli.serve.guard import Door
from gptcli.serve.refusals import RefusedError
from gptcli.serve.responses import JobResponse
from gptcli.serve.worker import Worker

_BODY_SECONDS = 30.0  # in which a body must have come
_LARGE_BYTES = 2**14  # from here on a body is read in a thread: tokenizing takes its time
_MOST_LARGE = 64  # bodies in memory
_DRAINED_BODIES = 16  # of the allowed size: so much of one that is too large is read, and dropped


def build_app(served: Served, worker: Worker, door: Door, max_body_bytes: int) -> FastAPI:
    """The application; `Guard` stands before it."""
    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=400))
    app.add_exception_handler(Exception, _bug)

    async def decoded(request: Request, chat: bool) -> Response:
        with _counted(request, door) as large:
            data = await _body(request, max_body_bytes)
            if large:
                found = await asyncio.to_thread(lambda: asked(parse(data), chat, served))
            elif takes_time(data):
                with _one_of_few(door):
                    found = await asyncio.to_thread(lambda: asked(parse(data), chat, served))
            else:
                found = asked(parse(data), chat, served)
        answer = Answer(found, served.name, served.loaded.tokenizer)
        return JobResponse(found, answer, worker)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await decoded(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await decoded(request, chat=True)

    model = {
        "id": served.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "gptcli",
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name, served)
        return model

    @app.get("/health")
    async def health() -> JSONResponse:
        well = worker.error is None and not door.closing
        status = "ok" if well else "shutting down" if worker.error is None else "failed"
        texts = {"growing": worker.growing, "waiting": worker.waiting}
        return JSONResponse({"status": status, **texts}, 200 if well else 503)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(*_page())

    return app


@contextmanager
def _counted(request: Request, door: Door) -> Iterator[bool]:
    """Whether the request's body is large; one of few then, for so long as it is read."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) < _LARGE_BYTES:
        yield False
        return
    with _one_of_few(door):
        yield True


@contextmanager
def _one_of_few(door: Door) -> Iterator[None]:
    """One of the requests that are read in threads. RefusedError where there are too many."""
    if door.large >= _MOST_LARGE:
        raise RefusedError(429, "too many large requests at once", code="queue_full")
    door.large += 1
    try:
        yield
    finally:
        door.large -= 1


async def _body(request: Request, most_bytes: int) -> bytes:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another site cannot send unasked
        raise RefusedError(415, "the body is to be JSON, with Content-Type: application/json")
    data = bytearray()
    try:
        await asyncio.wait_for(_read(request, data, most_bytes), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise RefusedError(408, f"the body did not come in {_BODY_SECONDS:.0f} s") from None
    if len(data) > most_bytes:
        raise RefusedError(413, f"the body has more than {most_bytes} bytes", code="body_too_large")
    return bytes(data)


async def _read(request: Request, data: bytearray, most_bytes: int) -> None:
    """Read a body into `data`; of one that is too large only the beginning is kept. The rest is
    read as far as it is not far too much: else the client, still writing, would miss the answer."""
    seen = 0
    async for part in request.stream():
        seen += len(part)
        if len(data) <= most_bytes:
            data += part[: most_bytes + 1]
        if seen > _DRAINED_BODIES * most_bytes:
            return


@cache
def _page() -> tuple[str, int, dict[str, str]]:
    """The page, its status and headers: it may load and run nothing but what is in it."""
    text = resources.files("gptcli.serve").joinpath("page.html").read_text("utf-8")
    script, style = (_hash(text, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text, 200, headers


def _hash(page: str, tag: str) -> str:
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedError)
    headers = {**error.headers, "x-request-id": f"req-{uuid.uuid4().hex}"}
    return JSONResponse(error.to_json(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return await _refused(request, RefusedError(error.status_code, what))


async def _bug(request: Request, error: Exception) -> JSONResponse:
    return await _refused(request, RefusedError(500, "the server failed; its log says how"))
