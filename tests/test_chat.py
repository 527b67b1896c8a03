"""The job behind `gpt chat`: what of a conversation fits, how answers end, what is kept."""

import json
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.chat import (
    Answer,
    Chat,
    exchanges_to_leave_out,
    most_prompt_tokens,
    without_oldest,
)
from gptcli.config.schema import ChatConfig, Config, GenerateConfig
from gptcli.data.chat_template import ChatTemplate
from gptcli.data.conversations import read_conversation
from gptcli.data.messages import Message
from gptcli.data.special_tokens import EOT_TEXT, SpecialTokens
from gptcli.data.templates import CHAT_TEMPLATES
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, DataError, ResourceError
from gptcli.generate import generate
from gptcli.model.gpt import GPT, initialise
from gptcli.runs.load import LoadedModel
from gptcli.stop import request

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
IM_START, IM_END = 257, 258
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}"
    "{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def loaded(gpt: GPT, tokenizer: Tokenizer, config: Config) -> LoadedModel:
    return LoadedModel(gpt.eval(), tokenizer, config, Path("checkpoint"), None, 0, "tiny")


def random_model(block_size: int = 128, finetune: dict[str, Any] | None = None) -> LoadedModel:
    """A model that says anything, on byte tokens."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": block_size}
    config = Config.model_validate(
        {"model": {**shape, "zero_init_output": False}, "finetune": finetune or {}}
    )
    gpt = GPT(config.model, 257)
    for parameter in gpt.parameters():
        parameter.data.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(1))
    return loaded(gpt, Tokenizer.of_bytes(), config)


def model_saying(spoken: list[int], tokenizer: Tokenizer, block_size: int = 256) -> LoadedModel:
    """A model that says each of `spoken`, no token twice, after the one before, and then the first
    again."""
    size = -(-tokenizer.vocab_size // 4) * 4
    shape = {"n_layer": 1, "n_head": 2, "n_embd": size, "block_size": block_size}
    config = Config.model_validate({"model": {**shape, "tie_embeddings": False}})
    gpt = GPT(config.model, tokenizer.vocab_size)
    initialise(gpt, torch.Generator().manual_seed(0))  # the blocks add nothing
    with torch.no_grad():
        gpt.wte.weight.copy_(torch.eye(tokenizer.vocab_size, size))
        gpt.head.weight.zero_()
        for token, following in zip(spoken, [*spoken[1:], spoken[0]], strict=True):
            gpt.head.weight[following, token] = 1.0
    return loaded(gpt, tokenizer, config)


def chat_of(model: LoadedModel, chat: dict[str, Any] | None = None, **given: Any) -> Chat:
    settings = {"max_new_tokens": 12, "seed": 1, **given}
    return Chat(model, GenerateConfig.model_validate(settings), ChatConfig(**(chat or {})))


def contents(chat: Chat) -> list[str]:
    return [message.content for message in chat.messages]


# Which exchanges stay


def some_conversation(draw: random.Random) -> list[Message]:
    """Any order of roles, a system message maybe, a question at the end."""
    roles = draw.choices([USER, ASSISTANT, SYSTEM], weights=[4, 4, 1], k=draw.randrange(9))
    if draw.random() < 0.5:
        roles = [SYSTEM, *roles]
    return [Message(role, "x" * draw.randrange(1, 9)) for role in [*roles, USER]]


def size(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)


def by_brute_force(messages: list[Message], most: int) -> list[Message]:
    """Drop from the front, message by message, until it fits and begins with a question."""
    system = [m for m in messages[:1] if m.role == SYSTEM]
    spoken = messages[len(system) :]
    while size([*system, *spoken]) > most and any(m.role == USER for m in spoken[1:]):
        spoken = spoken[1:]
        while spoken[0].role != USER:
            spoken = spoken[1:]
    return [*system, *spoken]


def test_what_is_left_out_by_brute_force():
    """Guards: an exchange too many or too few, a system message that goes, half an exchange."""
    draw, cut = random.Random(0), 0
    for _ in range(500):
        messages, most = some_conversation(draw), draw.randrange(1, 60)
        kept = without_oldest(messages, exchanges_to_leave_out(messages, size, most))
        assert kept == by_brute_force(messages, most), (messages, most)
        cut += len(kept) < len(messages)
    assert 50 < cut < 450  # both happen


@pytest.mark.parametrize(
    ("block_size", "max_new_tokens", "most"),
    [(128, 12, 116), (128, 64, 64), (128, 9999, 64), (1, 1, 1), (2, 1, 1), (3, 2, 2)],
)
def test_an_answer_keeps_its_room(block_size: int, max_new_tokens: int, most: int):
    """Guards: a history that leaves no token to answer with, or a prompt of none."""
    assert most_prompt_tokens(block_size, max_new_tokens) == most


def test_the_history_is_trimmed_to_the_block(caplog: pytest.LogCaptureFixture):
    """A model that is shown more than its block begins in the middle of a message."""
    caplog.set_level(logging.INFO, "gptcli")
    model = random_model()
    chat = chat_of(model, {"system": "Be."})
    template = ChatTemplate(model.tokenizer)
    dropped = []
    for question in ("one", "two two", "three", "four " * 5, "five"):
        before = [*chat.messages, Message(USER, question)]
        found = chat.ask(question).tokens
        every = [
            template.encode(without_oldest(before, k), add_generation_prompt=True).tokens
            for k in range(5)
        ]
        fitting = [k for k, tokens in enumerate(every) if len(tokens) <= 128 - 12]
        assert found == every[fitting[0]]
        assert bytes(found[1:14]) == (b"System:\nBe.\n\n")
        dropped.append(fitting[0])
    assert dropped[0] == 0 < dropped[-1]
    assert len(chat.messages) == 11  # all is kept for /save
    told = [text for text in caplog.messages if "left out" in text]
    assert told[0] == (
        "the conversation outgrew the model's block: it no longer sees its beginning;"
        f" oldest exchanges left out: {min(d for d in dropped if d)}"
    )
    assert told[1:] == [
        f"oldest exchanges left out: {d}" for d in sorted({d for d in dropped if d})[1:]
    ]


def test_a_message_that_is_too_long_is_refused():
    """A question cut in the middle would be answered as another one; the talk goes on."""
    chat = chat_of(random_model())
    chat.ask("hi")
    before = list(chat.messages)
    with pytest.raises(DataError, match=r"takes 123 tokens; there is room for 116, .* is 128"):
        chat.ask("x" * 103)
    assert chat.messages == before
    with pytest.raises(DataError, match="takes"):
        chat.set_system("x" * 200)
    assert chat.ask("x" * 95).tokens
    with pytest.raises(DataError, match="with the system message,"):
        chat_of(random_model(), {"system": "x" * 120})


def test_a_model_without_a_block_sees_all():
    """Guards: a window for models that read texts of any length."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "window": [8, 8]}
    config = Config.model_validate({"model": shape})
    gpt = GPT(config.model, 257)
    initialise(gpt, torch.Generator().manual_seed(0))
    assert config.model.rolls
    chat = chat_of(loaded(gpt, Tokenizer.of_bytes(), config), max_new_tokens=2)
    chat.ask("first " * 30)
    assert b"first first" in bytes(t for t in chat.ask("second").tokens if t < 256)


# What is said


def continued(model: LoadedModel, answer: Answer, **given: Any) -> str:
    """As `gpt generate` goes on from the same tokens."""
    settings = {"max_new_tokens": 12, "seed": answer.seed, "prompt_tokens": answer.tokens, **given}
    [[sample]] = generate(model, GenerateConfig.model_validate(settings))
    return sample.text


@pytest.mark.parametrize("speculate", [None, "lookup"])
def test_the_answer_is_that_of_generate(speculate: str | None):
    """A second way to decode would be one more to keep right."""
    model = random_model()
    chat = chat_of(model, temperature=1.3, top_k=40, repetition_penalty=1.1, speculate=speculate)
    for question in ("hi", "and?", "so"):
        shown: list[str] = []
        answer = chat.ask(question, shown.append)
        told = {"temperature": 1.3, "top_k": 40, "repetition_penalty": 1.1}
        assert answer.text == continued(model, answer, **told).strip() == "".join(shown)
        assert chat.messages[-1] == Message(ASSISTANT, answer.text)
    assert answer.text


def test_a_seed_repeats_a_conversation():
    """Guards: a state that lives on between answers."""
    talks = []
    for seed in (5, 5, 6):
        chat = chat_of(random_model(), seed=seed, temperature=1.0)
        talks.append([chat.ask(q).text for q in ("a", "b")])
    assert talks[0] == talks[1] != talks[2]
    drawn = chat_of(random_model(), seed=None).seed, chat_of(random_model(), seed=None).seed
    assert drawn[0] != drawn[1]


def test_retry_takes_the_next_seed():
    """Guards: the same answer again, a seed used twice, an answer beside the old one."""
    chat = chat_of(random_model(), temperature=1.0)
    first = chat.ask("hi")
    second, third = chat.retry(), chat.retry()
    assert [a.seed for a in (first, second, third)] == [1, 2, 3]
    assert len({a.text for a in (first, second, third)}) == 3
    assert first.tokens == second.tokens == third.tokens
    assert contents(chat) == ["hi", third.text]
    fresh = chat_of(random_model(), temperature=1.0, seed=2)
    assert fresh.ask("hi").text == second.text
    chat.settings = chat.settings.model_copy(update={"seed": 9})
    assert chat.retry().seed == 9
    assert chat.ask("next").seed == 9
    with pytest.raises(ConfigError, match="nothing was asked"):
        chat_of(random_model()).retry()


def test_retry_of_a_sure_answer_says_so(caplog: pytest.LogCaptureFixture):
    """An answer that never changes looks like a command that does not work."""
    chat = chat_of(random_model(), temperature=0.0)
    assert chat.ask("hi").text == chat.retry().text
    assert "temperature 0" in caplog.text


def test_undo_and_system():
    """Guards: half an exchange that stays, a system message that goes with it."""
    chat = chat_of(random_model(), {"system": "Be."})
    first = chat.ask("one").tokens
    chat.ask("two")
    assert chat.undo() == Message(USER, "two")
    assert chat.undo().content == "one"
    assert contents(chat) == ["Be."]
    assert chat.ask("one").tokens == first
    chat.set_system("Not.")
    assert (chat.system, contents(chat)[1]) == ("Not.", "one")
    chat.set_system(None)
    assert (chat.system, contents(chat)[0]) == (None, "one")
    chat.undo()
    with pytest.raises(ConfigError, match="nothing was asked"):
        chat.undo()


def test_a_template_that_knows_no_system_message(tmp_path: Path):
    """What it refuses is told at once, not at every question after."""
    (tmp_path / "t.jinja").write_text(ALTERNATING)
    chat = chat_of(random_model(), {"template": str(tmp_path / "t.jinja")})
    with pytest.raises(DataError, match="roles must alternate"):
        chat.set_system("Be.")
    assert chat.system is None
    assert bytes(chat.ask("hi").tokens) == b"<user>hi"


# Where answers end


def ending(model: LoadedModel, template: str, tmp_path: Path, question: str = "hi") -> Answer:
    (tmp_path / "t.jinja").write_text(template)
    chat = chat_of(model, {"template": str(tmp_path / "t.jinja")}, temperature=0.0)
    return chat.ask(question)


PLAIN = (
    "{% for m in messages %}{{ '\n\nQ:' if m.role == 'user' else '\nA>' }}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\nA>' }}{% endif %}"
)


def test_a_plain_model_does_not_answer_its_own_questions(tmp_path: Path):
    """Without special tokens the model goes on as the user, and then as itself, and so on."""
    model = model_saying(list(b">abc\nQ:"), Tokenizer.of_bytes())
    shown: list[str] = []
    assert ending(model, PLAIN, tmp_path).text == "abc"
    assert ending(model, PLAIN, tmp_path).finish_reason == "stop"
    chat = chat_of(model, {"template": str(tmp_path / "t.jinja")}, temperature=0.0)
    chat.ask("again", shown.append)
    assert "".join(shown) == "abc"


def test_nothing_is_decoded_behind_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An answer that is cut only for showing takes as long as the longest."""
    model = model_saying(list(b">abc\nQ:"), Tokenizer.of_bytes())
    (tmp_path / "t.jinja").write_text(PLAIN)
    told = {"template": str(tmp_path / "t.jinja")}
    chat = chat_of(model, told, temperature=0.0, max_new_tokens=500)
    decoded: list[int] = []
    token_bytes = model.tokenizer.token_bytes

    def noted(token: int) -> bytes:
        decoded.append(token)
        return token_bytes(token)

    monkeypatch.setattr(model.tokenizer, "token_bytes", noted)
    assert chat.ask("hi").text == "abc"
    assert bytes(decoded) == b"abc\nQ:"


def test_an_answer_that_is_the_next_question(tmp_path: Path):
    """It begins in a new line, which is the template's: there, too, somebody else would speak."""
    model = model_saying(list(b">Q:abc"), Tokenizer.of_bytes())
    answer = ending(model, PLAIN, tmp_path)
    assert (answer.text, answer.finish_reason) == ("", "stop")
    model = model_saying(list(b"> Q:abc"), Tokenizer.of_bytes())
    assert ending(model, PLAIN, tmp_path).text.startswith("Q:abc")  # no beginning of a turn


def test_the_token_that_a_template_ends_answers_with(tmp_path: Path):
    """A model whose end of text is another one goes on behind the end of its answer."""
    special = SpecialTokens({EOT_TEXT: 256, "<|im_start|>": IM_START, "<|im_end|>": IM_END})
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = Tokenizer("file", ranks, r"[\s\S]", 256, special)
    model = model_saying([ord("\n"), *b"abc", IM_END, *b"def"], tokenizer)
    answer = ending(model, CHATML, tmp_path)
    assert (answer.text, answer.finish_reason) == ("abc", "eot")
    assert tokenizer.ends == {256}  # that of the model stays


def test_an_answer_stopped_is_kept_as_far_as_it_came():
    """Guards: an answer that is lost, or a question without one."""
    chat = chat_of(random_model(), max_new_tokens=10_000, temperature=1.0)
    shown: list[str] = []

    def stop_soon(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 5:
            request(2)

    answer = chat.ask("hi", stop_soon)
    assert answer.finish_reason == "interrupted"
    assert "".join(shown) == answer.text == chat.messages[-1].content
    nothing = chat.ask("more")  # the request stands
    assert (nothing.text, nothing.finish_reason) == ("", "interrupted")
    assert contents(chat) == ["hi", answer.text, "more", ""]


# Templates


def test_which_template(tmp_path: Path):
    """A model is asked in another way than it was trained to answer."""
    assert chat_of(random_model()).template_name == "the plain template dialogue"
    assert not chat_of(random_model()).is_trained_for_dialogue
    finetuned = random_model(finetune={"task": "chat", "template": "dialogue_zh"})
    assert chat_of(finetuned).ask("x").tokens == (
        ChatTemplate(finetuned.tokenizer, CHAT_TEMPLATES["dialogue_zh"])
        .encode([Message(USER, "x")], add_generation_prompt=True)
        .tokens
    )
    assert chat_of(finetuned).is_trained_for_dialogue
    own = random_model()
    own.tokenizer.source = {"chat_template": "[{{ messages[0].content }}]"}
    assert chat_of(own).template_name == "its own template"
    assert bytes(chat_of(own).ask("x").tokens) == b"[x]"
    named = chat_of(own, {"template": "dialogue"}).ask("x").tokens
    assert bytes(named[1:]) == b"User:\nx\n\nAssistant:\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{% for %}", "no Jinja template"), (b"\xff", "cannot be read"), (None, "cannot be read")],
)
def test_templates_that_are_none(tmp_path: Path, content: bytes | None, message: str):
    """Guards: a traceback of Jinja, or a question that is never asked."""
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        chat_of(random_model(), {"template": str(tmp_path / "t")})


def test_a_model_without_a_tokenizer():
    """Numbers in, numbers out: nothing to talk about."""
    model = random_model()
    ids = loaded(model.model, Tokenizer.of_ids(257), model.config)
    with pytest.raises(DataError, match="without a tokenizer"):
        chat_of(ids)


# Files


def test_a_saved_conversation_goes_on(tmp_path: Path):
    """Guards: a character, line or message that a file does not bring back."""
    chat = chat_of(random_model(512), {"system": 'Be "kind".\n'})
    for question in ("one\ntwo\\n", "é 🙂 \x1b[2J \u2028", "third"):
        chat.ask(question)
    chat.save(tmp_path / "talk.jsonl")
    again = chat_of(random_model(512))
    again.load(tmp_path / "talk.jsonl")
    assert again.messages == chat.messages
    assert again.system == 'Be "kind".\n'
    assert again.ask("next").text == chat.ask("next").text


def test_what_is_saved_can_be_learned_from(tmp_path: Path):
    """One row of `finetune.task: chat` a file, so that files put together are a data set."""
    from gptcli.config.schema import FinetuneConfig
    from gptcli.data.task_formats import TaskEncoder

    chat = chat_of(random_model())
    chat.ask("one")
    chat.save(tmp_path / "talk.jsonl")
    text = (tmp_path / "talk.jsonl").read_text("utf-8")
    assert text.endswith("}\n")
    row = json.loads(text)
    encoder = TaskEncoder(FinetuneConfig(task="chat"), Tokenizer.of_bytes(), 256)
    assert encoder.encode(row, "talk.jsonl:1") is not None


def test_no_file_is_lost(tmp_path: Path):
    """Guards: a file overwritten without a word, a pipe replaced, half a file."""
    chat, path = chat_of(random_model()), tmp_path / "talk.jsonl"
    with pytest.raises(ConfigError, match="nothing was said"):
        chat.save(path)
    chat.ask("one")
    path.write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        chat.save(path)
    assert path.read_text() == "precious"
    chat.save(path, replace=True)
    assert len(read_conversation(path)) == 2
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match="is a"):
            chat.save(place, replace=True)
    with pytest.raises(ResourceError, match="cannot write"):
        chat.save(tmp_path / "missing" / "talk.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "talk.jsonl"]


def as_lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


HI, HO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    "content",
    [
        as_lines(HI, HO),
        b"\xef\xbb\xbf\n" + as_lines(HI) + b"  \n" + as_lines(HO).rstrip(),
        as_lines({"messages": [HI, HO]}),
        as_lines([HI, HO]),
        as_lines(["hi", "ho"]),
        as_lines({"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho", "id": 3}),
    ],
)
def test_spellings_of_a_conversation(tmp_path: Path, content: bytes):
    """What finetuning reads can be talked on from."""
    (tmp_path / "t").write_bytes(content)
    assert read_conversation(tmp_path / "t") == [Message(USER, "hi"), Message(ASSISTANT, "ho")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no messages"),
        (b"\n \n", "holds no messages"),
        (as_lines(HI) + b"{", r"t:2: not a JSON line: .* at column 2"),
        (as_lines(HI) + b"\xff\n", "t:2: not UTF-8"),
        (b"\x00" * 100, "t:1: not a JSON line"),
        (as_lines(HI, 7), "t:2: a message is not a mapping but int"),
        (as_lines({"role": "user", "content": 7}), "t:1: .* are not both text"),
        (as_lines({"text": "hi"}), "t:1: a message has neither"),
        (as_lines({"messages": []}), "t:1: not a list of messages but an empty list"),
        (as_lines({"messages": "hi"}), "t:1: not a list of messages but str"),
        (as_lines({"messages": [HI]}, {"messages": [HI]}), "t:2: a second conversation"),
        (as_lines(HI, {"messages": [HI]}), "t:2: a second conversation"),
        (as_lines({"messages": [HI]}, HI), "t:2: a second conversation"),
        (b"[" * 100_000, "t:1: "),
        (as_lines({"role": "x\n<|im_end|>", "content": "hi"}), "is no word"),
    ],
)
def test_files_that_are_no_conversation(tmp_path: Path, content: bytes, message: str):
    """What and where is told, and the conversation at hand stays."""
    chat = chat_of(random_model())
    chat.ask("one")
    before = list(chat.messages)
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        chat.load(tmp_path / "t")
    assert len(caught.value.message) < 400
    assert chat.messages == before


def test_places_that_are_no_file(tmp_path: Path):
    """A pipe would be waited for, and a disk image fill the memory."""
    chat = chat_of(random_model())
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(10**12)
    for name in ("pipe", "huge", "missing", "."):
        with pytest.raises(DataError, match="cannot be read"):
            chat.load(tmp_path / name)


def test_loaded_surrogates_and_names_of_tokens(tmp_path: Path):
    """A message cannot stop the tokenizer, nor a later /save, nor forge a turn."""
    row = {"messages": [{"role": "user", "content": "\ud800 <|endoftext|>"}, HO]}
    (tmp_path / "t").write_text(json.dumps(row))
    chat = chat_of(random_model())
    chat.load(tmp_path / "t")
    assert chat.messages[0].content == "\ufffd <|endoftext|>"
    assert chat.ask("on").tokens.count(256) == 2  # before the text, and behind the answer
    chat.save(tmp_path / "again")


def test_a_long_file_is_trimmed_in_time(tmp_path: Path):
    """Guards: reading all of a long history again for each exchange that is left out."""
    (tmp_path / "t").write_bytes(as_lines(*[HI, HO] * 2000))
    chat = chat_of(random_model())
    chat.load(tmp_path / "t")
    calls = 0
    encode = chat._template.encode

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return encode(*args, **named)

    chat._template.encode = counted  # type: ignore[method-assign]
    assert len(chat.ask("x").tokens) <= 116
    assert calls < 16
