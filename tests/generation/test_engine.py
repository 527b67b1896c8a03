"""The decode engine against plain loops, on tiny random models."""

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.data.special_tokens import SpecialTokens
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError
from gptcli.generation import engine
from gptcli.generation.engine import BatchSize, Request, generate_samples
from gptcli.generation.row import Generated
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT

GREEDY = Sampling(temperature=0.0, max_new_tokens=40)
TOKENIZER = Tokenizer.of_bytes()
# Untied, because a tied model with random weights repeats its last token for ever.
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 24, "tie_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "modern": {**PRESETS["modern"], **SMALL},
    "modern-gqa": {**PRESETS["modern"], **SMALL, "n_kv_head": 2},
    "gpt2": {**PRESETS["gpt2"], **SMALL},
    "sinusoidal-post": {
        **PRESETS["gpt2"],
        **SMALL,
        "position": "sinusoidal",
        "norm_position": "post",
    },
    "odd-block": {**PRESETS["modern"], **SMALL, "block_size": 7},
    "block-1": {**PRESETS["gpt2"], **SMALL, "block_size": 1},
    "banded": {**PRESETS["gpt2"], **SMALL, "window": [0, 5]},
    "dynamic": {
        **PRESETS["llama"],
        **SMALL,
        "rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_block_size": 12},
    },
}
# Every layer has a window and positions have no end: these read on past the block.
ROLLING: dict[str, dict[str, Any]] = {
    "rolling": {**PRESETS["modern"], **SMALL, "n_kv_head": 2, "window": [5, 9]},
    "rolling-no-position": {**PRESETS["modern"], **SMALL, "position": "none", "window": 6},
    "rolling-linear": {
        **PRESETS["llama"],
        **SMALL,
        "window": 24,
        "rope_scaling": {"kind": "linear", "factor": 2.0},
    },
    "rolling-wide": {**PRESETS["llama"], **SMALL, "block_size": 8, "window": 8},
}


def random_model(shape: str = "modern", vocab_size: int = 257, std: float = 0.5) -> GPT:
    """Weights wide enough that the argmax changes from token to token."""
    model = GPT(ModelConfig(**{**SHAPES, **ROLLING}[shape]), vocab_size)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        mean = float(parameter.ndim == 1 and name.endswith("weight"))  # norms
        spread = std if parameter.ndim > 1 else 0.1
        parameter.data.normal_(mean, spread, generator=generator)
    return model.requires_grad_(False).eval()


class Scripted(GPT):
    """A real model whose next token is always the next of `script`, whatever the weights are."""

    def __init__(self, script: list[int], vocab_size: int = 257) -> None:
        super().__init__(ModelConfig(**{**SHAPES["modern"], "block_size": 512}), vocab_size)
        self.script, self.prompt_length = script, 1

    def forward(self, tokens: Tensor, cache: Any = None, last_only: bool = False) -> Tensor:
        logits = super().forward(tokens, cache, last_only)
        length = tokens.size(1) if cache is None else cache.longest
        token = self.script[(length - self.prompt_length) % len(self.script)]
        return torch.where(torch.arange(logits.size(-1)) == token, 50.0, 0.0).expand_as(logits)


def scripted(text: str | bytes, *, eot: bool = False, **settings: Any) -> Generated:
    data = text.encode() if isinstance(text, str) else text
    model = Scripted([*data, *([256] if eot else [])])
    settings = {"max_new_tokens": len(data) + eot, "temperature": 0.0, **settings}
    return generate_samples(model, TOKENIZER, [256], 1, Sampling(**settings))[0]


@pytest.fixture(autouse=True)
def _no_stop_request() -> Any:
    stop.reset()
    yield
    stop.reset()


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_cached_equals_uncached_past_the_block(shape: str, penalty: float) -> None:
    """Guards: stale or misplaced keys in the cache, positions that drift, a window that differs."""
    model = random_model(shape)
    prompt = [256, 72, 105][: model.config.block_size]
    settings = replace(GREEDY, max_new_tokens=80, repetition_penalty=penalty)
    cached = generate_samples(model, TOKENIZER, prompt, 2, settings)
    uncached = generate_samples(model, TOKENIZER, prompt, 2, settings, use_cache=False)
    assert cached == uncached
    assert cached[0].finish_reason == "length"
    if penalty > 1:  # else the shortest windows may settle on one token
        assert len(set(cached[0].tokens)) > 10


@pytest.mark.parametrize("shape", ["modern", "gpt2", "odd-block", "block-1", "banded", "dynamic"])
def test_greedy_equals_a_plain_loop(shape: str) -> None:
    """Guards: the window restarts too early, too late or with the wrong tokens."""
    model = random_model(shape)
    block = model.config.block_size
    window, expected = [256, 72, 105][:block], []
    while len(expected) < 60:
        if len(window) > block:
            window = window[-max(1, block // 2) :]
        token = int(model(torch.tensor([window]))[0, -1, :257].argmax())
        if token == 256:
            break
        expected.append(token)
        window.append(token)
    settings = replace(GREEDY, max_new_tokens=60)
    got = generate_samples(model, TOKENIZER, [256, 72, 105][:block], 1, settings)[0]
    assert got.tokens == expected


def test_a_full_prompt_leaves_room_to_go_on() -> None:
    """Guards: an index error when the prompt alone fills the block."""
    model = random_model("gpt2")
    prompt = list(range(40, 64))
    got = generate_samples(model, TOKENIZER, prompt, 1, GREEDY)
    assert got == generate_samples(model, TOKENIZER, prompt, 1, GREEDY, use_cache=False)
    with pytest.raises(ValueError, match="25 prompt tokens"):
        generate_samples(model, TOKENIZER, [1] * 25, 1, GREEDY)
    with pytest.raises(ValueError, match="0 prompt tokens"):
        generate_samples(random_model("rolling"), TOKENIZER, [], 1, GREEDY)


def plain_loop(model: GPT, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by the uncached forward over the whole text, one token after another."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(int(model(torch.tensor([ids]))[0, -1, :256].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 8, 24, 25, 48, 70])
@pytest.mark.parametrize("shape", ROLLING)
def test_a_rolling_cache_equals_the_forward_over_the_whole_text(shape: str, length: int) -> None:
    """Guards: a long prompt cut at the block or read in chunks that do not see each other; a ring
    that overwrites keys still in reach, or positions that start again at the block."""
    model = random_model(shape)
    model.head.weight.data[256:] = 0.0
    assert model.config.rolls
    prompt = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(7)).tolist()
    expected = plain_loop(model, prompt, 60)
    tokenizer = Tokenizer("no-end", {bytes([b]): b for b in range(256)}, r"[\s\S]", None)
    settings = replace(GREEDY, max_new_tokens=60)
    for use_cache in (True, False):
        got = generate_samples(model, tokenizer, prompt, 2, settings, use_cache=use_cache)
        assert [g.tokens for g in got] == [expected] * 2
    assert len(set(expected)) > 4


def test_a_rolling_cache_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: memory that grows with the text although no layer looks back that far."""
    model = random_model("rolling")
    made: list[int] = []
    new_cache = GPT.new_cache

    def counted(self: GPT, batch: int, capacity: int | None = None) -> Any:
        cache = new_cache(self, batch, capacity)
        made.append(cache.row_bytes)
        return cache

    monkeypatch.setattr(GPT, "new_cache", counted)
    generate_samples(model, TOKENIZER, [256] * 100, 1, replace(GREEDY, max_new_tokens=5))
    bytes_per_token = 2 * model.config.kv_heads * model.config.head_size * 4
    assert made
    assert max(made) <= (5 + 9) * bytes_per_token


def test_a_stop_request_ends_a_long_prompt() -> None:
    """Guards: Ctrl-C that waits until a book has been read."""
    model = random_model("rolling")
    stop.request(2)
    got = generate_samples(model, TOKENIZER, [256] * 500, 1, GREEDY)[0]
    assert (got.text, got.finish_reason) == ("", "interrupted")


@pytest.mark.parametrize("shape", ["modern", "gpt2"])
def test_sample_k_does_not_depend_on_n(shape: str) -> None:
    """Guards: random numbers handed out by batch row, so that -n 5 changes the first text."""
    model = random_model(shape, std=0.3)
    settings = Sampling(temperature=0.9, top_p=0.95, top_k=60, seed=11, max_new_tokens=50)
    five = generate_samples(model, TOKENIZER, [256], 5, settings)
    assert generate_samples(model, TOKENIZER, [256], 1, settings) == five[:1]
    assert generate_samples(model, TOKENIZER, [256], 3, settings) == five[:3]
    assert len({tuple(g.tokens) for g in five}) == 5
    assert [g.sample for g in five] == [0, 1, 2, 3, 4]
    other = generate_samples(model, TOKENIZER, [256], 1, replace(settings, seed=12))
    assert other[0].tokens != five[0].tokens


def test_samples_decoded_in_turn_equal_samples_decoded_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards: the memory limit on a batch changes the texts or loses samples."""
    model = random_model("modern-gqa", std=0.3)
    settings = Sampling(seed=4, max_new_tokens=30)
    together = generate_samples(model, TOKENIZER, [256], 5, settings)
    row_bytes = model.new_batch_cache(1, 24).row_bytes
    monkeypatch.setattr(engine, "_CACHE_BYTES", 2 * row_bytes)
    monkeypatch.setattr(engine, "free_memory_bytes", lambda _: 4 * row_bytes)
    assert BatchSize.of(model, [Request("", [256], settings, 5)]).rows == 2
    assert generate_samples(model, TOKENIZER, [256], 5, settings) == together


def test_finished_rows_leave_the_others_alone() -> None:
    """Guards: rows mixed up in cache, window or penalty when one of them ends at eot or a stop."""
    model = random_model("gpt2", vocab_size=20, std=0.3)
    # The model knows ids 0 to 19 only, so eot, which is 19, comes often.
    ranks = {bytes([b]): 256 if b == 19 else b for b in range(256)}
    tokenizer = Tokenizer("tiny", ranks, r"[\s\S]", 19)
    settings = Sampling(seed=2, max_new_tokens=40, repetition_penalty=1.2, stop=("\x03\x04",))
    many = generate_samples(model, tokenizer, [19], 12, settings)
    uncached = generate_samples(model, tokenizer, [19], 12, settings, use_cache=False)
    assert many == uncached
    assert len({len(g.tokens) for g in many}) > 4
    assert {"eot", "length"} <= {g.finish_reason for g in many}


def test_first_token_frequencies() -> None:
    """Guards: the distribution drawn from is not the model's at this temperature."""
    model = random_model("gpt2", vocab_size=257, std=0.25)
    settings = Sampling(temperature=0.7, seed=1, max_new_tokens=1)
    n = 4000
    got = generate_samples(model, TOKENIZER, [256], n, settings)
    counts = Counter(g.tokens[0] if g.tokens else 256 for g in got)
    expected = (model(torch.tensor([[256]]))[0, -1] / 0.7).softmax(0).tolist()
    for token in range(257):
        deviation = math.sqrt(n * expected[token] * (1 - expected[token]))
        assert abs(counts[token] - n * expected[token]) < 5 * deviation + 1


def test_repetition_penalty_covers_prompt_and_continuation() -> None:
    """Guards: only the prompt, or only the window, is penalised."""
    model = random_model("gpt2")
    settings = replace(GREEDY, repetition_penalty=1e9, max_new_tokens=100)
    got = generate_samples(model, TOKENIZER, [256, 65, 66], 1, settings)[0]
    assert got.finish_reason == "length"  # eot is in the prompt, so never again
    positive_only = set(got.tokens)
    assert not positive_only & {65, 66}
    assert len(positive_only) == 100


@pytest.mark.parametrize("cut", range(1, 8))
def test_stop_text_across_token_borders(cut: int) -> None:
    """Guards: a stop text is only seen when one token holds all of it."""
    word = b"\n\nUser:"
    ranks = {bytes([b]): b for b in range(256)}
    ranks[b"i" + word[:cut]], ranks[word[cut:] + b" x"] = 256, 257
    tokenizer = Tokenizer("merged", ranks, r"[\s\S]+", 258)
    model = Scripted([ord("h"), 256, 257, ord("y")], vocab_size=259)
    settings = Sampling(temperature=0.0, stop=("\n\nUser:",), max_new_tokens=9, logprobs=1)
    shown: list[str] = []
    got = generate_samples(
        model, tokenizer, [258], 1, settings, on_text=lambda k, text: shown.append(text)
    )[0]
    assert (got.text, got.finish_reason) == ("hi", "stop")
    assert "".join(shown) == "hi"
    assert got.tokens == [ord("h"), 256]  # the last is partly text, partly stop text
    assert got.logprobs is not None
    assert [entry["token"] for entry in got.logprobs] == got.tokens


def test_a_possible_stop_text_at_the_end_is_shown() -> None:
    """Guards: held-back text lost when generation ends for another reason."""
    for reason, eot in (("length", False), ("eot", True)):
        got = scripted("text\n\nUs", eot=eot, stop=("\n\nUser:",))
        assert (got.text, got.finish_reason) == ("text\n\nUs", reason)
        assert TOKENIZER.decode(got.tokens) == got.text


def test_eot_ends_the_text_and_is_not_part_of_it() -> None:
    """Guards: eot in text or tokens, or generation that goes on into another document."""
    got = scripted("ab", eot=True, max_new_tokens=50)
    assert (got.text, got.tokens, got.finish_reason) == ("ab", [97, 98], "eot")


def test_every_end_stops() -> None:
    """Guards: chat models that run on behind <|im_end|>, since only one of their ends is known."""
    ends = SpecialTokens({"<|endoftext|>": 256, "<|im_end|>": 257}, more_ends=(257, ord("!")))
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = Tokenizer("chat", ranks, r"[\s\S]", 256, ends)
    for end in (256, 257, ord("!")):
        model = Scripted([97, 98, end], vocab_size=258)
        settings = Sampling(temperature=0.0, max_new_tokens=9)
        got = generate_samples(model, tokenizer, [256], 1, settings)[0]
        assert (got.text, got.tokens, got.finish_reason) == ("ab", [97, 98], "eot")


def test_without_an_end_the_text_goes_on() -> None:
    """Guards: `None` compared with tokens, or an invented id that ends the text of GPT-1."""
    tokenizer = Tokenizer("no-end", {bytes([b]): b for b in range(256)}, r"[\s\S]", None)
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.ends) == (256, None, frozenset())
    model = Scripted([97, 0], vocab_size=256)
    got = generate_samples(model, tokenizer, [97], 1, replace(GREEDY, max_new_tokens=4))[0]
    assert (got.tokens, got.finish_reason) == ([97, 0, 97, 0], "length")


def test_a_model_without_a_tokenizer_prints_ids() -> None:
    """Guards: ids run together, or a text that stops at id 0 as the model's config claims."""
    model = Scripted([2, 0, 11, 1], vocab_size=12)
    tokenizer = Tokenizer.of_ids(12)
    got = generate_samples(model, tokenizer, [3], 1, replace(GREEDY, max_new_tokens=4))[0]
    assert (got.text, got.tokens, got.finish_reason) == ("2 0 11 1 ", [2, 0, 11, 1], "length")
    assert tokenizer.encode(got.text) == got.tokens


def test_streamed_text_is_whole_characters() -> None:
    """Guards: U+FFFD flicker for an emoji over four byte tokens; a lost incomplete end."""
    shown: list[tuple[int, str]] = []
    data = "é🙂".encode() + "漢".encode()[:2]
    generate_samples(
        Scripted(list(data)),
        TOKENIZER,
        [256],
        2,
        Sampling(temperature=0.0, max_new_tokens=len(data)),
        on_text=lambda sample, piece: shown.append((sample, piece)),
    )
    expected = [(0, "é"), (1, "é"), (0, "🙂"), (1, "🙂"), (0, "\ufffd"), (1, "\ufffd")]
    assert shown == expected


def test_streamed_pieces_join_to_the_text() -> None:
    """Guards: what is streamed differs from what is returned."""
    shown = dict.fromkeys(range(4), "")

    def collect(sample: int, piece: str) -> None:
        shown[sample] += piece

    settings = Sampling(seed=8, max_new_tokens=60, stop=("e", "\x00"))
    got = generate_samples(random_model(), TOKENIZER, [256], 4, settings, on_text=collect)
    assert [g.text for g in got] == list(shown.values())


def test_padded_vocabulary_is_never_sampled() -> None:
    """Guards: ids beyond the tokenizer (a head padded for speed) reach the text."""
    model = random_model("gpt2", vocab_size=1000, std=0.05)
    settings = Sampling(temperature=50.0, seed=1, max_new_tokens=50, repetition_penalty=1.1)
    got = generate_samples(model, TOKENIZER, [256], 5, settings)
    assert max(token for g in got for token in g.tokens) < 257


def test_logprobs_are_the_models_own() -> None:
    """Guards: log-probabilities after temperature, top-k or penalty; entries out of step."""
    model = random_model("gpt2")
    settings = Sampling(temperature=0.2, top_k=3, seed=3, max_new_tokens=10, logprobs=4)
    got = generate_samples(model, TOKENIZER, [256], 3, settings)
    for sample in got:
        assert sample.logprobs is not None
        assert len(sample.logprobs) == len(sample.tokens)
        context = [256]
        for token, entry in zip(sample.tokens, sample.logprobs, strict=True):
            expected = model(torch.tensor([context]))[0, -1].log_softmax(0)
            assert entry["token"] == token
            assert entry["text"] == bytes([token]).decode("utf-8", "replace")
            assert entry["logprob"] == pytest.approx(float(expected[token]), abs=1e-4)
            values, ids = expected.topk(4)
            assert [t[0] for t in entry["top"]] == ids.tolist()
            assert [t[2] for t in entry["top"]] == pytest.approx(values.tolist(), abs=1e-4)
            context.append(token)
    every = generate_samples(model, TOKENIZER, [256], 1, replace(settings, logprobs=9999))[0]
    assert every.logprobs is not None
    assert len(every.logprobs[0]["top"]) == 257


def test_json_has_exactly_the_promised_keys() -> None:
    """Guards: a renamed or additional key in `gpt generate --json`."""
    got = generate_samples(random_model(), TOKENIZER, [256], 1, GREEDY, prompt="P")[0]
    keys = ["prompt", "text", "tokens", "finish_reason", "seed", "sample"]
    assert list(got.to_json()) == keys
    with_logprobs = generate_samples(
        random_model(), TOKENIZER, [256], 1, replace(GREEDY, logprobs=2), prompt="P"
    )[0]
    assert list(with_logprobs.to_json()) == [*keys, "logprobs"]
    assert json.loads(json.dumps(with_logprobs.to_json())) == with_logprobs.to_json()
    assert (got.prompt, got.seed, got.sample) == ("P", 0, 0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_weights_are_a_checkpoint_error(temperature: float) -> None:
    """Guards: a damaged checkpoint that prints text, or a RuntimeError from torch."""
    model = random_model()
    model.blocks[1].mlp.proj.weight[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="non-finite logits"):
        generate_samples(model, TOKENIZER, [256], 2, replace(GREEDY, temperature=temperature))


def test_a_stop_request_returns_what_there_is() -> None:
    """Guards: Ctrl-C during generation loses the text, or is ignored until the end."""
    shown: list[str] = []

    def interrupt(sample: int, piece: str) -> None:
        shown.append(piece)
        if len(shown) == 5:
            stop.request(2)

    model = Scripted(list(b"abcdefgh"))
    settings = Sampling(temperature=0.0, max_new_tokens=90, stop=("fx",))
    got = generate_samples(model, TOKENIZER, [256], 1, settings, on_text=interrupt)[0]
    assert (got.text, got.finish_reason) == ("abcde", "interrupted")
    again = generate_samples(model, TOKENIZER, [256], 2, settings)
    assert [(g.text, g.finish_reason) for g in again] == [("", "interrupted")] * 2


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    """Guards: samples drawn during training use dropout, or training goes on without it."""
    model = GPT(ModelConfig(**{**SHAPES["modern"], "dropout": 0.5}), 257)
    model.load_state_dict(random_model().state_dict())
    expected = generate_samples(model.eval(), TOKENIZER, [256], 1, GREEDY)
    assert generate_samples(model.train(), TOKENIZER, [256], 1, GREEDY) == expected
    assert model.training
    assert all(module.training for module in model.modules())


def test_bfloat16_weights_generate() -> None:
    """Guards: a cache or sampling dtype that does not follow the weights."""
    got = generate_samples(
        random_model().bfloat16(), TOKENIZER, [256], 3, Sampling(seed=1, max_new_tokens=40)
    )
    assert len(got) == 3
