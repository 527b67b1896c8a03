"""The job behind `gpt generate`: prompts from three places, seeds, errors."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from gptcli import stop
from gptcli.config.schema import Config, GenerateConfig
from gptcli.data.tokenizer import Tokenizer, train_bpe
from gptcli.errors import ConfigError, DataError
from gptcli.generate import generate, generate_bytes, resolve_prompts
from gptcli.generation.engine import BatchSize
from gptcli.generation.row import Generated
from gptcli.model.gpt import GPT
from gptcli.runs.load import LoadedModel

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "zero_init_output": False}


@pytest.fixture
def model() -> LoadedModel:
    config = Config.model_validate({"model": SHAPE})
    gpt = GPT(config.model, 257)
    for parameter in gpt.parameters():
        parameter.data.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(1))
    return LoadedModel(
        model=gpt.eval(),
        tokenizer=Tokenizer.of_bytes(),
        config=config,
        path=Path("checkpoint"),
        run_dir=None,
        step=0,
        name="tiny",
    )


def settings(**given: Any) -> GenerateConfig:
    return GenerateConfig.model_validate({"max_new_tokens": 8, "seed": 1, **given})


def run(model: LoadedModel, **given: Any) -> list[list[Generated]]:
    return list(generate(model, settings(**given)))


def test_n_samples_of_one_prompt(model: LoadedModel) -> None:
    """Guards: settings that do not reach the engine."""
    [samples] = run(model, prompt="hi", n=3, logprobs=2, stop=["zzz"])
    assert [(g.prompt, g.sample, g.seed) for g in samples] == [("hi", k, 1) for k in range(3)]
    assert all(g.logprobs is not None for g in samples)
    assert run(model, prompt="hi", n=1) != run(model, prompt="ho", n=1)
    [cut] = run(model, prompt="hi", stop=[samples[0].text[2]])
    assert (cut[0].text, cut[0].finish_reason) == (samples[0].text[:2], "stop")


def test_prompt_file_has_one_prompt_a_line(model: LoadedModel, tmp_path: Path) -> None:
    """Guards: line ends or a BOM inside prompts; prompts cut at U+2028; blank lines as prompts."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\n\n two\u2028lines \nthree".encode())
    got = run(model, prompt_file=str(file), n=2)
    assert [[g.prompt for g in samples] for samples in got] == [
        [text] * 2 for text in ("one", " two\u2028lines ", "three")
    ]
    [alone] = run(model, prompt="three", n=2)
    assert got[2] == alone


def test_rows_are_as_alone(model: LoadedModel, tmp_path: Path) -> None:
    """Guards: settings of a row that do not reach the engine, or reach another row's text."""
    rows: list[dict[str, Any]] = [
        {"prompt": "one", "seed": 5, "n": 3},
        {"prompt": "two"},
        {"prompt_tokens": [104, 105], "temperature": 0, "max_new_tokens": 3, "logprobs": 1},
        {"prompt": "one", "top_k": 1, "presence_penalty": 9, "bad_words": ["e", "a"]},
        {"prompt": "a longer one", "repetition_penalty": 3, "frequency_penalty": -1, "min_p": 0.1},
        {"prompt": "x", "top_p": 0.3, "max_new_tokens": 12, "stop": ["q", "zz"]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"temperature": 2.0, "json_lines": True}
    together = run(model, prompt_file=str(file), **given)
    for row, samples in zip(rows, together, strict=True):
        [alone] = run(model, **{**given, **row})
        assert [(g.text, g.tokens, g.finish_reason, g.seed) for g in samples] == [
            (g.text, g.tokens, g.finish_reason, g.seed) for g in alone
        ]
    assert [len(samples) for samples in together] == [3, 1, 1, 1, 1, 1]
    assert together[2][0].logprobs is not None
    assert len(together[2][0].tokens) == 3


def test_a_row_that_does_not_fit_is_named(model: LoadedModel, tmp_path: Path) -> None:
    """Guards: a thousand rows and one word about one of them."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt_tokens": [1, 999]}\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:3: prompt_tokens: 999 is not one"):
        run(model, prompt_file=str(file))
    file.write_text('{"prompt": "a"}\n{"prompt": "' + "x" * 30 + '"}\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2: the prompt has 31 tokens") as caught:
        run(model, prompt_file=str(file), truncate="error")
    assert "--truncate left" in str(caught.value.hint)


def test_prompt_file_problems(model: LoadedModel, tmp_path: Path) -> None:
    """Guards: a traceback for a file that is missing, a directory, empty or not UTF-8."""
    with pytest.raises(ConfigError, match=r"cannot read .*nope"):
        run(model, prompt_file=str(tmp_path / "nope"))
    with pytest.raises(ConfigError, match="cannot read"):
        run(model, prompt_file=str(tmp_path))
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="no prompts"):
        run(model, prompt_file=str(file))
    file.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        run(model, prompt_file=str(file))


def test_prompt_tokens_go_in_as_they_are(model: LoadedModel) -> None:
    """Guards: a document start in front of ids that the user chose."""
    [with_start] = run(model, prompt_tokens=[256, 104, 105], n=2)
    [text] = run(model, prompt="hi", n=2)
    assert [g.tokens for g in with_start] == [g.tokens for g in text]
    [without] = run(model, prompt_tokens=[104, 105], n=2)
    assert without[0].tokens != text[0].tokens
    assert without[0].prompt == "hi"


def test_prompt_tokens_out_of_range(model: LoadedModel) -> None:
    """Guards: an IndexError on the CPU and a dead process on CUDA for an id that is too large."""
    with pytest.raises(ConfigError, match="257 is not one of the token ids 0 to 256"):
        run(model, prompt_tokens=[1, 257])
    with pytest.raises(ConfigError, match="at least one"):
        run(model, prompt_tokens=[])


def test_exactly_one_kind_of_prompt(model: LoadedModel) -> None:
    """Guards: a prompt that is silently ignored, or no prompt taken for an empty one."""
    with pytest.raises(ConfigError, match="no prompt given"):
        run(model)
    with pytest.raises(ConfigError, match="more than one kind"):
        run(model, prompt="a", prompt_tokens=[1])
    [[empty]] = run(model, prompt="")
    [[start]] = run(model, prompt_tokens=[256])
    assert empty.tokens == start.tokens


def test_long_prompt_is_cut_or_refused(model: LoadedModel) -> None:
    """Guards: `truncate` ignored."""
    [[cut]] = run(model, prompt="x" * 10 + "y" * 16)
    [[last]] = run(model, prompt_tokens=[121] * 16)
    assert cut.tokens == last.tokens
    assert cut.prompt == "x" * 10 + "y" * 16
    with pytest.raises(ConfigError, match="27 tokens"):
        run(model, prompt="x" * 26, truncate="error")


def test_long_prompts_of_a_file_are_told_of_once(
    model: LoadedModel, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Guards: a warning for each of a thousand prompts, and none that says which it is about."""
    file = tmp_path / "prompts.txt"
    for lines, places in ((["a", "x" * 30, "b", "y" * 30], ":2 and 1 more"), (["x" * 30], ":1")):
        file.write_text("\n".join(lines))
        caplog.clear()
        run(model, prompt_file=str(file))
        [told] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert told == (
            f"{file}{places}: the prompt is longer than the model's block_size, 16 tokens:"
            " its first ones are dropped"
        )


def test_a_long_prompt_of_a_model_that_rolls(model: LoadedModel) -> None:
    """Guards: prompts cut, or refused, although the model can read them whole."""
    config = Config.model_validate({"model": {**SHAPE, "window": 4}})
    rolling = GPT(config.model, 257)
    rolling.load_state_dict(model.model.state_dict())
    loaded = replace(model, model=rolling.eval(), config=config)
    [prompt] = resolve_prompts(loaded, settings(prompt="x" * 50, truncate="error"))
    assert len(prompt.tokens) == 51
    [[long]] = run(loaded, prompt="x" * 50)
    assert len(long.tokens) == 8


@pytest.mark.parametrize("new_tokens", [14, 15])
def test_the_restart_of_the_window_is_told_once(
    model: LoadedModel, caplog: pytest.LogCaptureFixture, tmp_path: Path, new_tokens: int
) -> None:
    """Guards: a text that forgets its beginning with no word about it, or a line for each."""
    file = tmp_path / "prompts.txt"
    file.write_text("ab\nab\n")  # 3 tokens with the start, and the last new one is not read
    model.model.head.weight.data[256:] = 0.0
    with caplog.at_level(logging.INFO, logger="gptcli"):
        run(model, prompt_file=str(file), max_new_tokens=new_tokens, temperature=0.0)
    told = [r.getMessage() for r in caplog.records if "block_size" in r.getMessage()]
    wanted = ["the text grew past block_size, 16 tokens: a full window goes on with its last 8"]
    assert told == wanted[: new_tokens - 14]


def test_a_model_without_a_tokenizer(model: LoadedModel) -> None:
    """Guards: prompt and continuation run together to another id; text taken for ids."""
    bare = replace(model, tokenizer=Tokenizer.of_ids(257))
    [[given]] = run(bare, prompt_tokens=[104, 105])
    [[written]] = run(bare, prompt="104\n105")
    assert written == given
    assert bare.tokenizer.encode(given.prompt + given.text) == [104, 105, *given.tokens]
    with pytest.raises(DataError, match="no tokenizer") as caught:
        run(bare, prompt="hi")
    assert "--prompt-tokens" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        run(bare, prompt="")
    with pytest.raises(ConfigError, match="--allow-special"):
        run(bare, prompt="1 <|endoftext|> 2", allow_special=True)


def test_special_text_in_a_prompt(model: LoadedModel) -> None:
    """Guards: allow_special ignored."""
    [[special]] = run(model, prompt="a<|endoftext|>", allow_special=True)
    [[ids]] = run(model, prompt_tokens=[256, 97, 256])
    assert special.tokens == ids.tokens


def test_a_random_seed_is_reported(model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a text that nobody can produce again."""
    with caplog.at_level(logging.INFO, logger="gptcli"):
        [[first]] = run(model, prompt="a", seed=None)
        [[second]] = run(model, prompt="a", seed=None)
    assert f"seed {first.seed}" in caplog.text
    assert first.seed != second.seed
    [[again]] = run(model, prompt="a", seed=first.seed)
    assert again == first


def test_seeds_of_rows(
    model: LoadedModel, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Guards: a random seed that is told of but not used, or used but not told of."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "seed": 3}\n{"prompt": "b", "temperature": 0}\n')
    with caplog.at_level(logging.INFO, logger="gptcli"):
        run(model, prompt_file=str(file), seed=None)
        assert "seed" not in caplog.text
        file.write_text('{"prompt": "a", "seed": 3}\n{"prompt": "a"}\n{"prompt": "a"}\n')
        [[own], [drawn], [same]] = run(model, prompt_file=str(file), seed=None)
    assert own.seed == 3
    assert f"seed {drawn.seed}" in caplog.text
    assert same == drawn


def test_speculation_is_told_and_changes_nothing(
    model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: --speculate without effect, or with one on the text."""
    given = {"prompt": "abcabcabcabc", "temperature": 0.0, "max_new_tokens": 40}
    [[plain]] = run(model, **given)
    with caplog.at_level(logging.INFO, logger="gptcli"):
        [[drafted]] = run(model, **given, speculate="lookup")
    assert (drafted.text, drafted.tokens) == (plain.text, plain.tokens)
    assert drafted.drafted > 0
    share = f"{drafted.accepted / drafted.drafted:.0%}"
    counts = f"{drafted.accepted} of {drafted.drafted} drafted tokens accepted ({share})"
    assert f"speculation: {counts}" in caplog.text


def test_problems_are_raised_before_the_first_text(model: LoadedModel) -> None:
    """Guards: an error after half of the output, or only once somebody iterates."""
    with pytest.raises(ConfigError):
        generate(model, settings())
    for key in ("stop", "bad_words"):
        with pytest.raises(ValidationError, match="at least one character"):
            settings(prompt="a", **{key: ["", "x"]})


def test_callbacks_come_in_order(model: LoadedModel, tmp_path: Path) -> None:
    """Guards: streamed text without its prompt, or under another one."""
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    seen: list[tuple[str, str]] = []
    texts = generate(
        model,
        settings(prompt_file=str(file), n=1),
        on_text=lambda sample, piece: seen.append(("text", piece)),
        on_prompt=lambda prompt: seen.append(("prompt", prompt)),
    )
    assert seen == []
    got = [samples[0] for samples in texts]
    joined = ""
    for kind, text in seen:
        joined += text if kind == "text" else f"[{text}]"
    assert joined == f"[one]{got[0].text}[two]{got[1].text}"


def test_texts_of_later_prompts_wait(model: LoadedModel, tmp_path: Path) -> None:
    """Guards: a later prompt that ends first shown among the text of the first, or lost."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "one", "max_new_tokens": 30, "n": 2}\n'
        '{"prompt": "two", "max_new_tokens": 1}\n{"prompt": "three"}\n'
    )
    model.model.head.weight.data[256:] = 0.0
    seen: list[tuple[str, int, str]] = []
    texts = generate(
        model,
        settings(prompt_file=str(file), temperature=0.0),
        on_text=lambda sample, piece: seen.append(("text", sample, piece)),
        on_prompt=lambda prompt: seen.append(("prompt", 0, prompt)),
    )
    got = []
    for samples in texts:
        got.append(samples)
        for sample in samples:
            pieces = [text for kind, n, text in seen if (kind, n) == ("text", sample.sample)]
            assert "".join(pieces) == sample.text
        assert seen[0] == ("prompt", 0, samples[0].prompt)
        seen.clear()
    assert [samples[0].prompt for samples in got] == ["one", "two", "three"]


def test_a_stop_request_ends_the_iteration(model: LoadedModel, tmp_path: Path) -> None:
    """Guards: Ctrl-C that only skips to the next prompt."""
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\n")
    try:
        texts = generate(
            model,
            settings(prompt_file=str(file)),
            on_text=lambda sample, piece: stop.request(15),
        )
        [[only]] = list(texts)
    finally:
        stop.reset()
    assert only.finish_reason == "interrupted"
    assert only.text


def test_a_stop_request_keeps_later_texts_that_are_done(model: LoadedModel, tmp_path: Path) -> None:
    """Guards: Ctrl-C that throws finished texts away, or shows half a text of a later prompt."""
    lengths = {"one": 30, "two": 2, "three": 30, "four": 2}
    rows = [{"prompt": text, "max_new_tokens": count} for text, count in lengths.items()]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    model.model.head.weight.data[256:] = 0.0
    seen: list[str] = []

    def on_text(sample: int, piece: str) -> None:
        seen[-1] += piece
        if len(seen[-1]) > len("one") + 3:  # more than two steps
            stop.request(2)

    texts = generate(
        model,
        settings(prompt_file=str(file), temperature=0.0),
        on_text=on_text,
        on_prompt=seen.append,
    )
    got = [samples[0] for samples in texts]
    assert [(g.prompt, g.finish_reason) for g in got] == [
        ("one", "interrupted"),
        ("two", "length"),
        ("four", "length"),
    ]
    assert seen == [g.prompt + g.text for g in got]


def test_a_stop_request_before_the_start(model: LoadedModel) -> None:
    """Guards: a prompt that is shown, or read, after Ctrl-C."""
    seen: list[str] = []
    model.model.register_forward_pre_hook(lambda *_: seen.append("read"))
    run(model, prompt="a")
    assert "read" in seen
    seen.clear()
    stop.request(2)
    assert list(generate(model, settings(prompt="a"), on_prompt=seen.append)) == []
    assert seen == []


def test_threads_are_set_only_while_decoding(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: two iterators in turn that leave the process with the fewer threads of one."""
    monkeypatch.setattr("gptcli.generation.kernel_race.best_threads", lambda *_: 1)
    torch.set_num_threads(2)
    inside: list[int] = []

    def texts() -> Iterator[list[Generated]]:
        told = lambda sample, piece: inside.append(torch.get_num_threads())  # noqa: E731
        return generate(model, settings(prompt="a"), on_text=told)

    first, second = texts(), texts()
    for iterator in (first, second, first, second):
        next(iterator, None)
        assert torch.get_num_threads() == 2
    assert set(inside) == {1}


def test_the_size_of_the_batch_is_found_once(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: kernels and threads that raced for other rows than there are, since the packed
    weights have taken memory meanwhile."""
    found, of = list[BatchSize](), BatchSize.of

    def noted(*given: Any) -> BatchSize:
        found.append(replace(of(*given), rows=4 - len(found)))
        return found[-1]

    monkeypatch.setattr(BatchSize, "of", noted)
    [samples] = run(model, prompt="a", n=5)
    assert len(samples) == 5
    assert [size.rows for size in found] == [4]


def test_bytes_are_those_of_the_tokens(model: LoadedModel, tmp_path: Path) -> None:
    """Guards: bytes that went through text; a prompt cut to the window in the output as well."""
    file = tmp_path / "data.bin"
    for data in (b"\xff\r\n\n\x00 <|endoftext|>", b"\xe4" * 40):
        file.write_bytes(data)
        [[same]] = run(model, prompt_tokens=[256, *data][-16:])
        got = generate_bytes(model, settings(prompt_file=str(file), output_bytes=True))
        assert got == data + bytes(same.tokens)
    with pytest.raises(ConfigError, match="cannot read"):
        generate_bytes(model, settings(prompt_file=str(tmp_path), output_bytes=True))


def test_special_text_in_bytes(model: LoadedModel) -> None:
    """Guards: allow_special ignored, or a TypeError, where the prompt is bytes."""
    given = settings(prompt="a<|endoftext|>", allow_special=True, output_bytes=True, no_prompt=True)
    [[ids]] = run(model, prompt_tokens=[256, 97, 256])
    assert generate_bytes(model, given) == bytes(ids.tokens)


def test_one_result_as_bytes(model: LoadedModel, tmp_path: Path) -> None:
    """Guards: settings for several texts ignored; a text model that takes lines for data."""
    for given in ({"n": 2}, {"stop": ["x"]}):
        with pytest.raises(ConfigError, match="one continuation"):
            generate_bytes(model, settings(prompt="a", output_bytes=True, **given))
    words = replace(model, tokenizer=train_bpe(["a b"], 257, "gpt2", 1000))
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match="there are 2 prompts"):
        generate_bytes(words, settings(prompt_file=str(file), output_bytes=True))
    file.write_text("one\n")
    assert generate_bytes(words, settings(prompt_file=str(file), output_bytes=True))[:3] == b"one"
