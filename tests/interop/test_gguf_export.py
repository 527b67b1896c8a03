"""GGUF files: what is in them, that llama.cpp computes the same from them, and what is refused."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, normalizers
from tokenizers.models import BPE

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.data.special_tokens import SpecialTokens
from gptcli.data.tiktoken_tables import PATTERNS, byte_characters
from gptcli.data.tokenizer import Tokenizer, load_tokenizer_json, train_bpe
from gptcli.errors import CheckpointError, ConfigError, ResourceError
from gptcli.generation.engine import generate_samples
from gptcli.generation.prompt import encode_prompt
from gptcli.generation.sampling import Sampling
from gptcli.interop.gguf_export import interleave, write_gguf
from gptcli.interop.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, vocabulary
from gptcli.model.gpt import GPT
from gptcli.model.rope import inverse_frequencies, rope_table, rotate

gguf = pytest.importorskip("gguf")

SOURCE = Path(str(argparse.__file__)).read_text(encoding="utf-8")
CHINESE = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
PROMPT = "def parse(self, args):"
TEXTS = [
    "",
    " ",
    "Hello world, it's I'LL we'Re  1234567890 3.14\t\r\n\n  indented \n",
    CHINESE + "１２３ ひらがな 한국어 Русский",
    "🙂👩‍👩‍👧 é e\u0301 \u00a0\u2003x\ufeff½²Ⅷ",
    "\n\n\n   \n a\n",
    "<|endoftext|> is text, <|endoftext|>too",
    SOURCE[:5000],
]
SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 256}
# Names of tests, and what makes each another road through the export.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"preset": "gpt2"},
    "gpt2-without-biases": {"preset": "gpt2", "bias": False, "tie_embeddings": False},
    "llama": {"preset": "llama", "n_kv_head": 2},
    "llama-tied-biases": {
        "preset": "llama",
        "n_kv_head": 1,
        "head_dim": 24,
        "tie_embeddings": True,
        "bias": True,
    },
    "qwen2-like": {"preset": "llama", "qkv_bias": True, "norm_eps": 1e-5},
    "modern": {"preset": "modern", "n_kv_head": 2, "head_dim": 24, "rope_theta": 500.0},
}


@cache
def bpe(pattern: str) -> Tokenizer:
    return train_bpe([SOURCE, CHINESE * 20], 700, pattern, 10**7)


def random_model(vocab_size: int, **switches: Any) -> GPT:
    """Weights so large that no two logits are near each other, norms and biases not trivial."""
    generator = torch.Generator().manual_seed(1)
    model = GPT(ModelConfig(**{**SMALL, **switches}), vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter).normal_(0.0, 0.2, generator=generator)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise / 2)
    return model


def written(model: GPT, tokenizer: Tokenizer, out: Path, dtype: Any = "f32", **more: Any) -> Any:
    write_gguf(model, tokenizer, "a name", out, dtype, **more)
    return gguf.GGUFReader(out)


def tensors(reader: Any) -> dict[str, torch.Tensor]:
    """By name, in fp32 and our order of dimensions."""
    return {
        t.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(t.data, t.tensor_type), np.float32)
        ).reshape(tuple(int(n) for n in reversed(t.shape)))
        for t in reader.tensors
    }


def metadata(reader: Any) -> dict[str, Any]:
    return {name: value.contents() for name, value in reader.fields.items()}


def test_interleaved_rows_give_the_same_attention() -> None:
    """Rows in a wrong order rotate other pairs: attention depends on positions wrongly."""
    heads, width, length = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, heads * width, 16, generator=generator)
    x = torch.randn(length, 16, generator=generator)
    frequencies = inverse_frequencies(width, 100.0)

    def halves(rows: torch.Tensor) -> torch.Tensor:
        table = rope_table(torch.arange(length), frequencies)
        return rotate((x @ rows.T).view(1, length, heads, width), table)[0]

    def neighbours(rows: torch.Tensor) -> torch.Tensor:
        """Su et al. 2021, equation 34, pair by pair as complex numbers."""
        pairs = torch.view_as_complex((x @ rows.T).view(length, heads, width // 2, 2))
        angles = torch.outer(torch.arange(length).float(), frequencies)
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thd,shd->hts", q, k)

    theirs = scores(neighbours(interleave(q, heads)), neighbours(interleave(k, heads)))
    torch.testing.assert_close(theirs, scores(halves(q), halves(k)))
    assert not torch.allclose(scores(neighbours(q), neighbours(k)), theirs)


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_every_weight_is_in_the_file(tmp_path: Path, dtype: str) -> None:
    """A tensor that is left out, cut wrongly or stored too coarsely spoils the model."""
    tokenizer = bpe("gpt4")
    model = random_model(tokenizer.vocab_size, **MODELS["llama"])
    found = tensors(written(model, tokenizer, tmp_path / "m.gguf", dtype))
    ours = model.state_dict()
    expected = {
        "token_embd.weight": ours["wte.weight"],
        "output.weight": ours["head.weight"],
        "output_norm.weight": ours["norm.weight"],
    }
    for i in range(2):
        q, k, v = torch.split(ours[f"blocks.{i}.attn.qkv.weight"], [64, 32, 32])
        gate, up = ours[f"blocks.{i}.mlp.up.weight"].chunk(2)
        parts = {"attn_v": v, "ffn_gate": gate, "ffn_up": up}
        parts |= {"attn_q": interleave(q, 4), "attn_k": interleave(k, 2)}
        for theirs, name in (
            ("attn_norm", "norm1"),
            ("ffn_norm", "norm2"),
            ("attn_output", "attn.proj"),
            ("ffn_down", "mlp.proj"),
        ):
            parts[theirs] = ours[f"blocks.{i}.{name}.weight"]
        expected |= {f"blk.{i}.{theirs}.weight": tensor for theirs, tensor in parts.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs()
        if dtype == "f32" or tensor.ndim == 1:
            assert not error.any(), name
        elif dtype == "f16":
            assert (error <= tensor.abs() * 2**-11 + 2**-24).all(), name
        else:  # steps of 1/127 of the largest of 32; the f16 of it adds 127 / 2048 of a step
            largest = tensor.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
            assert (error.unflatten(1, (-1, 32)) <= largest / 127 * 0.57).all(), name


def test_rows_that_do_not_divide_by_32_stay_f16(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """q8_0 packs 32 numbers: other rows cannot be packed, and the user should know."""
    tokenizer = Tokenizer.of_bytes()
    model = random_model(257, preset="gpt2", n_embd=96, n_inner=100, n_layer=1)
    with caplog.at_level("INFO", logger="gptcli"):
        reader = written(model, tokenizer, tmp_path / "m.gguf", "q8_0")
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["position_embd.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    assert "32: blk.0.ffn_down.weight" in caplog.text


def test_metadata_says_what_the_config_says(tmp_path: Path) -> None:
    """llama.cpp takes defaults (eps, base of the rotation, head size) for keys that are missing."""
    tokenizer = bpe("gpt4")
    scaling = {"kind": "yarn", "factor": 4.0, "original_block_size": 64, "attention_factor": 1.3}
    model = random_model(
        tokenizer.vocab_size, **MODELS["modern"], rope_scaling=scaling, norm_eps=3e-6
    )
    facts = {"steps": 7, "loss": 1.5, "data": "a book", "finished": True, "none": None}
    found = metadata(written(model, tokenizer, tmp_path / "m.gguf", "q8_0", facts=facts))
    expected = {
        "general.architecture": "qwen3",
        "general.name": "a name",
        "general.file_type": 7,
        "qwen3.block_count": 2,
        "qwen3.context_length": 256,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": model.config.inner_size,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 24,
        "qwen3.attention.value_length": 24,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(3e-6),
        "qwen3.rope.freq_base": 500.0,
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 64,
        "qwen3.rope.scaling.attn_factor": pytest.approx(1.3 / (0.1 * np.log(4.0) + 1.0)),
        "qwen3.vocab_size": tokenizer.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": tokenizer.eot,
        "tokenizer.ggml.eos_token_id": tokenizer.eot,
        "tokenizer.ggml.add_bos_token": True,
        "gptcli.steps": 7,
        "gptcli.loss": 1.5,
        "gptcli.data": "a book",
        "gptcli.finished": True,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "gptcli.none" not in found


def test_llama3_scaling_is_a_tensor_of_factors(tmp_path: Path) -> None:
    """llama.cpp divides each frequency by its factor, and knows no other form of this scaling."""
    scaling = {"kind": "llama3", "factor": 8.0, "original_block_size": 64}
    model = random_model(257, preset="llama", rope_scaling=scaling)
    reader = written(model, Tokenizer.of_bytes(), tmp_path / "m.gguf", "f16")
    factors = tensors(reader)["rope_freqs.weight"]
    scaled = inverse_frequencies(16, 10000.0, model.config.rope_scaling)
    torch.testing.assert_close(inverse_frequencies(16, 10000.0) / factors, scaled)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert "llama.rope.scaling.type" not in metadata(reader)


def test_tokens_have_types_and_ids_without_tokens_have_names() -> None:
    """A list shorter than the embedding, or a name used twice, makes llama.cpp stop."""
    special = SpecialTokens(
        {"<eot>": 259, "<think>": 257, "[PAD256]": 261}, "<eot>", None, ("<think>",)
    )
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = Tokenizer("file", ranks, PATTERNS["gpt2"], 259, special)
    found = vocabulary(tokenizer, 264)
    assert found.tokens[65] == "A"
    assert found.tokens[32] == "Ġ"
    assert found.types[:256] == [NORMAL] * 256
    assert found.tokens[256:] == [
        *("[[PAD256]]", "<think>", "[PAD258]", "<eot>", "[PAD260]", "[PAD256]", "[PAD262]"),
        "[PAD263]",
    ]
    assert found.types[256:] == [
        *(UNUSED, USER_DEFINED, UNUSED, CONTROL, UNUSED, CONTROL, UNUSED),
        UNUSED,
    ]
    assert (found.start, found.ends) == (259, [259])


def test_all_ends_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """An end that llama.cpp does not know of is written as text, and the text goes on."""
    names = {f"<{i}>": 256 + i for i in range(6)}
    special = SpecialTokens(names, "<3>", "<0>", (), (258, 256, 260))
    ranks = {bytes([b]): b for b in range(256)}
    found = vocabulary(Tokenizer("file", ranks, PATTERNS["gpt4"], 259, special), 262)
    assert (found.start, found.ends) == (256, [259, 256, 258])
    assert "left out: [260]" in caplog.text


def test_ordinary_tokens_that_llama_cpp_takes_for_ends_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A tokenizer trained on HTML may have </s>: llama.cpp would end texts there."""
    ranks = {bytes([b]): b for b in range(256)} | {b"</": 256, b"s>": 257, b"</s>": 258}
    found = vocabulary(Tokenizer("bpe", ranks, PATTERNS["gpt4"], 259), 260)
    assert found.merges == ["< /", "s >", "</ s>"]
    assert "llama.cpp ends a text at these ordinary tokens: </s>" in caplog.text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "post-norm": ({"preset": "gpt1"}, "norm_position post (gpt2 has pre)"),
    "band": ({"preset": "gpt3-small", "window": [0, 8]}, "window"),
    "layers": ({"preset": "modern", "norm": "layernorm"}, "norm layernorm (qwen3 has rmsnorm)"),
    "no positions": ({"preset": "llama", "position": "none"}, "position none (llama has rope)"),
    "activation": (
        {"preset": "gpt2", "activation": "relu", "qk_norm": True},
        "activation relu (gpt2 has gelu_tanh); qk_norm true (gpt2 has false)",
    ),
    "biases": ({"preset": "modern", "bias": True}, "bias (qwen3 has none with qk_norm)"),
    "head size": ({"preset": "gpt2", "head_dim": 24}, "n_head x head_dim 96, not n_embd"),
    "dynamic": (
        {
            "preset": "llama",
            "rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_block_size": 64},
        },
        "rope_scaling dynamic (llama.cpp knows linear, yarn and llama3)",
    ),
    "llama3 with QK-norm": (
        {"rope_scaling": {"kind": "llama3", "factor": 2.0, "original_block_size": 64}},
        "rope_scaling llama3 (only without qk_norm)",
    ),
    "yarn's ramp": (
        {
            "rope_scaling": {
                "kind": "yarn",
                "factor": 2.0,
                "original_block_size": 64,
                "beta_fast": 16.0,
            }
        },
        "yarn with beta_fast",
    ),
}


@pytest.mark.parametrize(("switches", "reason"), REFUSED.values(), ids=REFUSED)
def test_models_that_llama_cpp_lacks_are_refused(
    tmp_path: Path, switches: dict[str, Any], reason: str
) -> None:
    """A file that loads and computes something else is worse than none."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 128}
    model = GPT(ModelConfig(**{**shape, **switches}), 257)
    with pytest.raises(CheckpointError) as caught:
        write_gguf(model, Tokenizer.of_bytes(), "x", tmp_path / "m.gguf", "f32")
    assert reason in caught.value.message
    assert "--to hf" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_a_window_as_long_as_the_block_is_none(tmp_path: Path) -> None:
    """Such a window hides nothing, so refusing it would be pedantry."""
    model = random_model(257, preset="llama", window=[0, 256])
    assert written(model, Tokenizer.of_bytes(), tmp_path / "m.gguf").tensors


def byte_level(pattern: str, **more: Any) -> Tokenizer:
    return Tokenizer(
        "file", {bytes([b]): b for b in range(256)} | {b"ab": 256}, pattern, 257, **more
    )


def odd_tokenizers() -> Iterator[tuple[str, Tokenizer, str]]:
    yield "cjk", byte_level(PATTERNS["cjk"]), "no regex that cuts words"
    yield "ids", Tokenizer.of_ids(300), "no tokenizer"
    yield "nfc", byte_level(PATTERNS["gpt4"], nfc=True), "NFC"
    ranks = {bytes([b]): b for b in range(256)} | {b"abc": 256}
    yield "whole words", Tokenizer("file", ranks, PATTERNS["gpt2"], 257), "by no merges"
    doubled = SpecialTokens({"ab": 257}, "ab")
    twice = Tokenizer("file", byte_level("x")._ranks, PATTERNS["gpt4"], 257, doubled)
    yield "a name twice", twice, "tokens 256 and 257 are both spelled 'ab'"
    endless = Tokenizer("file", byte_level("x")._ranks, PATTERNS["gpt4"], None)
    yield "no end", endless, "no end-of-text token"


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [pytest.param(tokenizer, reason, id=name) for name, tokenizer, reason in odd_tokenizers()],
)
def test_tokenizers_that_llama_cpp_reads_otherwise_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, reason: str
) -> None:
    """With other ids the model reads other words, and nothing tells of it."""
    model = random_model(300, preset="llama")
    with pytest.raises(CheckpointError, match=reason):
        write_gguf(model, tokenizer, "x", tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.iterdir())


def test_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    """They would become infinite, and the model's logits nan."""
    model = random_model(257, preset="llama")
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3, 4] = -70000.0
    for dtype in ("f16", "q8_0"):
        with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_gate\.weight holds 70000\.0"):
            write_gguf(model, Tokenizer.of_bytes(), "x", tmp_path / "m.gguf", dtype)
        assert not list(tmp_path.iterdir())
    write_gguf(model, Tokenizer.of_bytes(), "x", tmp_path / "m.gguf", "f32")


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path) -> None:
    """Half a model under the name of a whole one."""
    model = random_model(257, preset="llama")
    stop.request(2)
    with pytest.raises(stop.Stopped):
        write_gguf(model, Tokenizer.of_bytes(), "x", tmp_path / "m.gguf", "f32")
    stop.reset()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ResourceError, match="cannot be written"):
        write_gguf(model, Tokenizer.of_bytes(), "x", tmp_path / "no" / "m.gguf", "f32")


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback of an import says nothing about what to install."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError) as caught:
        write_gguf(random_model(257), Tokenizer.of_bytes(), "x", tmp_path / "m.gguf", "f32")
    assert "gptcli[gguf]" in str(caught.value.hint)


# From here on llama.cpp itself reads the files.


def llama(path: Path, **more: Any) -> Any:
    """llama.cpp with keys and values in fp32 (its default is f16)."""
    llama_cpp = pytest.importorskip("llama_cpp")
    settings = {"n_ctx": 256, "n_threads": 1, "flash_attn": False, "verbose": False}
    return llama_cpp.Llama(str(path), **{**settings, "type_k": 0, "type_v": 0, **more})


def their_ids(theirs: Any, text: str) -> list[int]:
    return list(theirs.tokenize(text.encode(), add_bos=True, special=False))


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_same_logits_and_greedy_text(
    tmp_path: Path, name: str, pattern: str
) -> None:
    """One switch that is read otherwise over there changes every text."""
    tokenizer = bpe(pattern)
    model = random_model(tokenizer.vocab_size + 20, **MODELS[name])
    out = tmp_path / "m.gguf"
    write_gguf(model, tokenizer, "x", out, "f32")
    theirs = llama(out, logits_all=True)
    ids = encode_prompt(tokenizer, PROMPT + " " + CHINESE)
    theirs.eval(ids)
    logits = torch.tensor(np.array(theirs.scores[: len(ids)]))
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0]
    # ggml looks gelu up in a table of f16.
    tolerance = 2e-2 if name.startswith("gpt2") else 1e-4
    torch.testing.assert_close(logits, ours, atol=tolerance, rtol=0)
    model = random_model(tokenizer.vocab_size, **MODELS[name])
    write_gguf(model, tokenizer, "x", out, "f32")
    theirs = llama(out)
    ids = encode_prompt(tokenizer, PROMPT)
    assert their_ids(theirs, PROMPT) == ids
    sampling = Sampling(temperature=0.0, max_new_tokens=24)
    expected = generate_samples(model, tokenizer, ids, 1, sampling)[0].tokens
    found = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
    assert [next(found) for _ in expected] == expected
    assert len(expected) > 5


@pytest.mark.parametrize("name", ["gpt2", "llama", "modern"])
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_llama_cpp_runs_the_smaller_types(tmp_path: Path, name: str, dtype: Any) -> None:
    """Wrongly packed blocks load all the same, and give nonsense or nan."""
    tokenizer = bpe("gpt4")
    model = random_model(tokenizer.vocab_size, **MODELS[name])
    write_gguf(model, tokenizer, "x", tmp_path / "m.gguf", dtype)
    theirs = llama(tmp_path / "m.gguf", logits_all=True)
    ids = encode_prompt(tokenizer, PROMPT)
    theirs.eval(ids)
    logits = torch.tensor(np.array(theirs.scores[: len(ids)]))
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0]
    assert (logits - ours).abs().mean() < (0.01 if dtype == "f16" else 0.15) * ours.std()
    answer = theirs(PROMPT, max_tokens=8, temperature=0.0)
    assert answer["usage"]["completion_tokens"] > 0


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 4.0},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_block_size": 64},
    "yarn-attention": {
        **{"kind": "yarn", "factor": 4.0, "original_block_size": 64},
        "attention_factor": 1.3,
    },
    "llama3": {"kind": "llama3", "factor": 4.0, "original_block_size": 64},
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_llama_cpp_scales_positions_as_we_do(tmp_path: Path, scaling: dict[str, Any]) -> None:
    """A key that llama.cpp does not read leaves the rotation unscaled: long texts break."""
    model = random_model(257, preset="llama", rope_theta=500.0, rope_scaling=scaling)
    write_gguf(model, Tokenizer.of_bytes(), "x", tmp_path / "m.gguf", "f32")
    theirs = llama(tmp_path / "m.gguf", logits_all=True)
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0))
    theirs.eval(ids.tolist())
    with torch.no_grad():
        ours = model(ids[None])[0]
    found = torch.tensor(np.array(theirs.scores[:200]))
    torch.testing.assert_close(found, ours, atol=2e-3, rtol=0)


def sentencepiece_style(folder: Path) -> Tokenizer:
    """As Llama 2's tokenizer.json: characters that no merge makes stand behind the merges."""
    words = ["▁the", "▁cat", "▁sat", "the", "ing", "▁sitting"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("in", "g"), ("a", "t"), ("▁", "s")]
    pairs += [("▁s", "at"), ("▁", "c"), ("▁c", "at"), ("t", "t"), ("t", "he")]
    names += [a + b for a, b in pairs]
    names += sorted({c for word in words for c in word})
    library = Library(
        BPE({n: i for i, n in enumerate(names)}, pairs, unk_token="<unk>", byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    strip = decoders.Strip(" ", 1, 0)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer_json(folder / "tokenizer.json")


def smollm_style(folder: Path, *, digits: bool = True, **changes: Any) -> Tokenizer:
    """As SmolLM's tokenizer.json: digits apart, some bytes without a token, no start token."""
    from tokenizers import pre_tokenizers, trainers

    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = (
        pre_tokenizers.Digits(individual_digits=True) if digits else pre_tokenizers.Punctuation()
    )
    library = Library(BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_])
    library.decoder = decoders.ByteLevel()
    rare = {c for c, b in byte_characters().items() if b in (0xC0, 0xFF)}
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=sorted({*byte_characters()} - rare),
        show_progress=False,
    )
    library.train_from_iterator([*TEXTS, PROMPT] * 3, trainer)
    raw = {**json.loads(library.to_str()), **changes}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return load_tokenizer_json(folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"digits": False},
            r"byte-level BPE, but its pattern \(pre-tokenizer: Punctuation \+ ByteLevel\) is none"
            r" that llama.cpp knows by a name of ours \(gpt-2, llama-bpe, smollm\)",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "a normalizer that changes texts"),
    ],
)
def test_byte_level_tokenizers_are_refused_for_the_true_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """That it were no byte-level BPE is false, and leads its user astray."""
    with pytest.raises(CheckpointError, match=reason):
        vocabulary(smollm_style(tmp_path, **changes), 400)


def test_a_bare_tokenizer_stays_bare(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp would begin texts with a token that the model has never seen there."""
    tokenizer = smollm_style(tmp_path)
    write_gguf(random_model(400, preset="llama"), tokenizer, "x", tmp_path / "m.gguf", "f32")
    found = metadata(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert "these bytes have no token" in caplog.text
    assert "0xC0 0xFF" in caplog.text


def every_tokenizer(folder: Path) -> Iterator[tuple[str, Tokenizer]]:
    yield "gpt2", bpe("gpt2")
    yield "gpt4", bpe("gpt4")
    yield "bytes", Tokenizer.of_bytes()
    yield "sentencepiece", sentencepiece_style(folder)
    (folder / "smollm").mkdir(exist_ok=True)
    yield "smollm", smollm_style(folder / "smollm")
    ranks = {bytes([b]): b for b in range(256)} | {b" args": 256, b"ar": 257}
    yield "whole words", Tokenizer("file", ranks, PATTERNS["gpt4"], 258)
    special = SpecialTokens({"<eot>": 256, "<think>": 257}, "<eot>", None, ("<think>",))
    ranks = {bytes([b]): b for b in byte_characters().values()}
    yield "text inside", Tokenizer("file", ranks, PATTERNS["gpt2"], 256, special)


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt4", "bytes", "sentencepiece", "smollm", "whole words", "text inside"]
)
def test_llama_cpp_cuts_texts_as_we_do(tmp_path: Path, name: str) -> None:
    """One other id, and the model reads another text than it was trained to read."""
    tokenizer = dict(every_tokenizer(tmp_path))[name]
    model = random_model(tokenizer.vocab_size, preset="llama", n_layer=1)
    write_gguf(model, tokenizer, "x", tmp_path / "m.gguf", "f32")
    theirs = llama(tmp_path / "m.gguf", vocab_only=True)
    for text in [*TEXTS, "the cat sat  thing\n<s>the</s> <0x0A>", "a<think> b <eot>"]:
        if text or tokenizer.prompt_start is not None:
            assert their_ids(theirs, text) == encode_prompt(tokenizer, text), text
        if text:
            ids = tokenizer.encode(text)
            assert theirs.detokenize([*ids], special=True).endswith(tokenizer.decode_bytes(ids))
    assert theirs.token_eos() == tokenizer.eot


def test_only_merges_in_order_become_scores(tmp_path: Path) -> None:
    """llama.cpp merges by the scores of the tokens; a list in another order merges otherwise."""
    sentencepiece_style(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = raw["model"]["merges"]
    # "▁t" + "he" is no last merge of "▁the" once "▁th" comes before it.
    raw["model"]["vocab"] |= {"th": 290, "▁th": 291}
    raw["model"]["merges"] = [["t", "h"], ["▁", "th"], *merges]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="merges do not follow"):
        vocabulary(load_tokenizer_json(tmp_path / "tokenizer.json"), 300)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """The temporary file lies beside it, so that renaming is possible and nothing is left."""
    out = tmp_path / "m.gguf"
    write_gguf(random_model(257), Tokenizer.of_bytes(), "x", out, "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert os.path.getsize(out) > 100_000
