"""Whatever a client sends: a clear status for it, and the others unharmed."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from serving import ENDLESS, FOR_EVER, Server, make_model, places, resident_bytes, serving

KNOWN = {"prompt": "Once", "max_tokens": 8, "temperature": 0}
BESIDE = {"prompt": "Once" * 20, "max_tokens": 1500, "temperature": 0}  # for a while


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a", []]}, "prompt"),
        ({"prompt": [1, 257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "x" * 200}, "prompt"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": ["a"] * 9, "n": 2}, "n"),
        ({"prompt": ["a"] * 100_000}, "n"),
        ({"prompt": "a", "max_tokens": 401}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "8"}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": True}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "min_p": 2}, "min_p"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stop": "x" * 257}, "stop"),
        ({"prompt": "a", "stop": {"x": 1}}, "stop"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": 1, "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 3, "n": 2}, "best_of"),
        ({"prompt": "a", "suffix": "none"}, "suffix"),
        ({"prompt": "a", "logit_bias": {"1": 5}}, "logit_bias"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"prompt": "a", "beams": 4}, "beams"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
)
def test_a_field_at_fault_is_named(server: Server, asked: dict[str, Any], param: str) -> None:
    """Guards: settings that are ignored or rounded, and a 500 for what a client got wrong."""
    status, found, _ = server.complete(**asked)
    assert (status, found["error"]["param"]) == (400, param), found
    assert found["error"]["type"] == "invalid_request_error"
    assert len(found["error"]["message"]) < 300


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "messages[0].name"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"if": {}}},
                }
            },
            "response_format",
        ),
        ({"choices": []}, "choices"),
        ({"choices": [3]}, "choices.0"),
        ({"regex": "("}, "regex"),
        ({"regex": "a", "choices": ["a"]}, "regex"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_completion_tokens": 401}, "max_completion_tokens"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_a_field_of_a_chat_at_fault_is_named(
    server: Server, asked: dict[str, Any], param: str
) -> None:
    """Guards: tools, pictures and formats that a client believes to be used."""
    messages = (
        {} if "messages" in asked or not asked else {"messages": [{"role": "user", "content": "a"}]}
    )
    status, found, _ = server.send("POST", "/v1/chat/completions", {**messages, **asked})
    assert (status, found["error"]["param"]) == (400, param), found


def test_fields_that_ask_for_nothing_are_taken(server: Server) -> None:
    """Guards: clients that send every field they know, most of them null."""
    given = {"best_of": 1, "suffix": None, "logit_bias": {}, "user": "u", "n": None, "stop": None}
    assert server.text(**KNOWN, **given) == server.text(**KNOWN)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", 400),
        (b'{"prompt": "' + b"x" * 1_100_000 + b'"}', 413),
        (b"x" * 5_000_000, 413),
    ],
    ids=["empty", "cut", "list", "nan", "bytes", "surrogate", "deep", "digits", "large", "huge"],
)
def test_bodies_that_are_no_request(server: Server, body: bytes, status: int) -> None:
    """Guards: a parser's error as a 500, a body that fills the memory."""
    found = server.send("POST", "/v1/completions", body)
    assert found[0] == status, found[1]
    assert set(found[1]["error"]) == {"message", "type", "param", "code"}
    assert server.text(**KNOWN)


def test_paths_and_methods_that_are_not_there(server: Server) -> None:
    """Guards: errors in another shape than all others, and pages that load from elsewhere."""
    for method, path, status in [
        ("GET", "/v1/completions", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/../../etc/passwd", 404),
    ]:
        found = server.send(method, path)
        assert (found[0], type(found[1]["error"]["message"])) == (status, str)


def test_other_sites_cannot_use_a_server_on_this_machine(server: Server) -> None:
    """Guards: DNS rebinding, and forms and scripts of a page that the user's browser shows."""
    body = {"prompt": "a"}

    def asked(**headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return server.send("POST", "/v1/completions", body, named)[0]

    assert asked(Host="attacker.example") == 403
    assert asked(Host="127.0.0.1.attacker.example") == 403
    assert asked(Host="[::1") == 403
    assert asked(Origin="http://attacker.example") == 403
    assert asked(Origin="null") == 403
    assert asked(Content_Type="text/plain") == 415
    assert asked(Host="localhost:1", Origin="http://localhost:1") == 200
    status, _, headers = server.send("OPTIONS", "/v1/completions", None, {"Origin": "null"})
    assert status == 403
    assert not any(name.startswith("access-control") for name in headers)


def test_tokens(model: Path) -> None:
    """Guards: a path without the check, a token that is compared in part, one that is told."""
    secret = "s3cret-tail"
    environment = {"GPT_SERVE_TOKEN": secret}
    with serving("--model", str(model), before=lambda: os.environ.update(environment)) as server:
        for given in ("", secret, f"Bearer {secret[:-1]}", f"bearer {secret}", f"Bearer {secret}x"):
            for method, path in [("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/x")]:
                status, found, headers = server.send(
                    method, path, {"prompt": "a"}, {"Authorization": given}
                )
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert found["error"]["code"] == "invalid_api_key"
        right = {"Authorization": f"Bearer {secret}"}
        assert server.send("GET", "/v1/models", None, right)[0] == 200
        assert server.send("GET", "/health")[0] == 200
        page = server.send("GET", "/")
        assert page[0] == 200
        assert secret not in page[1]
    assert secret not in server.end()[1]


def test_a_full_queue_refuses_and_the_others_go_on(model: Path) -> None:
    """Guards: a queue without an end, and places that a refused or finished request keeps."""
    arguments = ("--model", str(model), "--max-queue", "2", "--max-tokens", str(ENDLESS))
    with serving(*arguments, before=places(2)) as server:
        expected = server.text(**KNOWN)
        long = [server.streaming(**FOR_EVER) for _ in range(2)]
        wait_until(lambda: server.health()["growing"] == 2)
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(server.text, **KNOWN) for _ in range(2)]
            wait_until(lambda: server.health()["waiting"] == 2)
            status, found, headers = server.complete(**KNOWN)
            assert (status, found["error"]["code"]) == (429, "queue_full")
            assert headers["retry-after"] == "1"
            assert server.complete(prompt="a", n=5)[0] == 429
            for connection in long:
                connection.close()  # their clients are gone
            assert [text.result(20) for text in waiting] == [expected, expected]
        wait_until(lambda: server.health() == {"status": "ok", "growing": 0, "waiting": 0})
        assert server.text(**KNOWN) == expected


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_his_place(model: Path, stream: bool) -> None:
    """Guards: texts that go on for nobody, those that still wait among them."""
    arguments = ("--model", str(model), "--max-tokens", str(ENDLESS))
    with serving(*arguments, before=places(2)) as server:
        asked = {**FOR_EVER, "n": 2}
        connections = [server.streaming(**asked) for _ in range(2)]
        if not stream:
            for connection in connections:
                connection.close()
            connections = []
            for _ in range(2):
                data = json.dumps(asked).encode()
                connections.append(server.connect())
                connections[-1].sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                    % len(data)
                    + data
                )
        wait_until(lambda: server.health() == {"status": "ok", "growing": 2, "waiting": 2})
        for connection in reversed(connections):
            connection.close()
        wait_until(lambda: server.health() == {"status": "ok", "growing": 0, "waiting": 0})


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_slow_readers_hold_up_nobody_and_are_cut_off(model: Path) -> None:
    """Guards: a step that waits for a client to read, and connections that are kept for ever."""

    def before() -> None:
        places(4)()
        from gptcli.serve import server

        server._SILENT_SECONDS = 0.5

    arguments = ("--model", str(model), "--max-tokens", str(ENDLESS))
    with serving(*arguments, before=before) as server:
        expected = server.text(**KNOWN)
        began = resident_bytes(server.process.process)
        slow = server.streaming(
            prompt="a", max_tokens=2000, logprobs=20, n=3, temperature=0
        )  # some 7 MB
        wait_until(lambda: server.health()["growing"] == 3)
        started = time.monotonic()
        assert server.text(**KNOWN) == expected
        assert time.monotonic() - started < 5
        wait_until(lambda: server.health()["growing"] == 0, 60)
        time.sleep(0.8)  # now it is too late to read on
        received = b""
        with suppress(ConnectionResetError):
            while part := slow.recv(2**20):
                received += part
        slow.close()
        assert b"[DONE]" not in received
        assert resident_bytes(server.process.process) - began < 100 * 2**20
        assert server.text(**KNOWN) == expected


def test_half_a_request_is_not_waited_for_for_ever(model: Path) -> None:
    """Guards: connections that send nothing, or a head byte by byte, until no file is left."""

    def before() -> None:
        from gptcli.serve import server

        server._SILENT_SECONDS = 0.4

    with serving("--model", str(model), before=before) as server:
        silent, half = server.connect(), server.connect()
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
        kept = server.connect()  # byte by byte behind a whole request
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(10_000).startswith(b"HTTP/1.1 200")
        with suppress(ConnectionError):
            for byte in b"GET /health HTTP/1.1\r\n" + b"X" * 40:
                kept.send(bytes([byte]))
                time.sleep(0.05)
            pytest.fail("it was waited for")
        assert silent.recv(10) == half.recv(10) == b""
        assert server.text(**KNOWN)


def test_a_prompt_that_breaks_the_model_breaks_no_other_request(tmp_path: Path) -> None:
    """Guards: a server that is dead, or hangs, after one step has failed."""
    model = make_model(tmp_path / "damaged", damaged=ord("#"))
    with serving("--model", str(model), "--max-tokens", "1500") as server:
        expected = server.text(**KNOWN)
        others: list[str] = []
        ask = threading.Thread(target=lambda: others.append(server.text(**BESIDE)))
        alone = server.text(**BESIDE)
        ask.start()
        while not server.health()["growing"]:
            time.sleep(0.001)
        status, found, _ = server.complete(prompt="a" * 60 + "#", max_tokens=5)
        assert server.text(**KNOWN) == expected  # in the place of the broken one
        assert ask.is_alive()
        assert (status, found["error"]["type"]) == (500, "server_error")
        ask.join()
        assert others == [alone]
        assert "non-finite" not in found["error"]["message"]
        assert server.text(**KNOWN) == expected
        assert server.health() == {"status": "ok", "growing": 0, "waiting": 0}
    assert "non-finite logits" in server.end()[1]


def test_prompts_of_a_model_without_an_end(tmp_path: Path, gpt: Any) -> None:
    """Guards: a prompt of any length, which holds up everybody for minutes and fills the memory;
    and another text than `gpt generate` gives for one that is longer than the window."""
    model = make_model(tmp_path / "rolling", window=16)
    with serving("--model", str(model), "--max-tokens", "300") as server:
        text = server.text(prompt="ab" * 140, max_tokens=300, temperature=0)
        status, found, _ = server.complete(prompt="a" * 300)
        assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
    _, out, _ = gpt(
        *("generate", "--model", str(model), "--prompt", "ab" * 140, "--max-new-tokens", "300"),
        *("--temperature", "0", "--json"),
    )
    assert json.loads(out)["text"] == text


def test_large_bodies_are_few_at_once(model: Path) -> None:
    """Guards: a thousand bodies of a megabyte each in memory, sent slowly."""

    def before() -> None:
        from gptcli.serve import app

        app._MOST_LARGE = 1

    with serving("--model", str(model), before=before) as server:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        slow = server.connect()
        slow.sendall(f"{head}\r\nContent-Length: 500000\r\n\r\n{{".encode())
        large = {"prompt": "a" * 20_000}
        wait_until(lambda: server.complete(**large)[0] == 429)
        assert server.text(**KNOWN)
        slow.close()
        wait_until(lambda: server.complete(**large)[0] == 400)
