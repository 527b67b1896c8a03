#!/usr/bin/env python3
"""`gpt serve` under load: many clients at once, one by one, and one against the engine alone.

    python scripts/bench_serve.py --model RUN                  # the newest run without --model
    python scripts/bench_serve.py --model RUN --seconds 5      # to see that it works
    python scripts/bench_serve.py --model RUN --write docs/measured.md

A server of its own is started. `--clients` clients ask for texts of `--tokens` tokens, streamed and
with prompts of their own, each for the next as soon as it has one, for `--seconds`; a request is
lost unless it is answered with 200, every piece and the end of the stream. Then one client does
the same alone. The overhead is the time of one client's text over that of the same tokens decoded
as `gpt generate` does, in this process, taking turns; the median of the ratios. Greedy, so that
texts are the same, and models that end their texts do so in both.

Server and engine race for their threads where OMP_NUM_THREADS does not say, which needs a quiet
machine: where another program takes a core, a step on all cores waits for it. `--write FILE` puts
the table between <!-- bench serve --> and <!-- /bench serve -->.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench_contenders import machine, note
from bench_train_tables import table, write

WORDS = ["In", "the", "beginning", "there", "was", "a", "house", "by", "the", "river", "and", "it"]
ASKED = {"throughput": 4.0, "overhead": 1.1}


@dataclass
class Load:
    """What clients saw."""

    seconds: float = 0.0
    tokens: int = 0
    requests: int = 0
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first piece

    @property
    def tokens_per_second(self) -> float:
        """Of all clients."""
        return self.tokens / self.seconds


def main() -> None:
    given = arguments()
    with server(given.model) as address:
        asyncio.run(load(address, min(given.clients, 8), 1.0, given.tokens))  # warm
        note(f"{given.clients} clients for {given.seconds:g} s")
        many = asyncio.run(load(address, given.clients, given.seconds, given.tokens))
        note(f"one client for {given.seconds / 2:g} s")
        one = asyncio.run(load(address, 1, given.seconds / 2, given.tokens))
        note(f"{given.rounds} rounds of server and engine")
        overheads = {
            "whole": overhead(given, address, stream=False),
            "streamed": overhead(given, address, stream=True),
        }
    text = shown(given, many, one, overheads)
    print(text)
    if given.write:
        write(text, "serve", given.write)
    if many.lost or one.lost:
        sys.exit(f"lost: {(many.lost + one.lost)[:3]}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", metavar="MODEL")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=100, help="new ones of each text")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--write", type=Path, metavar="FILE")
    return parser.parse_args()


@contextmanager
def server(model: str | None) -> Iterator[str]:
    command = [sys.executable, "-m", "gptcli", "serve", "--port", "0"]
    command += [] if model is None else ["--model", model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            sys.exit("the server did not start")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


async def load(address: str, clients: int, seconds: float, tokens: int) -> Load:
    seen = Load()
    began = time.perf_counter()
    end = began + seconds
    await asyncio.gather(*(client(address, i, end, tokens, seen) for i in range(clients)))
    seen.seconds = time.perf_counter() - began
    return seen


async def client(address: str, number: int, end: float, tokens: int, seen: Load) -> None:
    turn = 0
    while time.perf_counter() < end:
        shift = (number * 7 + turn) % len(WORDS)
        prompt = f"{number} {turn} " + " ".join(WORDS[shift:] + WORDS[:shift])
        seen.requests += 1
        turn += 1
        try:
            await asyncio.wait_for(ask(address, prompt, tokens, seen), 120)
        except (OSError, ValueError, asyncio.TimeoutError, asyncio.IncompleteReadError) as error:
            seen.lost.append(f"{type(error).__name__}: {error}")


async def ask(address: str, prompt: str, tokens: int, seen: Load) -> None:
    """One streamed completion over a connection of its own; ValueError when it is not whole."""
    began = time.perf_counter()
    reader, writer = await connected(address, body(prompt, tokens, stream=True))
    first, events, done, usage = 0.0, 0, False, 0
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(status.decode().strip())
        async for line in reader:
            if not line.startswith(b"data: "):
                continue
            first = first or time.perf_counter() - began
            if line.startswith(b"data: [DONE]"):
                done = True
            elif b'"choices": []' in line:
                usage = json.loads(line[6:])["usage"]["completion_tokens"]
            else:
                events += 1
    finally:
        writer.close()
    if not done or not usage or not events:
        raise ValueError(f"a stream that ended early: {events} pieces, done {done}")
    seen.tokens += usage
    seen.first.append(first)


async def connected(address: str, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer


def body(prompt: str, tokens: int, stream: bool) -> bytes:
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(asked).encode()


def overhead(given: argparse.Namespace, address: str, stream: bool) -> list[float]:
    """Seconds of the server's answers over those of the engine for the same text, round by round;
    who is first changes."""
    engine = Engine(given.model, given.tokens)
    prompt, ratios = " ".join(WORDS), list[float]()
    asyncio.run(answered(address, prompt, given.tokens, stream))
    engine.seconds(prompt, given.tokens)
    for turn in range(given.rounds):
        taken = [0.0, 0.0]
        for side in (0, 1) if turn % 2 else (1, 0):
            if side:
                taken[1] = engine.seconds(prompt, given.tokens)
            else:
                taken[0] = asyncio.run(answered(address, prompt, given.tokens, stream))
        ratios.append(taken[0] / taken[1])
    return ratios


async def answered(address: str, prompt: str, tokens: int, stream: bool) -> float:
    began = time.perf_counter()
    reader, writer = await connected(address, body(prompt, tokens, stream))
    data = await reader.read()
    seconds = time.perf_counter() - began
    writer.close()
    if b" 200 " not in data[:20]:
        raise ValueError(data[:200])
    return seconds


class Engine:
    """What `gpt generate` decodes with, in this process; kernels and threads are raced before."""

    def __init__(self, model: str | None, tokens: int) -> None:
        from gptcli.device import resolve_device
        from gptcli.generation.kernel_race import best_threads, packed_for
        from gptcli.runs.load import load_model

        self._loaded = load_model(model, resolve_device("auto").torch)
        self._decoder = packed_for(self._loaded.model, 1, tokens)
        self._threads = best_threads(self._decoder, 1, tokens)

    def seconds(self, prompt: str, tokens: int) -> float:
        """Seconds from a prompt to its continuation."""
        from gptcli.generation.engine import Request, decode
        from gptcli.generation.kernel_race import decode_threads
        from gptcli.generation.prompt import encode_prompt
        from gptcli.generation.sampling import Sampling

        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        began = time.perf_counter()
        settings = Sampling(temperature=0.0, max_new_tokens=tokens)
        request = Request(prompt, encode_prompt(tokenizer, prompt), settings)
        with decode_threads(self._threads):
            list(decode(model, tokenizer, [request], decoder=self._decoder))
        return time.perf_counter() - began


def shown(
    given: argparse.Namespace, many: Load, one: Load, overheads: dict[str, list[float]]
) -> str:
    times = many.tokens_per_second / one.tokens_per_second
    first = sorted(many.first)
    p95 = first[min(len(first) - 1, int(0.95 * len(first)))] if first else float("nan")
    rows = [
        [f"requests of {given.clients} clients in {many.seconds:.1f} s", f"{many.requests}"],
        ["lost", f"{len(many.lost)}"],
        ["new tokens/s together", f"{many.tokens_per_second:,.0f}"],
        ["new tokens/s one by one", f"{one.tokens_per_second:,.0f}"],
        ["together against one by one", f"{times:.1f} (asked {ASKED['throughput']:g})"],
        ["time to first token, median", f"{statistics.median(first or [0.0]):.3f} s"],
        ["time to first token, 95 %", f"{p95:.3f} s"],
    ]
    for name, ratios in overheads.items():
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        figure = f"{statistics.median(ratios):.2f} ({spread}; asked {ASKED['overhead']:g})"
        rows.append([f"one client's time against gpt generate's, {name}", figure])
    about = f"{given.tokens} new tokens a text; {os.cpu_count()} cores, which the clients share"
    return "\n\n".join(
        [table(["what", "figure"], rows), f"{about}; {machine('fastapi', 'uvicorn')}"]
    )


if __name__ == "__main__":
    main()
