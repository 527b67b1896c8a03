"""Any body to a server: an answer, never a failure of the server's, and the others unharmed."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from guard import came_to, case, fuzzed
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from serving import Server, make_model, resident_bytes, serving

KNOWN = {"prompt": "Once", "max_tokens": 4, "temperature": 0}
NAMES = [
    "model",
    "prompt",
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "response_format",
    "choices",
    "regex",
    "user",
    "metadata",
    "logprobs",
    "echo",
    "best_of",
    "suffix",
    "logit_bias",
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "other",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["tiny", "(a|b)*c", "user", "json_object", "\ud800", "\0", "a" * 300]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
SCHEMAS = st.recursive(
    st.fixed_dictionaries({"type": st.sampled_from(["string", "integer", "boolean", "null"])}),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(st.text(max_size=4), inner)}
        ),
    ),
    max_leaves=6,
)
FORMATS = SCHEMAS.map(lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}})
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "king"]), "content": SCALARS}
    ),
    max_size=4,
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "messages": MESSAGES,
    "response_format": FORMATS,
    "choices": st.lists(st.text(max_size=5), max_size=4),
    "regex": st.text(alphabet="ab()[]{}*+?|\\d.,1-9^$", max_size=10),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
    "temperature": st.floats(0, 3),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 12),
    "logprobs": st.one_of(st.booleans(), st.integers(0, 3)),
    "stream": st.booleans(),
}


@st.composite
def bodies(draw: Any) -> bytes:
    """The JSON of a request of which some fields are as they should be, or bytes."""
    if draw(st.integers(0, 9)) == 0:
        return bytes(draw(st.binary(max_size=60)))
    if draw(st.booleans()):  # as it should be, but for what is in its values
        names = draw(st.sets(st.sampled_from(sorted(LIKELY)), max_size=4))
        return json.dumps({**KNOWN, **{name: draw(LIKELY[name]) for name in names}}).encode()
    names = draw(st.sets(st.sampled_from(NAMES), max_size=5))
    body = {n: draw(LIKELY.get(n, VALUES) if draw(st.booleans()) else VALUES) for n in names}
    data = json.dumps({**KNOWN, **body} if draw(st.booleans()) else body).encode()
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server, and what it answers to a request that is well."""
    model = make_model(tmp_path_factory.mktemp("fuzzed") / "model")
    with serving("--model", str(model), "--max-tokens", "40", "--max-n", "4") as running:
        yield running, running.text(**KNOWN)


@fuzzed
@given(data=bodies(), chat=st.booleans(), checked=st.integers(0, 9))
def test_served(server: tuple[Server, str], data: bytes, chat: bool, checked: int) -> None:
    """Guards: a traceback for a body, an answer that never ends, a batch that it spoils."""
    running, expected = server
    path = "/v1/chat/completions" if chat else "/v1/completions"
    before = resident_bytes(running.process.process)
    with case("served"):
        status, found, _ = running.send("POST", path, data)
        assert status in (200, 400, 404), (status, found)
        if status != 200:
            assert found["error"]["message"]
            assert "Traceback" not in json.dumps(found)
        came_to("served", str(status))
        if checked == 0:
            assert running.text(**KNOWN) == expected
        assert resident_bytes(running.process.process) - before < 200 * 2**20
