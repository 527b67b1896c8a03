"""The decoder. One block whose switches are the fields of `ModelConfig`.

Legend of shapes: B batch, T time in tokens, C n_embd, H query heads, K key-value heads,
D head size, F feed-forward width, V vocabulary.
"""

import math
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptcli.config.model_schema import ModelConfig
from gptcli.model import kernels
from gptcli.model.band import Reach
from gptcli.model.batch_cache import BatchCache
from gptcli.model.cache import KVCache
from gptcli.model.lora_linear import LoraLinear
from gptcli.model.loss import linear_cross_entropy
from gptcli.model.norms import RMSNorm, norm
from gptcli.model.rope import (
    attention_factor,
    fixed_length,
    inverse_frequencies,
    rope_table,
    rotate,
    sinusoidal_table,
)
from gptcli.model.segments import Segments

_CAUSAL = Reach()

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021 (Primer)
}


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023) and optional QK-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.kv_heads
        self.head_dim, self.dropout = config.head_size, config.dropout
        q_width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.widths = [q_width, kv_width, kv_width]
        self.qkv = nn.Linear(config.n_embd, sum(self.widths), bias=config.has_qkv_bias)
        self.proj = nn.Linear(q_width, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None,
        cache: KVCache | BatchCache | None,
        layer: int,
        reach: Reach = _CAUSAL,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). With a cache, x is the continuation of what it holds."""
        B, T, _ = x.shape  # noqa: N806
        q, k, v = self._heads(self.qkv(x), rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H|K, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, P + T, D), P of them past
        groups = self.n_head // self.n_kv_head
        if (
            groups > 1 and T == 1 and not self.training
        ):  # a group's heads share keys: none is copied
            q = q.reshape(B, self.n_kv_head, groups, self.head_dim)
            return self.proj(reach.attend_last(q, k, v).reshape(B, 1, -1))
        y = reach.attend(q, k, v, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2))

    def _heads(self, qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, H*D + 2*K*D) -> queries (B, T, H, D), keys and values (B, T, K, D), with norms and
        rotations."""
        if self.qk_norm and rope is not None and kernels.fits(qkv):
            q_weights = self.q_norm.weight.expand(self.n_head, -1)  # (H, D)
            k_weights = self.k_norm.weight.expand(self.n_kv_head, -1)  # (K, D)
            qk, v = kernels.norm_and_rotate(
                qkv, torch.cat([q_weights, k_weights]), rope, self.q_norm.eps
            )
            q, k = torch.split(qk, [self.n_head, self.n_kv_head], dim=2)
            return q, k, v
        heads = torch.unflatten(qkv, -1, (-1, self.head_dim))
        q, k, v = torch.split(heads, [self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
            v = v.contiguous() if self.training else v  # else it keeps the others' memory
        return q, k, v


class FeedForward(nn.Module):
    """Two layers, or the gated form (Shazeer 2020) whose first layer gives gate and value."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated, self.act = config.gated, _ACTIVATIONS[config.activation]
        width = config.inner_size * (2 if config.gated else 1)
        self.up = nn.Linear(config.n_embd, width, bias=config.bias)
        self.proj = nn.Linear(config.inner_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        h = self.up(x)
        if self.gated and self.act is F.silu and kernels.fits(h):
            proj: nn.Module = self.proj
            return proj.of_gated(h) if isinstance(proj, LoraLinear) else proj(kernels.silu_gate(h))
        if self.gated:
            gate, value = h.chunk(2, dim=-1)  # (B, T, F) x 2
            return self.proj(self.act(gate) * value)
        return self.proj(self.act(h))


class Block(nn.Module):
    """Attention and feed-forward, each with a residual and a norm before (pre) or after (post)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.norm1, self.norm2 = norm(config, config.n_embd), norm(config, config.n_embd)
        self.attn, self.mlp = Attention(config), FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None,
        cache: KVCache | BatchCache | None,
        layer: int,
        reach: Reach,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.pre:
            x = x + self.drop(self.attn(self.norm1(x), rope, cache, layer, reach))
            return x + self.drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attn(x, rope, cache, layer, reach)))
        return self.norm2(x + self.drop(self.mlp(x)))


class GPT(nn.Module):
    """A decoder-only Transformer language model over `vocab_size` tokens."""

    recompute = False  # in training, keep only what enters each block (Chen et al. 2016)
    positions: Tensor  # fixed rope or sinusoidal table, of the configs that have one

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.windows = config.windows
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # A post-norm block ends normalised already (Radford et al. 2018 has no final norm).
        pre = config.norm_position == "pre"
        self.norm = norm(config, config.n_embd) if pre else nn.Identity()
        self.head = nn.Linear(config.n_embd, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.wte.weight
        self.reset_positions()

    def reset_positions(self) -> None:
        """Compute the fixed position table where the weights are (no checkpoint stores it).

        A model on the meta device gets an empty one: it computes nothing before it has weights.
        """
        c = self.config
        if self.device.type == "meta":
            if c.position in ("rope", "sinusoidal"):
                empty = torch.empty(0, device=self.device)
                self.register_buffer("positions", empty, persistent=False)
        elif c.position == "rope":
            table = self._rotations(torch.arange(fixed_length(c.rope_scaling, c.block_size)))
            self.register_buffer("positions", table.to(self.device), persistent=False)
        elif c.position == "sinusoidal":  # added to the embeddings, so of their dtype
            table = sinusoidal_table(c.block_size, c.n_embd)
            self.register_buffer("positions", table.to(self.device, self.dtype), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what the layers pass on and a cache keeps, whatever packed matrices are stored in."""
        return next(self.parameters()).dtype

    @property
    def cacheable_tokens(self) -> int:
        """The longest text whose keys a cache can hold: beyond, they change with its length."""
        dynamic = self.config.position == "rope" and self.positions.size(1) < self.config.block_size
        return self.positions.size(1) if dynamic else sys.maxsize

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | BatchCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) -> final hidden states (B, T, C); T with the cache <= block_size.

        A config that rolls takes any number of tokens. `segments` (B, T) int64 says which document
        of its row each token belongs to, and never falls along a row: attention stays inside the
        document and positions restart at its first token. A `BatchCache` has been told of the
        tokens by `begin`. ValueError for too many tokens, or segments together with a cache.
        """
        if isinstance(cache, BatchCache):
            return self._extend(tokens, cache)
        start = cache.length if cache is not None else 0
        stop = start + tokens.size(1)
        self._check_fits(stop, cache)
        if segments is not None and (cache is not None or segments.shape != tokens.shape):
            raise ValueError("segments have the shape of the tokens and go with no cache")
        if cache is not None and cache.tokens is not None:
            cache.tokens[:, start:stop] = tokens
            if start and stop > self.positions.size(1):
                # Another length, other rotations: what the layers made of the past has changed.
                cache.length = 0
                return self.hidden(cache.tokens[:, :stop], cache)[:, start:]
        documents = None if segments is None else Segments.of(segments)
        where = slice(start, stop) if documents is None else documents.positions
        sizes = stop if documents is None else documents.sizes()
        x, rope = self._embed(tokens, where, stop, sizes)
        reaches = {
            window: Reach.of(
                window,
                tokens.size(1),
                tokens.device,
                past=min(start, window - 1) if window else start,
                segments=documents,
            )
            for window in sorted(set(self.windows))
        }
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            reach = reaches[self.windows[layer]]
            if recompute:
                x = checkpoint(block, x, rope, None, layer, reach, use_reentrant=False)
            else:
                x = block(x, rope, cache, layer, reach)
        if cache is not None:
            cache.length = stop
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | BatchCache | None = None,
        last_only: bool = False,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V), or (B, 1, V) with `last_only`; see `hidden`."""
        x = self.hidden(tokens, cache, segments)
        return self.head(x[:, -1:] if last_only else x)

    def loss(self, tokens: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        """Sum over the targets that are not IGNORED of -ln p(target), nats, fp32 scalar.

        All are (B, T) int64; targets[b, t] follows tokens[b, t]. For `segments` see `hidden`.
        """
        hidden = self.hidden(tokens, segments=segments).flatten(0, 1)
        return linear_cross_entropy(hidden, self.head.weight, targets.flatten())

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty key-value cache for `batch` rows of up to `capacity` tokens.

        Without `capacity` it holds block_size tokens, and of a config that rolls any number. So it
        does with a `capacity` of at least the largest window.
        """
        c = self.config
        size = capacity or (max(self.windows) if c.rolls else c.block_size)
        return KVCache(
            self.windows,
            size,
            batch,
            c.kv_heads,
            c.head_size,
            self.device,
            self.dtype,
            keeps_tokens=self.cacheable_tokens < sys.maxsize,
        )

    def new_batch_cache(self, rows: int, capacity: int, most_new: int = 1) -> BatchCache:
        """An empty cache for up to `rows` texts of up to `capacity` tokens, of a config that rolls
        of any number; up to `most_new` tokens come at once."""
        c = self.config
        return BatchCache(
            self.windows,
            capacity,
            rows,
            c.kv_heads,
            c.head_size,
            self.device,
            self.dtype,
            most_new,
        )

    def parameter_count(self, embeddings: bool = True) -> int:
        """Number of parameters, tied ones once; without `embeddings`, the blocks and norms only."""
        total = sum(p.numel() for p in self.parameters())
        if not embeddings:
            skip = [self.wte, self.head] + ([self.wpe] if self.config.position == "learned" else [])
            total -= sum(p.numel() for p in {p for m in skip for p in m.parameters()})
        return total

    def _check_fits(self, stop: int, cache: KVCache | None) -> None:
        block_size = self.config.block_size
        if stop > block_size and not self.config.rolls:
            raise ValueError(f"{stop} tokens do not fit block_size {block_size}")
        if cache is not None and cache.capacity is not None and stop > cache.capacity:
            raise ValueError(f"{stop} tokens do not fit a cache of {cache.capacity}")

    def _extend(self, tokens: Tensor, cache: BatchCache) -> Tensor:
        """`hidden` of the tokens (B, T) that `cache` has been told of."""
        x, rope = self._embed(tokens, cache.positions, cache.longest, cache.positions[:, -1:] + 1)
        reaches = {}
        for layer, block in enumerate(self.blocks):
            window = self.windows[layer]
            if window not in reaches:
                reaches[window] = cache.reach(layer, window)
            x = block(x, rope, cache, layer, reaches[window])
        return self.norm(x)

    def _embed(
        self, tokens: Tensor, where: slice | Tensor, stop: int, sizes: int | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, T, C) of tokens at the positions `where`, a slice or (B, T), all of them
        below `stop`, and their rotations in texts of `sizes` tokens, a number or (B, T)."""
        x, rope = self.wte(tokens), None
        if self.config.position == "learned":
            x = x + (self.wpe.weight[where] if isinstance(where, slice) else self.wpe(where))
        elif self.config.position == "sinusoidal":
            # Scaled as in Vaswani et al. 2017, section 3.4.
            x = x * math.sqrt(self.config.n_embd) + self.positions[where]
        elif self.config.position == "rope" and stop <= self.positions.size(1):
            rope = self.positions[:, where]  # (2, T, D/2) or (2, B, T, D/2)
        elif self.config.position == "rope":  # beyond the table
            if isinstance(where, slice):
                where = torch.arange(where.start, where.stop, device=self.device)
            rope = self._rotations(where, sizes)
        return self.drop(x), rope

    def _rotations(self, positions: Tensor, length_tokens: int | Tensor = 0) -> Tensor:
        """Rotary table (2, ..., D/2) for `positions` (...) in texts of that length."""
        c = self.config
        frequencies = inverse_frequencies(c.head_size, c.rope_theta, c.rope_scaling, length_tokens)
        frequencies = frequencies.to(positions.device)
        return rope_table(positions, frequencies, attention_factor(c.rope_scaling))


def initialise(model: GPT, generator: torch.Generator) -> None:
    """Give the model its first weights, see `initial_values`."""
    with torch.no_grad():
        for parameter, value in initial_values(model, generator):
            parameter.copy_(value)


def initial_values(model: GPT, generator: torch.Generator) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter with its first value, drawn on the CPU, so that every device starts alike.

    N(0, 0.02) for matrices and embeddings, residual projections divided by sqrt(2 n_layer)
    (Radford et al. 2019, section 2.3). With `zero_init_output`, projections into the residual
    stream start at zero (Yang et al. 2022, Tensor Programs V, appendix D) and the other hidden
    matrices at std 1 / sqrt(fan in).
    """
    config = model.config
    scaled = 0.02 / math.sqrt(2 * config.n_layer)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            first = 0.0 if name.endswith("bias") else 1.0  # weights of norms
            yield parameter, torch.full(parameter.shape, first)
            continue
        std = 0.02
        if name.endswith("proj.weight"):
            std = 0.0 if config.zero_init_output else scaled
        elif name.startswith("blocks") and config.zero_init_output:
            std = parameter.size(1) ** -0.5
        draw = torch.empty(parameter.shape).normal_(0.0, 1.0, generator=generator)
        yield parameter, draw.mul_(std)
