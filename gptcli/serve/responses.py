"""Answers on the wire: whole as JSON, or piece by piece as server-sent events.

A client that goes away ends its texts, so that their places are free for others.
"""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptcli.generation.row import Generated
from gptcli.serve.answers import Answer
from gptcli.serve.asked import Asked
from gptcli.serve.refusals import RefusedError
from gptcli.serve.worker import ClosedError, Job, QueueFullError, Worker

_CLOSING = "the server is shutting down"


class JobResponse(Response):
    """The answer to one request, which is decoded from its making on."""

    def __init__(self, asked: Asked, answer: Answer, worker: Worker) -> None:
        super().__init__()
        self._asked, self._answer, self._worker = asked, answer, worker
        self._event = asyncio.Event()
        self._job = Job(asked.requests, asked.stream, self._event.set)
        try:
            worker.submit(self._job)
        except QueueFullError:
            waiting = f"{worker.waiting} texts wait already; try again later"
            raise RefusedError(429, waiting, code="queue_full") from None
        except ClosedError:
            raise RefusedError(503, _CLOSING, code="shutting_down") from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; return early when the client is gone."""
        gone = asyncio.ensure_future(_until_gone(receive))
        gone.add_done_callback(lambda _: self._event.set())
        try:
            if self._asked.stream:
                await self._stream(gone, send)
            else:
                await self._whole(gone, send)
        finally:
            self._worker.cancel(self._job)
            gone.cancel()

    async def _whole(self, gone: "asyncio.Future[None]", send: Send) -> None:
        while not self._job.done:
            await self._event.wait()
            self._event.clear()
            if gone.done():
                return
        if self._job.error is not None:
            await send_json(send, *_failed(self._job.error), self._answer.id)
            return
        await send_json(send, 200, self._answer.whole(_results(self._job)), {}, self._answer.id)

    async def _stream(self, gone: "asyncio.Future[None]", send: Send) -> None:
        begun = False
        while True:
            await self._event.wait()
            self._event.clear()
            if gone.done():
                return
            done = self._job.done  # asked before the news: what comes between is in these
            data = b"".join(_event(self._answer.chunk(news)) for news in self._job.take())
            if self._job.error is not None and not begun:
                await send_json(send, *_failed(self._job.error), self._answer.id)
                return
            if data and not begun:
                begun = True
                await _send_start(send, 200, _SSE, self._answer.id)
                data = _events(self._answer.opening()) + data
            if done:
                await _send_body(send, data + self._closing(), more=False)
                return
            if data:
                await _send_body(send, data, more=True)

    def _closing(self) -> bytes:
        if self._job.error is not None:
            return _event(_failed(self._job.error)[1])
        last = b""
        if self._asked.include_usage:
            last = _event(self._answer.usage_chunk(_results(self._job)))
        return last + b"data: [DONE]\n\n"


_SSE = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}


async def send_json(
    send: Send, status: int, body: dict[str, Any], headers: dict[str, str], request_id: str
) -> None:
    """Answer with JSON."""
    data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    length = {"content-type": "application/json", "content-length": str(len(data))}
    await _send_start(send, status, length | headers, request_id)
    await _send_body(send, data, more=False)


async def send_refusal(send: Send, refused: RefusedError, request_id: str) -> None:
    """Answer with an error."""
    await send_json(send, refused.status, refused.to_json(), refused.headers, request_id)


async def _send_start(send: Send, status: int, headers: dict[str, str], request_id: str) -> None:
    given = {**headers, "x-request-id": request_id}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})


async def _send_body(send: Send, data: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


def _events(chunks: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(map(_event, chunks))


def _results(job: Job) -> list[Generated]:
    results = [result for result in job.results if result is not None]
    assert len(results) == job.count
    return results


def _failed(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """What a client gets for texts that were lost: no details, which are in the server's log."""
    if isinstance(error, ClosedError):
        refused = RefusedError(503, _CLOSING, code="shutting_down")
    else:
        refused = RefusedError(500, "the model failed; the server's log says how")
    return refused.status, refused.to_json(), refused.headers
