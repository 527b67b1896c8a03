"""What training tells whoever listens: the `event` of log records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepEvent:
    """Figures since the last one. Loss in nats per token; `update_ratio` is the norm of the last
    change over the norm of the weights."""

    step: int
    max_steps: int | None
    progress: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    left_seconds: float | None
    update_ratio: float | None = None
    mfu: float | None = None  # model FLOPs utilisation, in [0, 1]


@dataclass(frozen=True)
class EvalEvent:
    """Validation scores at a step."""

    step: int
    loss: float
    perplexity: float
    bits_per_byte: float
    seconds: float


@dataclass(frozen=True)
class SampleEvent:
    """One text generated along the way."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class SaveEvent:
    """A published checkpoint."""

    step: int
    path: str
    seconds: float
