"""`gpt serve` as a process of its own, and plain HTTP to it."""

import http.client
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from forked import Forked

from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.model.gpt import GPT, initialise
from gptcli.runs.checkpoint import Contents, publish

ENDLESS = 10_000_000  # tokens, for texts that end only by being cancelled
FOR_EVER = {"prompt": "a", "max_tokens": ENDLESS, "temperature": 0}  # no end of text is drawn


def make_model(folder: Path, *, damaged: int | None = None, **more: Any) -> Path:
    """A checkpoint of a random model on bytes, most of which come as letters; one `damaged` token
    makes its logits nan; `more` are keys of its config."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 128, **more}
    norm = {} if damaged is None else {"norm": "layernorm"}
    shape = ModelConfig.model_validate({**sizes, **norm, "tie_embeddings": False})
    config = Config(name="tiny", model=shape)
    tokenizer = Tokenizer.of_bytes()
    model = GPT(shape, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.head.weight.normal_(std=0.6, generator=generator)
        model.head.weight[:32] *= 0.1
        model.head.weight[127:256] *= 0.4
        model.head.weight[256] = 0.0
        if damaged is not None:
            model.wte.weight[damaged] = 3e38  # finite; the norm's mean is not
    folder.mkdir(parents=True)
    publish(folder, 10, Contents(model.state_dict(), {}, {}, dump_config(config), tokenizer))
    return folder


class Server:
    """A running server."""

    def __init__(self, arguments: list[str], before: Callable[[], object] | None = None) -> None:
        self.process = Forked(["serve", "--port", "0", *arguments], before=before)
        self.address = self.process.stdout.readline().decode().strip()
        self.ended: tuple[int, str] | None = None

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def connect(self) -> socket.socket:
        """A connection with nothing sent."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (else text) and headers of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        try:
            connection.request(method, path, data, given)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        kind = answer.headers.get("content-type", "")
        found = json.loads(text) if kind.startswith("application/json") else text
        return answer.status, found, {k.lower(): v for k, v in answer.headers.items()}

    def complete(self, **asked: Any) -> tuple[int, Any, dict[str, str]]:
        """POST /v1/completions."""
        return self.send("POST", "/v1/completions", asked)

    def text(self, **asked: Any) -> str:
        """The one text of a completion that must succeed."""
        status, found, _ = self.complete(**asked)
        assert status == 200, found
        return found["choices"][0]["text"]

    def streaming(self, **asked: Any) -> socket.socket:
        """A connection that has asked for a stream, of which nothing was read."""
        data = json.dumps({**asked, "stream": True}).encode()
        connection = self.connect()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def health(self) -> dict[str, Any]:
        return self.send("GET", "/health")[1]

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and stderr."""
        if self.ended is None:
            self.process.send(number)
            self.ended = self.process.wait()
        return self.ended


@contextmanager
def serving(*arguments: str, before: Callable[[], object] | None = None) -> Iterator[Server]:
    """A server for the block; what it allows to finish at its end is nothing."""
    server = Server(["--grace", "0", *arguments], before)
    try:
        yield server
    finally:
        server.end()


def places(count: int) -> Callable[[], None]:
    """So many texts grow at once: to be run in the server's process."""

    def patch() -> None:
        from gptcli.serve import worker

        worker.MOST_ROWS = count

    return patch


def resident_bytes(process: int) -> int:
    """Memory of a process, read from /proc."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
