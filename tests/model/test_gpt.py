"""The decoder against short loops written from the papers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.model.gpt import GPT, Attention, initialise
from gptcli.model.loss import IGNORED

V, T = 50, 12
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": T}
MODERN = {**PRESETS["modern"], **SMALL}
GPT2 = {**PRESETS["gpt2"], **SMALL}
TEXTBOOK = {**GPT2, "norm_position": "post", "position": "sinusoidal", "activation": "relu"}
VARIANTS: dict[str, dict[str, Any]] = {
    "modern": MODERN,
    "modern-gqa": {**MODERN, "n_kv_head": 2},
    "modern-mqa-wide-heads": {**MODERN, "n_kv_head": 1, "head_dim": 6},
    "llama": {**MODERN, "qk_norm": False},
    "gpt2": GPT2,
    "gpt2-no-qkv-bias": {**GPT2, "qkv_bias": False},
    "gpt2-post-norm": {**GPT2, "norm_position": "post"},
    "textbook": TEXTBOOK,
    "textbook-pre-norm": {**TEXTBOOK, "norm_position": "pre"},
    "relu2": {**GPT2, "activation": "relu2"},
    "gelu-gated": {**GPT2, "activation": "gelu", "gated": True},
    "no-positions": {**MODERN, "position": "none"},
}


def random_model(settings: dict[str, Any], seed: int = 0) -> GPT:
    """Weights far from their initial values, so that nothing is zero or one by chance."""
    model = GPT(ModelConfig(**settings), V)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        mean = 0.5 if parameter.ndim == 1 else 0.0
        parameter.data.normal_(mean, 0.3, generator=generator)
    return model.requires_grad_(False).eval()


def some_tokens(batch: int = 2, length: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, V, (batch, length), generator=generator)


def attention_loop(attention: Attention, x: Tensor, theta: float | None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017), one head and one query at a time."""
    d, groups = attention.head_dim, attention.n_head // attention.n_kv_head
    q, k, v = attention.qkv(x).split(attention.widths, dim=-1)
    y = torch.zeros_like(q)
    for b in range(x.size(0)):
        for h in range(attention.n_head):
            mine, theirs = slice(h * d, h * d + d), slice(h // groups * d, h // groups * d + d)
            for i in range(x.size(1)):
                query = turned(attention, "q_norm", q[b, i, mine], i, theta)
                keys = [
                    turned(attention, "k_norm", k[b, j, theirs], j, theta) for j in range(i + 1)
                ]
                weights = torch.stack([query @ key / math.sqrt(d) for key in keys]).softmax(0)
                y[b, i, mine] = sum(w * v[b, j, theirs] for j, w in enumerate(weights))
    return attention.proj(y)


def turned(
    attention: Attention, norm: str, x: Tensor, position: int, theta: float | None
) -> Tensor:
    """QK-norm, then each pair (x[i], x[i + D/2]) turned by position * theta^(-2i/D)."""
    if attention.qk_norm:
        layer = getattr(attention, norm)
        x = x / (x.square().mean() + layer.eps).sqrt() * layer.weight
    if theta is None:
        return x
    half, y = x.numel() // 2, x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / x.numel())
        turn = complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
        y[i], y[i + half] = turn.real, turn.imag
    return y


@pytest.mark.parametrize(
    "name", ["modern", "modern-gqa", "modern-mqa-wide-heads", "llama", "gpt2", "gpt2-no-qkv-bias"]
)
def test_attention_equals_a_loop(name: str) -> None:
    """Guards: wrong scale, mask, head order, key-value grouping, QK-norm or rotation."""
    model = random_model(VARIANTS[name])
    config, attention = model.config, model.blocks[0].attn
    x = torch.randn(2, T, config.n_embd, generator=torch.Generator().manual_seed(2))
    rotary = config.position == "rope"
    got = attention(x, model.positions if rotary else None, None, 0)
    expected = attention_loop(attention, x, config.rope_theta if rotary else None)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def block_loop(model: GPT, tokens: Tensor) -> Tensor:
    """The textbook Transformer decoder in ten lines (post-norm, sinusoidal, ReLU)."""
    c = model.config
    table = torch.zeros(tokens.size(1), c.n_embd)
    for position in range(tokens.size(1)):
        for i in range(0, c.n_embd, 2):
            angle = position / 10000 ** (i / c.n_embd)
            table[position, i], table[position, i + 1] = math.sin(angle), math.cos(angle)
    x = model.wte.weight[tokens] * math.sqrt(c.n_embd) + table
    for block in model.blocks:
        x = block.norm1(x + attention_loop(block.attn, x, None))
        x = block.norm2(x + block.mlp.proj(block.mlp.up(x).clamp(min=0)))
    return x @ model.wte.weight.T


def test_textbook_transformer_equals_its_oracle() -> None:
    """Guards: a wrong order of norms and residuals, or wrong sinusoids, in the post-norm form."""
    model = random_model(TEXTBOOK)
    tokens = some_tokens(1, 6)
    torch.testing.assert_close(model(tokens), block_loop(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_future_tokens_do_not_change_past_logits(name: str) -> None:
    """Guards: a leak through the causal mask."""
    model = random_model(VARIANTS[name])
    tokens = some_tokens()
    before = model(tokens)
    for position in range(1, T):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 7) % V
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position])
        assert not torch.allclose(after[:, position], before[:, position])


@pytest.mark.parametrize("chunks", [[T], [1] * T, [5, 1, 1, 5], [3, 4, 5], [1, 11]])
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_chunks_equal_the_full_forward(name: str, chunks: list[int]) -> None:
    """Guards: positions or masks that are off after a prefill in parts."""
    model = random_model(VARIANTS[name])
    tokens = some_tokens()
    cache, start, got = model.new_cache(2), 0, []
    for size in chunks:
        got.append(model(tokens[:, start : start + size], cache))
        start += size
        assert cache.length == start
    torch.testing.assert_close(torch.cat(got, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


def test_last_only_is_the_last_position() -> None:
    """Guards: `last_only` picks another position or changes it."""
    model = random_model(GPT2)
    last = model(some_tokens(), last_only=True)
    assert last.shape == (2, 1, V)
    torch.testing.assert_close(last, model(some_tokens())[:, -1:])


def test_more_tokens_than_the_block_are_refused() -> None:
    """Guards: a model asked beyond its positions reads rubbish or fails deep inside."""
    model = random_model(MODERN)
    with pytest.raises(ValueError, match="13 tokens do not fit block_size 12"):
        model(some_tokens(1, T + 1))
    cache = model.new_cache(1)
    model(some_tokens(1, T), cache)
    with pytest.raises(ValueError, match="13 tokens"):
        model(some_tokens(1, 1), cache)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_at_the_start_is_ln_v(name: str) -> None:
    """Guards: initial weights so wide that training starts above the loss of guessing."""
    model = GPT(ModelConfig(**VARIANTS[name]), V)
    initialise(model, torch.Generator().manual_seed(0))
    tokens, targets = some_tokens(16), some_tokens(16).flip(0)
    loss = model.eval().loss(tokens, targets) / targets.numel()
    assert float(loss.detach()) == pytest.approx(math.log(V), rel=0.05)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """Guards: draws from torch's global generator, so that two runs of a seed differ."""
    models = [GPT(ModelConfig(**MODERN), V) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialise(model, torch.Generator().manual_seed(seed))
        torch.rand(1)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert all(not b.attn.proj.weight.any() for b in models[0].blocks)


def test_residual_projections_start_smaller() -> None:
    """Guards: the 1 / sqrt(2 n_layer) of Radford et al. 2019 missing or on the wrong matrices."""
    model = GPT(ModelConfig(**{**GPT2, "n_embd": 64}), V)
    initialise(model, torch.Generator().manual_seed(0))
    block = model.blocks[0]
    for linear, std in [
        (block.attn.qkv, 0.02),
        (block.mlp.up, 0.02),
        (block.attn.proj, 0.01),
        (block.mlp.proj, 0.01),
    ]:
        assert float(linear.weight.detach().std()) == pytest.approx(std, rel=0.05)
        assert not linear.bias.any()


def test_loss_is_a_sum_that_skips_ignored_targets() -> None:
    """Guards: a mean where a sum is promised, or masked positions that count."""
    model = random_model(MODERN)
    tokens, targets = some_tokens(), some_tokens().roll(-1, dims=1)
    logprobs = model(tokens).log_softmax(-1)
    targets[:, ::3] = IGNORED
    expected = 0.0
    for b in range(2):
        for t in range(T):
            if t % 3:
                expected -= float(logprobs[b, t, targets[b, t]])
    assert float(model.loss(tokens, targets)) == pytest.approx(expected, rel=1e-5)
    assert float(model.loss(tokens, torch.full_like(targets, IGNORED))) == 0.0


@pytest.mark.parametrize("name", ["modern", "gpt2", "textbook"])
def test_one_batch_overfits(name: str) -> None:
    """Guards: a gradient that does not reach some part of the model."""
    model = GPT(ModelConfig(**VARIANTS[name]), V)
    initialise(model, torch.Generator().manual_seed(0))
    tokens, targets = some_tokens(4), some_tokens(4).roll(-1, dims=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss = model.loss(tokens, targets) / targets.numel()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_gated_layers_keep_the_parameter_count() -> None:
    """Guards: a gated feed-forward half as large again as the plain one."""
    config = ModelConfig(n_embd=768, n_head=12)
    assert config.inner_size == 2048
    assert 3 * 768 * config.inner_size == 2 * 768 * 4 * 768


def test_dropout_only_while_training() -> None:
    """Guards: evaluation with dropout, or training without it."""
    model = GPT(ModelConfig(**{**MODERN, "dropout": 0.3, "zero_init_output": False}), V)
    initialise(model, torch.Generator().manual_seed(0))
    tokens = some_tokens()
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))
