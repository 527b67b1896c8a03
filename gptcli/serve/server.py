"""`serve`: the model behind a socket, from the first request to the last text."""

import asyncio
import ipaddress
import logging
import re
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptcli import stop
from gptcli.config.schema import ServeConfig
from gptcli.config.units import parse_bytes
from gptcli.data.chat_template import ChatTemplate
from gptcli.device import computed_aside
from gptcli.errors import ConfigError, ResourceError
from gptcli.runs.load import LoadedModel
from gptcli.serve.app import build_app
from gptcli.serve.asked import Served
from gptcli.serve.guard import Door, Guard
from gptcli.serve.worker import Job, Worker

log = logging.getLogger("gptcli")

_POLL_SECONDS = 0.05
_LAST_SECONDS = 2  # for texts that were ended to reach their clients
_SILENT_SECONDS = 30  # in which a client must send its request's head, or take what is sent
_BACKLOG = 1024
_MOST_CONNECTIONS = 900  # a process may have 1,024 files open, as a rule


def bind(config: ServeConfig) -> socket.socket:
    """The address that `config` names, taken but not listened to yet. ResourceError."""
    where = f"{config.host}:{config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited: who takes nothing is cut off
            silent = int(_SILENT_SECONDS * 1000)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silent)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no host name"
        raise ResourceError(
            f"cannot serve at {where}: {reason}", "gpt serve --port 0  # takes any free port"
        ) from error
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(bound.getsockname()[0].split("%")[0]).is_loopback


def address_of(bound: socket.socket) -> str:
    """The URL at which it can be reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    loaded: LoadedModel,
    config: ServeConfig,
    bound: socket.socket,
    *,
    token: str | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Answer clients at the address `bound` until a stop is requested; then texts that grow have
    `config.grace` seconds, or until a second request, and are ended as they are.

    `on_ready` is called when clients may come. Raises ConfigError for a token that no header can
    carry, RuntimeError when decoding ended by itself.
    """
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise ConfigError(
            "the token is empty, or has blanks or characters that no header can carry",
            "python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    asyncio.run(_serve(loaded, config, bound, token, on_ready))


async def _serve(
    loaded: LoadedModel,
    config: ServeConfig,
    bound: socket.socket,
    token: str | None,
    on_ready: Callable[[], None],
) -> None:
    loop = asyncio.get_running_loop()

    def tell(jobs: Iterable[Job]) -> None:
        loop.call_soon_threadsafe(_call_all, [job.on_change for job in jobs])

    loaded, template, ends = ending_with_answers(loaded)
    worker = computed_aside(lambda: Worker(loaded, config.max_queue, config.max_tokens, tell))
    door = Door()
    served = Served(loaded, loaded.name, template, config.max_tokens, config.max_n, ends)
    app = build_app(served, worker, door, parse_bytes(config.max_body))
    server = _server(app, Guard(app, door, token, is_loopback(bound)))
    worker.start()
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        with _logged(), stop.postponed():
            await _until(lambda: server.started or serving.done())
            on_ready()
            await _until(
                lambda: stop.times_requested() > 0 or worker.error is not None or serving.done()
            )
            door.closing = True
            await _finished(door, config.grace)
    finally:
        worker.close()
    with _logged():
        await asyncio.to_thread(worker.join)
        await _until(lambda: not door.open, _LAST_SECONDS)
        server.should_exit = True
        await serving
    if worker.error is not None:
        raise RuntimeError("decoding ended") from worker.error


def ending_with_answers(
    loaded: LoadedModel,
) -> tuple[LoadedModel, ChatTemplate | None, tuple[str, ...]]:
    """The model, whose texts also end with the token that ends an answer of its chat template; the
    template, None for one that does not work; and the texts before which its answers end."""
    template = _template(loaded)
    if template is None:
        return loaded, None, ()
    end = template.answer_end()
    ending = loaded.tokenizer.ending_at(end.tokens)
    return replace(loaded, tokenizer=ending), template, end.texts


def _call_all(calls: Iterable[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _template(loaded: LoadedModel) -> ChatTemplate | None:
    try:
        return ChatTemplate(loaded.tokenizer)
    except ConfigError as error:
        log.warning("no chats: %s", error.message)
        return None


async def _until(condition: Callable[[], bool], seconds: float = float("inf")) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition() and loop.time() < end:
        await asyncio.sleep(_POLL_SECONDS)


async def _finished(door: Door, grace_seconds: float) -> None:
    if door.open:
        log.info("%d requests have %g s to finish", door.open, grace_seconds)
    times = stop.times_requested()
    await _until(lambda: not door.open or stop.times_requested() > times, grace_seconds)


class _Server(uvicorn.Server):
    """Signals are not its own: see `gptcli.stop`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the handlers as they are."""
        yield


def _server(app: FastAPI, guard: Guard) -> _Server:
    config = uvicorn.Config(
        guard,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    return _Server(config)


class _Protocol(H11Protocol):  # always this one: it bounds the size of a request's head
    """A connection that is closed when its client is silent for long: one that sends half of a
    request's head, or none, or does not read what it is sent."""

    _silent: asyncio.TimerHandle | None = None
    _awaiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Await the first request; of too many connections this one is closed."""
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.close()
        self._await_request()

    def on_response_complete(self) -> None:
        """Await the next one."""
        super().on_response_complete()
        self._await_request()

    def pause_writing(self) -> None:
        """What was sent is not read."""
        super().pause_writing()
        self._silent = self.loop.call_later(_SILENT_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It is."""
        super().resume_writing()
        if self._silent is not None:
            self._silent.cancel()
            self._silent = None

    def _await_request(self) -> None:
        if self._awaiting is not None:
            self._awaiting.cancel()
        before: Any = self.cycle  # the last request
        self._awaiting = self.loop.call_later(_SILENT_SECONDS, self._close_unless_asked, before)

    def _close_unless_asked(self, before: Any) -> None:
        if self.cycle is before:
            self.transport.close()


@contextmanager
def _logged() -> Iterator[None]:
    """Failures that uvicorn logs are told as ours; what clients do wrong is not."""

    class Passed(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().strip()
            if record.exc_info:
                text += "\n" + "".join(traceback.format_exception(*record.exc_info))
            log.error("%s", text)

    handler, theirs = Passed(logging.ERROR), logging.getLogger("uvicorn.error")
    level, propagate = theirs.level, theirs.propagate
    theirs.addHandler(handler)
    theirs.setLevel(logging.ERROR)
    theirs.propagate = False
    try:
        yield
    finally:
        theirs.removeHandler(handler)
        theirs.setLevel(level)
        theirs.propagate = propagate
