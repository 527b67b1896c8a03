"""`gpt serve` from its start to its end: flags, addresses, signals."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from serving import ENDLESS, FOR_EVER, Server, places, serving

KNOWN = {"prompt": "Once", "max_tokens": 8, "temperature": 0}


def wait_for_texts(server: Server, count: int) -> None:
    while server.health()["growing"] != count:
        time.sleep(0.02)


def received(connection: socket.socket) -> tuple[str, list[dict[str, Any]]]:
    """The head of a streamed answer, and its events."""
    with connection, connection.makefile("rb") as answer:
        head, _, body = answer.read().decode().partition("\r\n\r\n")
    lines = [line.partition("data: ")[2] for line in body.split("\n") if "data: {" in line]
    return head, [json.loads(line) for line in lines]


def test_a_stop_lets_texts_finish(model: Path) -> None:
    """Guards: texts cut off by a restart, and new ones that are taken although nobody will be
    there to finish them."""
    arguments = ["--model", str(model), "--grace", "30", "--max-tokens", "20000"]
    server = Server(arguments)
    expected = server.text(prompt="a", max_tokens=2000, temperature=0)
    connection = server.streaming(prompt="a", max_tokens=2000, temperature=0)
    wait_for_texts(server, 1)
    server.process.send(signal.SIGTERM)
    while server.health()["status"] == "ok":
        time.sleep(0.01)
    status, found, headers = server.complete(**KNOWN)
    assert (status, found["error"]["code"]) == (503, "shutting_down")
    assert "retry-after" in headers
    head, events = received(connection)
    assert " 200 " in head
    assert "".join(e["choices"][0]["text"] for e in events) == expected
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert "interrupted" not in events[-1]["choices"][0]
    code, err = server.end()
    assert (code, "stopped by SIGTERM" in err) == (143, True)


@pytest.mark.parametrize("how", ["grace", "twice"])
def test_texts_that_do_not_finish_are_ended_as_they_are(model: Path, how: str) -> None:
    """Guards: a server that cannot be stopped while somebody asks for endless texts, one that
    drops what it has, or tells those that never began as empty texts."""
    grace = "0.3" if how == "grace" else "60"
    arguments = ["--model", str(model), "--grace", grace, "--max-tokens", str(ENDLESS)]
    server = Server(arguments, places(1))
    connections = [server.streaming(**FOR_EVER)]
    wait_for_texts(server, 1)
    connections.append(server.streaming(**{**FOR_EVER, "prompt": "b"}))
    while server.health()["waiting"] != 1:
        time.sleep(0.02)
    began = time.monotonic()
    server.process.send(signal.SIGINT)
    if how == "twice":
        time.sleep(0.2)
        server.process.send(signal.SIGTERM)
    head, events = received(connections[0])
    assert " 200 " in head
    assert events[-1]["choices"][0]["interrupted"] is True
    assert "".join(e["choices"][0]["text"] for e in events)
    assert " 503 " in received(connections[1])[0]
    code, _ = server.process.wait()
    assert code == (130 if how == "grace" else 143)
    assert time.monotonic() - began < 10


def test_a_stop_without_clients_is_at_once(model: Path) -> None:
    """Guards: ten seconds of grace for nobody, kept-alive connections among these."""
    server = Server(["--model", str(model)])
    idle = server.connect()
    idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert idle.recv(20).startswith(b"HTTP/1.1 200")
    began = time.monotonic()
    assert server.end(signal.SIGINT)[0] == 130
    assert time.monotonic() - began < 4
    idle.close()


def test_an_address_that_is_taken(model: Path, gpt: Any) -> None:
    """Guards: a traceback, and a model that is loaded before this is known."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = gpt("serve", "--model", "nowhere/at-all", "--port", str(port))
    assert code == 6
    assert err.splitlines() == [
        f"error: cannot serve at 127.0.0.1:{port}: Address already in use",
        "hint: gpt serve --port 0  # takes any free port",
    ]


def test_a_host_that_is_none(gpt: Any) -> None:
    code, _, err = gpt("serve", "--host", "no.such.host.invalid")
    assert (code, err.startswith("error: cannot serve at no.such.host.invalid:8000")) == (6, True)


def test_an_open_address_without_a_token_is_warned_of(model: Path) -> None:
    """Guards: a model that the whole network may use, unnoticed; and a check of names that would
    lock out everybody there."""
    with serving("--model", str(model), "--host", "0.0.0.0") as server:
        assert server.address.startswith("http://0.0.0.0:")
        asked = server.send("GET", "/v1/models", None, {"Host": "box.example:8000"})
        assert asked[0] == 200
    assert "warning: whoever reaches http://0.0.0.0" in server.end()[1]


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named(
    package: str, gpt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = gpt("serve")
    assert code == 6
    assert f"gpt serve needs the package {package}" in err
    assert "hint: pip install 'gptcli[serve]'" in err


@pytest.mark.parametrize("token", ["", " a", "a b", "é"])
def test_tokens_that_no_header_can_carry(
    token: str, model: Path, gpt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an empty token that lets everybody in, one that nobody can send."""
    code, _, err = gpt("serve", "--port", "0", "--model", str(model), "--token", token)
    assert (code, err.splitlines()[0][:20]) == (2, "error: the token is ")


def test_the_yaml_and_the_flags(tmp_path: Path, model: Path, gpt: Any) -> None:
    """Guards: a section that is not read, flags that do not win."""
    config = tmp_path / "mine.yaml"
    config.write_text(f"serve: {{model: '{model}', max_tokens: 30, max_n: 2, max_body: 1KB}}\n")
    with serving("--config", str(config), "--max-n", "3") as server:
        assert server.complete(prompt="a", n=3)[0] == 200
        assert server.complete(prompt="a", n=4)[1]["error"]["param"] == "n"
        assert server.complete(prompt="a", max_tokens=31)[1]["error"]["param"] == "max_tokens"
        assert server.complete(prompt="a" * 2000)[0] == 413
    code, _, err = gpt("serve", "--max-body", "big", "--port", "70000")
    assert code == 2
    assert "--max-body: 'big' is not a size" in err
    assert "--port: " in err


def test_help_loads_neither_torch_nor_the_server() -> None:
    """Guards: a help that takes seconds."""
    script = (
        "import sys\nfrom gptcli.cli.main import main\nmain(['serve', '--help'])\n"
        "print([n for n in ('torch', 'fastapi', 'uvicorn', 'starlette') if n in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "GPT_SERVE_TOKEN" in done.stdout


def test_the_length_of_a_chat_that_says_none(model: Path) -> None:
    """Guards: a chat that is cut at 16 tokens, or goes on for as long as the server allows."""
    with serving("--model", str(model), "--max-tokens", "1000") as server:
        asked = {"messages": [{"role": "user", "content": "a"}], "temperature": 0}
        usage = server.send("POST", "/v1/chat/completions", asked)[1]["usage"]
        assert usage["total_tokens"] == 128  # the model's block_size
        assert server.complete(prompt="a", temperature=0)[1]["usage"]["completion_tokens"] == 16
