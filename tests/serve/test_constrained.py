"""Answers that are held to a format, by the official client and by plain HTTP."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving import Server

openai = pytest.importorskip("openai", reason="pip install openai: its client is not installed")
pytest.importorskip("llguidance", reason="the extra constrain is not installed")

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bo"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def chat(server: Server, **asked: Any) -> Any:
    """The first choice of a chat's answer."""
    messages = [{"role": "user", "content": "Who?"}]
    with openai.OpenAI(
        base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=20
    ) as client:
        asked = {"model": "tiny", "max_tokens": 200, "seed": 3, **asked}
        return client.chat.completions.create(messages=messages, **asked).choices[0]


def test_a_schema_is_kept(server: Server) -> None:
    """Guards: a response format that is taken and not used."""
    wanted = {"name": "person", "schema": PERSON, "strict": True}
    found = chat(server, response_format={"type": "json_schema", "json_schema": wanted})
    person = json.loads(found.message.content)
    assert (found.finish_reason, person.keys()) == ("stop", {"name", "age"})
    assert person["name"] in ("Ann", "Bo")
    assert person["age"] <= 99


def test_json_object_begins_one_and_is_cut_by_the_limit(server: Server) -> None:
    """Guards: a cut object that is told to be whole."""
    found = chat(server, response_format={"type": "json_object"}, max_tokens=3)
    assert found.message.content.startswith("{")
    assert found.finish_reason in ("length", "stop")
    assert (found.finish_reason == "stop") == found.message.content.endswith("}")
    assert chat(server, response_format={"type": "text"}).message.content


def test_texts_of_one_batch_keep_their_own(server: Server, gpt: Any, model: Path) -> None:
    """Guards: the constraint of one client on another's text; texts other than generate's."""
    plain = {"prompt": "Once", "max_tokens": 60, "seed": 4}
    expected = server.text(**plain)
    found: dict[str, str] = {}

    def ask(name: str, **more: Any) -> None:
        found[name] = server.text(**plain, **more)

    held: dict[str, dict[str, Any]] = {
        "choices": {"choices": ["yes", "no"]},
        "regex": {"regex": "[a-f]{3}-[0-9]{4}"},
        "plain": {},
    }
    threads = [threading.Thread(target=ask, args=(k,), kwargs=v) for k, v in held.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["plain"] == expected
    assert found["choices"] in ("yes", "no")
    assert re.fullmatch("[a-f]{3}-[0-9]{4}", found["regex"])
    code, out, _ = gpt(
        *("generate", "--model", str(model), "--prompt", "Once", "--seed", "4", "--no-prompt"),
        *("--regex", "[a-f]{3}-[0-9]{4}", "--temperature", "1", "--top-p", "1"),
    )
    assert (code, out.strip()) == (0, found["regex"])


def test_a_hard_constraint_holds_up_nobody(server: Server) -> None:
    """Guards: a schema that is compiled in the loop of events, or that kills the thread."""
    names = {
        f"p{i}": {"type": "string", "pattern": f"^(a|b)*a(a|b){{{i % 40}}}$"} for i in range(45)
    }
    schema = {"type": "object", "properties": names, "required": list(names)}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"prompt": "a", "max_tokens": 400, "seed": 1, "response_format": wanted}
    statuses: list[int] = []

    def ask(seed: int) -> None:
        statuses.append(server.complete(**{**asked, "seed": seed})[0])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    longest = 0.0
    while any(thread.is_alive() for thread in threads):
        began = time.monotonic()
        assert server.send("GET", "/health")[0] == 200
        longest = max(longest, time.monotonic() - began)
    assert statuses == [200] * 6
    assert longest < 2
    assert server.text(prompt="a", max_tokens=5, seed=1)
