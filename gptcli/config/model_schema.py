"""The schema of the section `model`: the decoder's sizes and switches."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gptcli.config.presets import PRESETS
from gptcli.config.section import OneOrMore, PositiveFloat, PositiveInt, Section

# Keys that may be given beside `init`: no weight depends on them but a learned position table,
# whose first rows are kept.
BESIDE_INIT = ("dropout", "block_size", "rope_theta", "rope_scaling", "window")

# What each kind of scaling reads besides kind and factor.
_READ_BY = {
    "linear": set[str](),
    "dynamic": {"original_block_size"},
    "yarn": {"original_block_size", "beta_fast", "beta_slow", "attention_factor"},
    "llama3": {"original_block_size", "low_freq_factor", "high_freq_factor"},
}


class RopeScaling(Section):
    """Rotary positions stretched for texts longer than those a model was trained on.

    linear: positions divided by `factor` (Chen et al. 2023). dynamic: NTK-aware, the base grows
    with the text once it is longer than `original_block_size`. yarn: Peng et al. 2023. llama3:
    Grattafiori et al. 2024. All as transformers computes them.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3"] = Field(
        description="how positions are stretched"
    )
    factor: Annotated[float, Field(ge=1.0)] = Field(
        description="how many times longer texts may get"
    )
    original_block_size: PositiveInt | None = Field(
        default=None, description="the block size of the training (not used by linear)"
    )
    low_freq_factor: PositiveFloat = Field(
        default=1.0,
        description="llama3: waves longer than original_block_size / this are stretched in full",
    )
    high_freq_factor: PositiveFloat = Field(
        default=4.0,
        description="llama3: waves shorter than original_block_size / this stay as they are",
    )
    beta_fast: PositiveFloat = Field(
        default=32.0,
        description="yarn: dimensions that turn more often than this in original_block_size stay",
    )
    beta_slow: PositiveFloat = Field(
        default=1.0,
        description="yarn: dimensions that turn less often than this are stretched in full",
    )
    attention_factor: PositiveFloat | None = Field(
        default=None, description="yarn: multiplies the rotations; null: 0.1 ln(factor) + 1"
    )

    @model_validator(mode="after")
    def _complete(self) -> "RopeScaling":
        if self.kind != "linear" and self.original_block_size is None:
            raise ValueError(
                f"kind {self.kind} needs original_block_size, the block_size that the model was"
                " trained with"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"kind llama3 needs high_freq_factor {self.high_freq_factor:g} above"
                f" low_freq_factor {self.low_freq_factor:g}"
            )
        if self.kind == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"kind yarn needs beta_fast {self.beta_fast:g} above beta_slow {self.beta_slow:g}"
            )
        return self


class ModelConfig(Section):
    """The decoder's sizes and switches. `preset` fills the keys that are not given."""

    preset: str = Field(
        default="modern",
        json_schema_extra={"enum": [*PRESETS]},
        description="a published combination that fills the keys not given: gpt config presets",
    )
    n_layer: PositiveInt = Field(default=4, description="decoder blocks")
    n_head: PositiveInt = Field(default=4, description="attention heads (of the queries)")
    n_kv_head: PositiveInt | None = Field(
        default=None, description="heads of keys and values, a divisor of n_head; null: n_head"
    )
    n_embd: PositiveInt = Field(default=256, description="width of the residual stream")
    head_dim: PositiveInt | None = Field(
        default=None, description="width of a head; null: n_embd / n_head"
    )
    n_inner: PositiveInt | None = Field(
        default=None,
        description="width inside the feed-forward layer; null: 4 n_embd, gated about 8/3 n_embd",
    )
    block_size: PositiveInt = Field(default=128, description="tokens of context")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="share of activations zeroed in training"
    )
    norm: Literal["layernorm", "rmsnorm"] = Field(
        default="rmsnorm", description="normalisation of the blocks' inputs"
    )
    norm_position: Literal["pre", "post"] = Field(
        default="pre",
        description="pre: before attention and feed-forward; post: after the sum, as GPT-1",
    )
    norm_eps: PositiveFloat = Field(
        default=1e-6, description="added to the variance before its root"
    )
    position: Literal["learned", "sinusoidal", "rope", "none"] = Field(
        default="rope", description="how the model knows a token's position"
    )
    rope_theta: PositiveFloat = Field(default=10000.0, description="rope: base of the wavelengths")
    rope_scaling: RopeScaling | None = Field(
        default=None, description="null: positions as they are"
    )
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "relu2"] = Field(
        default="silu", description="of the feed-forward layer; relu2: squared ReLU"
    )
    gated: bool = Field(
        default=True, description="feed-forward layer with a gate (with silu: SwiGLU)"
    )
    bias: bool = Field(default=False, description="biases in linear layers and layernorm")
    qkv_bias: bool | None = Field(
        default=None,
        description="biases of the projections to queries, keys and values; null: as bias",
    )
    tie_embeddings: bool = Field(
        default=False, description="the output head is the token embedding"
    )
    qk_norm: bool = Field(
        default=True, description="normalise queries and keys, for stable training"
    )
    window: Annotated[list[Annotated[int, Field(ge=0)]], OneOrMore()] | None = Field(
        default=None,
        min_length=1,
        json_schema_extra={"examples": [256, [0, 256]]},
        description="tokens that attention reaches back, itself included, layer by layer and"
        " repeated over them; 0: all",
    )
    embedding_file: str | None = Field(
        default=None,
        description="word2vec or GloVe text file whose vectors start the token embeddings",
    )
    zero_init_output: bool = Field(default=True, description="output projections start at zero")

    @property
    def windows(self) -> list[int]:
        """For each layer how many tokens its attention reaches back; 0: all."""
        pattern = self.window or [0]
        return [pattern[layer % len(pattern)] for layer in range(self.n_layer)]

    @property
    def rolls(self) -> bool:
        """Whether a text of any length can be read with a cache of fixed size, and exactly so:
        every layer reaches back no further than in training, and positions have no last one."""
        scaling = self.rope_scaling
        endless = self.position == "none" or (
            self.position == "rope" and (scaling is None or scaling.kind != "dynamic")
        )
        return endless and all(0 < window <= self.block_size for window in self.windows)

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.n_kv_head or self.n_head

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layer; gated ones keep the parameter count of 4 n_embd."""
        if self.n_inner:
            return self.n_inner
        return -(-8 * self.n_embd // 3 // 32) * 32 if self.gated else 4 * self.n_embd

    @property
    def unused(self) -> dict[str, str]:
        """Keys that another key's value leaves without effect -> that value, in words."""
        if self.position != "rope":
            return {"rope_theta": f"model.position {self.position}"}
        if self.rope_scaling is None:
            return {}
        kind = self.rope_scaling.kind
        keys = RopeScaling.model_fields.keys() - {"kind", "factor"} - _READ_BY[kind]
        return {f"rope_scaling.{key}": f"model.rope_scaling.kind {kind}" for key in sorted(keys)}

    @property
    def idle_scaling(self) -> str | None:
        """Why `rope_scaling` changes nothing within the block; None where it does."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "dynamic":
            return None
        trained = scaling.original_block_size
        if trained is None or self.block_size > trained:
            return None
        return (
            f"model.rope_scaling dynamic changes nothing up to original_block_size {trained}, and"
            f" model.block_size is {self.block_size}; raise block_size or remove rope_scaling"
        )

    @property
    def idle_window(self) -> str | None:
        """Why a part of `window` bounds nothing within the block; None where all does."""
        if self.window is None or max(self.window) <= self.block_size:
            return None
        return f"model.window {max(self.window)} reaches beyond model.block_size {self.block_size}"

    @field_validator("window", mode="before", json_schema_input_type=int | list[int] | None)
    @classmethod
    def _one_for_all(cls, window: Any) -> Any:
        return [window] if type(window) is int else window

    @field_validator("preset")
    @classmethod
    def _known(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset[:60]!r}")
        return preset

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        """Keys that are given win over the preset's."""
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "modern")
        known = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        return {**known, **values}

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        problems = []
        if self.head_dim is None and self.n_embd % self.n_head:
            problems.append(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        elif self.position == "rope" and self.head_size % 2:
            size = "head_dim" if self.head_dim else "n_embd / n_head"
            problems.append(f"position rope needs an even head size ({size}), not {self.head_size}")
        if self.n_head % self.kv_heads:
            problems.append(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        scaling = self.rope_scaling
        if scaling is not None and self.position != "rope":
            problems.append(
                f"rope_scaling stretches position rope, but position is {self.position}"
            )
        elif scaling is not None and scaling.kind == "yarn" and self.rope_theta <= 1.0:
            problems.append(
                f"rope_scaling yarn needs rope_theta above 1 (its logarithm divides), not"
                f" {self.rope_theta:g}"
            )
        elif scaling is not None and scaling.kind == "dynamic" and self.head_size <= 2:
            problems.append(
                f"rope_scaling dynamic needs a head size above 2, not {self.head_size}"
                " (its exponent is D / (D - 2))"
            )
        if self.position == "sinusoidal" and self.n_embd % 2:
            problems.append(f"position sinusoidal needs an even n_embd, not {self.n_embd}")
        if problems:
            raise ValueError("\n".join(problems))
        return self
