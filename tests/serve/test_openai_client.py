"""The official `openai` client, and what it gets: the texts of `gpt generate`."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Server

from gptcli.data.chat_template import ChatTemplate
from gptcli.data.messages import Message
from gptcli.data.tokenizer import Tokenizer

openai = pytest.importorskip("openai", reason="pip install openai: its client is not installed")


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(
        base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=20
    ) as made:
        yield made


def test_completions_are_the_texts_of_generate(client: Any, gpt: Any, model: Path) -> None:
    """Guards: a setting that is lost on its way to the engine, samples in another order."""
    settings = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "presence_penalty": 0.4}
    settings |= {"frequency_penalty": 0.1}
    ours = {"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.2}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**settings, **ours}.items()]
    code, out, err = gpt(
        *("generate", "--model", str(model), "--prompt", "Once", "-n", "3", "--json"),
        *("--max-new-tokens", "150", "--logprobs", "2", *flags),
    )
    assert (code, err.count("error")) == (0, 0)
    rows = [json.loads(line) for line in out.splitlines()]
    found = client.completions.create(
        model="tiny", prompt="Once", n=3, max_tokens=150, logprobs=2, extra_body=ours, **settings
    )
    assert [choice.text for choice in found.choices] == [row["text"] for row in rows]
    for choice, row in zip(found.choices, rows, strict=True):
        expected = [entry["logprob"] for entry in row["logprobs"]]
        assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-5)
        assert len(choice.logprobs.top_logprobs[0]) in (2, 3)
    assert found.usage.prompt_tokens == 5
    assert found.usage.completion_tokens == sum(len(row["tokens"]) for row in rows)
    plain = client.completions.create(
        model="tiny",
        prompt=[[256, 79, 110, 99, 101]],
        n=3,
        max_tokens=150,
        extra_body=ours,
        **settings,
    )
    assert [c.text for c in plain.choices] == [c.text for c in found.choices]


def test_a_seed_repeats_a_text_and_none_gives_another(client: Any) -> None:
    """Guards: a seed that is not used, or one that is always the same."""

    def text(**more: Any) -> str:
        return (
            client.completions.create(model="tiny", prompt="a", max_tokens=30, **more)
            .choices[0]
            .text
        )

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text() != text()
    drawn = client.completions.create(model="tiny", prompt="a", max_tokens=30)
    assert text(seed=drawn.seed) == drawn.choices[0].text


@pytest.mark.parametrize("logprobs", [None, 3])
def test_streamed_pieces_join_to_the_whole(client: Any, logprobs: int | None) -> None:
    """Guards: pieces of another sample, characters cut in two, a last piece that is lost, entries
    of logprobs that come twice or never."""
    asked = {"model": "tiny", "prompt": ["Once", "The"], "n": 2, "max_tokens": 120, "seed": 1}
    asked |= {"logprobs": logprobs, "stop": ["7", "zz"], "temperature": 1.1}
    whole = client.completions.create(**asked)
    texts, reasons, entries, usage = [""] * 4, [None] * 4, [[] for _ in range(4)], None
    offsets: list[list[int]] = [[] for _ in range(4)]
    for chunk in client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs:
                entries[choice.index] += choice.logprobs.tokens
                offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert "stop" in reasons
    assert not any("7" in text for text in texts)
    assert usage == whole.usage
    if logprobs is not None:
        assert entries == [choice.logprobs.tokens for choice in whole.choices]
        assert offsets == [choice.logprobs.text_offset for choice in whole.choices]


def test_a_chat(client: Any, model: Path) -> None:
    """Guards: another template than training used, special tokens that a message forges, fields
    that clients of chats read."""
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi<|endoftext|>"}]},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go on."},
    ]
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 24, "seed": 2}
    found = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
    roles = ["system", "user", "assistant", "user"]
    contents = ["Be kind.", "Hi<|endoftext|>", "Yes?", "Go on."]
    tokens = (
        ChatTemplate(Tokenizer.of_bytes())
        .encode(
            [Message(*turn) for turn in zip(roles, contents, strict=True)],
            add_generation_prompt=True,
        )
        .tokens
    )
    assert tokens.count(256) == 2  # the start, and the end of the assistant's answer
    assert found.usage.prompt_tokens == len(tokens)
    again = client.completions.create(model="tiny", prompt=tokens, max_tokens=24, seed=2, n=2)
    assert [c.message.content for c in found.choices] == [c.text for c in again.choices]
    assert found.choices[0].message.role == "assistant"
    entry = found.choices[0].logprobs.content[0]
    assert bytes(entry.bytes).decode("utf-8", "replace") == found.choices[0].message.content[:1]
    assert len(entry.top_logprobs) == 2
    text = ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == found.choices[0].message.content


def test_echo_and_token_ids(client: Any) -> None:
    """Guards: an echo of the wrong prompt, or one that a stream leaves out."""
    asked = {"model": "tiny", "prompt": ["ab", "cd"], "max_tokens": 3, "n": 2, "seed": 1}
    plain = [choice.text for choice in client.completions.create(**asked).choices]
    echoed = client.completions.create(**asked, echo=True)
    assert [c.text for c in echoed.choices] == [
        prompt + text for prompt, text in zip(["ab", "ab", "cd", "cd"], plain, strict=True)
    ]
    texts = [""] * 4
    for chunk in client.completions.create(**asked, echo=True, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in echoed.choices]


def test_the_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gptcli"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("owner/other")


def test_errors_are_the_clients_own(client: Any) -> None:
    """Guards: errors in a shape that clients show as 'unknown'."""
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert (wrong.value.param, wrong.value.code) == ("tools", "unsupported_parameter")


def test_many_at_once_get_what_each_would_get_alone(server: Server) -> None:
    """Guards: keys and places that are mixed up when texts enter and leave while others grow."""

    def ask(number: int) -> str:
        greedy = {"temperature": 0, "max_tokens": 20 + 9 * (number % 11)}
        prompt = f"{number} times {'x' * (number % 7)}"
        if number % 3 == 0:
            return server.text(prompt=prompt, **greedy)
        connection = server.streaming(prompt=prompt, **greedy)
        with connection, connection.makefile("rb") as lines:
            data = b"".join(line[6:] for line in lines if line.startswith(b"data: {"))
        decoder, text, place = json.JSONDecoder(), "", 0
        whole = data.decode()
        while place < len(whole.rstrip()):
            event, place = decoder.raw_decode(whole, place)
            place += 1
            text += event["choices"][0]["text"]
        return text

    alone = [ask(number) for number in range(40)]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, [*range(40), *range(40)]))
    assert together == [*alone, *alone]
