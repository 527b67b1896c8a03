"""Ours against their twins in transformers, with random weights, through the folders they save."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twins import BLOCK, TWINS, VOCAB, Pair, make_twin, tokens_of

from gptcli.config.model_schema import ModelConfig
from gptcli.interop.hf_folder import open_folder
from gptcli.interop.hf_weights import layout, plain_name, to_theirs
from gptcli.model.gpt import GPT

LENGTHS = (1, 2, 7, BLOCK - 1, BLOCK)


@pytest.fixture(scope="module", params=TWINS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model_type, config = TWINS[request.param]
    return Pair.make(tmp_path_factory.mktemp("twin"), model_type, **config)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Within the promised 1e-4, fp32."""
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0.0)


def test_logits_agree(pair: Pair) -> None:
    """A weight in the wrong place, another norm, another mask: all of them change the logits."""
    for length in LENGTHS:
        ours, theirs = pair.logits(tokens_of(length))
        assert_near(ours, theirs)
        assert theirs.std() > 0.5  # else the tolerance would pass everything


def test_loss_and_gradients_agree(pair: Pair) -> None:
    """A model that only computes the same may still train differently, or not all of itself."""
    tokens = tokens_of(BLOCK)
    pair.theirs.zero_grad()
    pair.ours.zero_grad()
    theirs = pair.theirs(tokens, labels=tokens).loss
    ours = pair.ours.loss(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    assert_near(ours, theirs)
    ours.backward()
    theirs.backward()
    family = pair.theirs.config.model_type
    expected = {
        plain_name(name, family): parameter.grad
        for name, parameter in pair.theirs.named_parameters()
    }
    table = layout(pair.ours.config, VOCAB, family)
    found = {}
    for name, parameter in pair.ours.named_parameters():
        assert parameter.grad is not None, name
        ratio = to_theirs(table[name], torch.ones_like(parameter.grad))  # their weight / our weight
        for theirs_name, gradient in to_theirs(table[name], parameter.grad).items():
            # The weight was scaled by the ratio, so its gradient is by the inverse.
            found[plain_name(theirs_name, family)] = gradient / ratio[theirs_name] ** 2
    zeros = open_folder(pair.folder).config.zeros
    found = {name: grad for name, grad in found.items() if not name.endswith(zeros)}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("length", [1, 7])
def test_greedy_continuations_agree(pair: Pair, length: int) -> None:
    """A cache that forgets, repeats or misplaces a token gives another text, ours or theirs."""
    prompt, count = tokens_of(length, 1)[0], BLOCK - length
    texts = [pair.our_greedy(prompt, count, cache=cache) for cache in (True, False)]
    texts += [pair.their_greedy(prompt, count, cache=cache) for cache in (True, False)]
    assert len(texts[0]) == count
    assert texts == [texts[0]] * 4


@pytest.mark.parametrize("chunk", [1, 3])
def test_cached_logits_agree(pair: Pair, chunk: int) -> None:
    """Greedy texts hide small errors: a band one token too wide in the cache, say."""
    tokens = tokens_of(BLOCK)
    cache = pair.ours.new_cache(len(tokens))
    with torch.inference_mode():
        pieces = [pair.ours(piece, cache) for piece in tokens.split(chunk, dim=1)]
        assert_near(torch.cat(pieces, dim=1), pair.theirs(tokens).logits)


LONG, SHORT = 48, 12  # after and before the stretching of the positions
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": SHORT,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT},
    "yarn-given": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": SHORT,
        "attention_factor": 0.8,
        "beta_fast": 3.0,
        "beta_slow": 0.5,
    },
}


@pytest.fixture(params=SCALINGS)
def stretched(request: pytest.FixtureRequest, tmp_path) -> Pair:
    """A llama with stretched positions. Its base is small and its heads are wide, so that each
    rule finds frequencies to stretch, some to leave, and some in between."""
    scaling = {**SCALINGS[request.param], "rope_theta": 100.0}
    size = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    # transformers' dynamic takes the length in the config for that of the training.
    length = SHORT if request.param == "dynamic" else LONG
    _, config = TWINS["llama"]
    config = {**config, **size, "max_position_embeddings": length, "rope_parameters": scaling}
    return Pair.make(tmp_path, "llama", **config)


def test_stretched_positions_agree(stretched: Pair) -> None:
    """A frequency of the wrong band is right for short texts and wrong for the long ones."""
    # Growing lengths: transformers' dynamic keeps the base of the longest text it has seen.
    for length in (1, SHORT, SHORT + 1, LONG - 1, LONG):
        if length > stretched.ours.config.block_size:
            break
        assert_near(*stretched.logits(tokens_of(length)))
    assert length > SHORT


def test_stretched_positions_are_cached_exactly(stretched: Pair) -> None:
    """Keys in the cache were rotated for a shorter text, where the base depends on its length."""
    length = min(LONG, stretched.ours.config.block_size)
    prompt, count = tokens_of(SHORT - 3, 1)[0], length - SHORT + 3
    texts = [stretched.our_greedy(prompt, count, cache=cache) for cache in (True, False)]
    # The cache of transformers keeps keys of another base, so only the uncached text is exact.
    texts.append(stretched.their_greedy(prompt, count, cache=False))
    assert texts == [texts[0]] * 3


def test_text_longer_than_the_block_rolls(tmp_path) -> None:
    """Where every layer is a window, nothing ends at block_size: neither reading nor writing."""
    model_type, config = TWINS["mistral"]
    pair = Pair.make(tmp_path, model_type, **config)
    assert pair.ours.config.rolls
    assert_near(*pair.logits(tokens_of(3 * BLOCK)))
    prompt = tokens_of(BLOCK - 5, 1)[0]
    texts = [pair.our_greedy(prompt, BLOCK, cache=cache) for cache in (True, False)]
    texts += [pair.their_greedy(prompt, BLOCK, cache=cache) for cache in (True, False)]
    assert texts == [texts[0]] * 4


def dense_masked(model: GPT, tokens: Tensor, windows: list[int]) -> Tensor:
    """Logits (B, T, V) of a gpt3 by the book: all scores, then a mask for each layer, in which a
    query sees itself and the `windows[layer] - 1` tokens before it."""
    config, w = model.config, model.state_dict()
    length = tokens.size(1)
    back = torch.arange(length)[:, None] - torch.arange(length)  # how far key j is behind query i

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], config.norm_eps
        )

    x = w["wte.weight"][tokens] + w["wpe.weight"][:length]
    for layer, reach in enumerate(windows):
        at = f"blocks.{layer}"
        qkv = norm(x, f"{at}.norm1") @ w[f"{at}.attn.qkv.weight"].T
        q, k, v = qkv.view(*tokens.shape, 3, config.n_head, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(config.head_size)
        seen = (back >= 0) & (back < reach)
        y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2)
        x = x + y @ w[f"{at}.attn.proj.weight"].T + w[f"{at}.attn.proj.bias"]
        h = norm(x, f"{at}.norm2") @ w[f"{at}.mlp.up.weight"].T + w[f"{at}.mlp.up.bias"]
        h = F.gelu(h, approximate="tanh") @ w[f"{at}.mlp.proj.weight"].T
        x = x + h + w[f"{at}.mlp.proj.bias"]
    return norm(x, "norm") @ w["wte.weight"].T


@pytest.mark.parametrize("window", [1, 2, 5, BLOCK, BLOCK + 1])
def test_bands_against_a_dense_mask(window: int) -> None:
    """A band one token too wide or too narrow: GPT-Neo could share the mistake, a mask cannot."""
    size = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": BLOCK}
    config = ModelConfig(preset="gpt3-small", **size, window=[0, window])
    model = GPT(config, VOCAB).eval()
    generator = torch.Generator().manual_seed(window)
    tokens = tokens_of(BLOCK)
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
        expected = dense_masked(model, tokens, [BLOCK, window, BLOCK])
        assert_near(model(tokens), expected)
        cache = model.new_cache(len(tokens))
        assert_near(torch.cat([model(t, cache) for t in tokens.split(5, dim=1)], dim=1), expected)


def test_the_band_is_seen_in_the_twin() -> None:
    """Guards these tests: a twin whose window changes nothing would prove nothing."""
    model_type, config = TWINS["gpt3"]
    tokens = tokens_of(BLOCK)
    with torch.inference_mode():
        narrow = make_twin(model_type, **config)(tokens).logits
        wide = make_twin(model_type, **{**config, "window_size": 6})(tokens).logits
    assert (narrow - wide).abs().max() > 0.01
